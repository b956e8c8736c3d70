"""Classification and detection on real data with small networks: joint teacher, control, student, usual alternatives.

Scenarios (members of one joint teacher; every student has a control of its own):
  cxr      chest x-ray of two sites, lung masks and tuberculosis (306, 307), 2d
  brain2d  tumour boxes and types in T1c MR slices (316), dementia grades in MR slices (313), 2d
  ct2d     COVID in CT slices (312), kidney stone boxes (323); the liver (322: masks, boxes) for the teacher only, 2d
  lung3d   nodule masks, malignancy and boxes (302); the hippocampus (301: masks) for the teacher only, 3d_fullres

Alternatives, with the same training cases, steps, batch size and image size:
  resnet18    timm's, or MONAI's in 3D, from random weights on the whole image, for classes
  resnet18_instance_norm  timm's with nnU-Net's normalisation instead of its own, batch normalisation
  own_network the control's network and class head, trained as resnet18 is: is it the network or the training?
  control_adamw  the control with that optimizer and nnU-Net's augmentation
  control_wide   the control with twice the width, whose step costs about as much as that of resnet18
  retinanet   torchvision's with a ResNet-18 from random weights on the whole image, for boxes in 2D
  components  nnU-Net's segmentation without further heads and its connected components, for boxes in 3D

Every run is on a real fold with the same plans, budget, fold and seed for all methods; the teacher's fold is the
student's fold; its budget is the sum of its members' controls. Scored are the whole cases of the final validation, in
the stored images, predicted without test-time mirroring. A finished run is not repeated.
The alternatives need: pip install timm torchvision

    NNUNET_KD_DATA=.../nnUNet_raw python examples/benchmarks/tasks.py -o OUT --folds 0 1 --seeds 0 1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from real_data import (
    BASE_PLANS,
    MEMORY_TARGET_GB,
    SMALL_PLANS,
    TRAINERS,
    WIDTH,
    Run,
    add_run_arguments,
    add_variant_arguments,
    call,
    environment,
    for_each,
    jobs,
    need_data,
    start_again,
    write_small_plans,
)
from task_scenarios import (
    ADAMW,
    BATCH_SIZE,
    COMPONENTS,
    INSTANCE_NORM,
    KINDS,
    OWN_NETWORK,
    RESNET,
    RETINANET,
    SCENARIOS,
    TASK_PLANS,
    WIDE,
    WIDE_PLANS,
    Scenario,
)
from task_tables import write_tables

# ---- preparation (parent process) -----------------------------------------------------------------------------------


def prepare(root: Path, names: Sequence[str], kinds: Sequence[str]) -> None:
    """Plan and preprocess every member, plan small networks with heads, and join them where a teacher is wanted."""
    env = environment(os.environ["NNUNET_KD_DATA"], root, "preprocessed", "shared", 2)
    command = "nnUNetKD_plan_and_preprocess"
    for name in names:
        scenario = SCENARIOS[name]
        configuration, logs = scenario.configuration, root / "logs"
        width, memory = WIDTH[configuration], str(MEMORY_TARGET_GB[configuration])
        for member in scenario.members:
            folder, number = root / "preprocessed" / member, member[7:10]
            if not (folder / f"{BASE_PLANS}.json").is_file():
                base = ["-d", number, "-c", configuration, "-p", BASE_PLANS, "-pl", "ExperimentPlanner"]
                base += ["-gpu_memory_target", memory, "-plans_name", f"{BASE_PLANS}Tasks", "-np", "2", "-npfp", "2"]
                call([command, *base], env, logs / f"prepare_{number}.log")
            write_small_plans(folder, width, BATCH_SIZE)
            small = ["-d", number, "-c", configuration, "-p", SMALL_PLANS, "-plans_name", TASK_PLANS]
            call([command, *small], env, logs / f"small_{number}.log")
            if WIDE in kinds and member in scenario.alternatives.get(WIDE, ()):
                wide = ["-d", number, "-p", TASK_PLANS, "--width", "2", "-plans_name", WIDE_PLANS]
                call(["nnUNetKD_plan_student", *wide], env, logs / f"wide_{number}.log")
        if not {"teacher", "student"}.isdisjoint(kinds):
            ids = [member[7:10] for member in scenario.members]
            joint = ["-d", *ids, "-c", configuration, "-p", SMALL_PLANS, "-plans_name", TASK_PLANS]
            joint += ["--joint", str(scenario.joint), "--width", str(width)]
            call([command, *joint], env, logs / f"joint_{name}.log")


def plan_runs(
    names: Sequence[str], folds: Sequence[int], seeds: Sequence[int], kinds: Sequence[str], variant: str
) -> tuple[list[Run], list[Run]]:
    """Teachers, and everything else, students last."""
    teachers, others, students = [], [], []
    for name in names:
        scenario = SCENARIOS[name]
        for fold in folds:
            for seed in seeds:
                teachers.append(Run(name, "teacher", scenario.members[0], fold, seed))
                others += [Run(name, "control", dataset, fold, seed) for dataset in scenario.students]
                students += [Run(name, "student", dataset, fold, seed, variant) for dataset in scenario.students]
                for kind, datasets in scenario.alternatives.items():
                    others += [Run(name, kind, dataset, fold, seed) for dataset in datasets]
    chosen = [run for run in (*others, *students) if run.kind in kinds]
    return [run for run in teachers if run.kind in kinds], chosen


# ---- one run (child process) ----------------------------------------------------------------------------------------


def run_one(root: Path, run: Run, steps: int, epochs: int, settings: dict) -> None:
    """Train, predict the validation cases, and keep the predictions and what they cost in seconds of the processor."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    start = time.process_time()
    target = root / "predictions" / run.name
    shutil.rmtree(target, ignore_errors=True)
    if run.kind in (RESNET, INSTANCE_NORM, OWN_NETWORK, RETINANET):
        seconds = run_whole_images(run, steps, target / run.dataset)
    else:
        seconds = run_trainer(root, run, steps, epochs, settings, target)
    (root / "runs").mkdir(exist_ok=True)
    cost = {"seconds_training": seconds, "seconds": time.process_time() - start}
    (root / "runs" / f"{run.name}.json").write_text(json.dumps({"run": asdict(run), "steps": steps, **cost}))


def run_whole_images(run: Run, steps: int, target: Path) -> float:
    """Train and predict with one of the networks for whole images; return the seconds that training took."""
    from task_baselines import Budget, WholeImages, run_instance_norm, run_own_network, run_resnet, run_retinanet

    from nnunet_kd.data.member import Member

    member = Member(run.dataset, TASK_PLANS, SCENARIOS[run.scenario].configuration)
    split = json.loads(member.splits_file.read_text())[run.fold]
    images = WholeImages(member, [*split["train"], *split["val"]])
    train = {
        RESNET: run_resnet,
        INSTANCE_NORM: run_instance_norm,
        OWN_NETWORK: run_own_network,
        RETINANET: run_retinanet,
    }[run.kind]
    target.mkdir(parents=True, exist_ok=True)
    return train(images, split, Budget(steps, BATCH_SIZE, run.seed), target)


def run_trainer(root: Path, run: Run, steps: int, epochs: int, settings: dict, target: Path) -> float:
    """Train and validate with the real trainer; return the seconds that training took."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args
    from task_baselines import use_adamw, write_component_boxes

    scenario = SCENARIOS[run.scenario]
    budget = len(scenario.members) if run.kind == "teacher" else 1
    training = {
        "num_epochs": epochs,
        "num_iterations_per_epoch": max(1, round(steps * budget / epochs)),
        "num_val_iterations_per_epoch": 2,
        "seed": run.seed,
        "save_every": 1000,
    }
    if run.kind == "student":
        settings = {**settings, "teachers": {"joint": {"model": str(teacher_folder(root, run))}}}
    else:
        settings = {"budget": "total"} if run.kind == "teacher" else {}
    os.environ["nnUNetKD_settings"] = json.dumps({**settings, "training": training})
    dataset = joint_name(scenario) if run.kind == "teacher" else run.dataset
    plans = {COMPONENTS: SMALL_PLANS, WIDE: WIDE_PLANS}.get(run.kind, TASK_PLANS)
    trainer_name = TRAINERS["control" if run.kind in (ADAMW, WIDE, COMPONENTS) else run.kind]
    device = torch.device("cpu")
    trainer = get_trainer_from_args(dataset, scenario.configuration, run.fold, trainer_name, plans, False, device)
    if run.kind == ADAMW:
        use_adamw(trainer)
    start = time.process_time()
    trainer.run_training()
    seconds = time.process_time() - start
    trainer.inference_allowed_mirroring_axes = None  # eight views of every tile would take longer than training
    trainer.perform_actual_validation(save_probabilities=run.kind == COMPONENTS)
    folder = Path(trainer.output_folder)
    if run.kind == COMPONENTS:
        write_component_boxes(folder / "validation", trainer.dataset_json)
    for member in scenario.students if run.kind == "teacher" else (run.dataset,):
        source = folder / member / "validation" if run.kind == "teacher" else folder / "validation"
        (target / member).mkdir(parents=True, exist_ok=True)
        for file in ("classification.csv", "boxes.json", "summary.json"):
            if (source / file).is_file():
                shutil.copyfile(source / file, target / member / file)
    return seconds


def joint_name(scenario: Scenario) -> str:
    """Full name of the joint dataset."""
    return f"Dataset{scenario.joint}_Joint"


def teacher_folder(root: Path, student: Run) -> Path:
    """The trained model of the teacher that has the student's fold and seed."""
    scenario = SCENARIOS[student.scenario]
    teacher = Run(student.scenario, "teacher", scenario.members[0], student.fold, student.seed)
    model = root / "results" / teacher.name / joint_name(scenario)
    found = next(model.glob(f"{TRAINERS['teacher']}__*__{scenario.configuration}"), None)
    if found is None:
        sys.exit(f"{teacher.name}, the teacher of {student.name}, is not trained; see its log in {root / 'logs'}.")
    return found


# ---- everything -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Parse, prepare, run what is missing, collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="What is trained")
    add_run_arguments(parser, 400)
    add_variant_arguments(parser)
    parser.add_argument("--collect", action="store_true", help="Only write the tables of the finished runs")
    args = parser.parse_args()
    root = args.o.resolve()
    if args.run is not None:
        run_one(root, Run(**json.loads(args.run)), args.steps, args.epochs, json.loads(args.settings))
        return
    need_data()
    if not args.collect:
        prepare(root, args.scenarios, args.kinds)
        for group in plan_runs(args.scenarios, args.folds, args.seeds, args.kinds, args.variant):
            for_each(list(jobs(root, group)), lambda run: start(root, run, args), args.workers)
    write_tables(root, args.scenarios, args.folds, args.seeds)


def start(root: Path, run: Run, args: argparse.Namespace) -> None:
    """One run in a process of its own."""
    env = environment(os.environ["NNUNET_KD_DATA"], root, "preprocessed", run.name, 1)
    start_again(__file__, root, run, ["--settings", args.settings], args, env)


if __name__ == "__main__":
    main()
