"""Joint teacher, control and student on real data with small networks: the table of the README.

Scenarios (architecture.md and the issue name them so):
  a  unrelated members (hippocampus MR, nodule CT, glioma FLAIR), 3d_fullres
  b  two sites (chest x-ray, Montgomery and Shenzhen), 2d, each student also tested on the other site
  c  as b, but only 8 cases of Montgomery are labelled
  d  a half-width student of the hippocampus, taught by the teacher of a
  e  a weak teacher: 8 labelled hippocampus cases + nodules, a tenth of the budget
  f  as e, but with half of the budget and members drawn equally: poor instead of useless, which is harder to notice
  g  the teacher of b with aligned members ("alignment": "dann"), against that of b

Every run is a real trainer on a real fold: the same plans, budget, fold and seed for control and student; the teacher's
fold is the student's fold; its budget is the sum of its members' controls (a part of that in e and f). Dice is computed
on the preprocessed grid without test-time mirroring. A finished run is not repeated.

    NNUNET_KD_DATA=.../nnUNet_raw python examples/benchmarks/real_data.py -o OUT --folds 0 1 --seeds 0 1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

HIPPOCAMPUS, NODULE, GLIOMA = "Dataset301_Hippocampus", "Dataset302_LIDCNodule", "Dataset304_LGGFlair3D"
MONTGOMERY, SHENZHEN = "Dataset306_CXRMontgomery", "Dataset307_CXRShenzhen"
MEMORY_TARGET_GB = {"3d_fullres": 0.7, "2d": 0.5}
BASE_PLANS, SMALL_PLANS = "nnUNetPlansBenchmark", "nnUNetPlansSmall"
WIDTH = {"3d_fullres": 0.5, "2d": 0.25}  # of the stock networks, for teachers, controls and students alike
BATCH_SIZE, LABELLED = 2, 8


@dataclass(frozen=True)
class Scenario:
    """Members, who learns, and what is special."""

    configuration: str
    members: tuple[str, ...]
    students: tuple[str, ...]
    few_labels: str | None = None
    teacher_budget: float = 1.0
    sampling_exponent: float = 0.5
    student_width: float = 1.0
    teacher_of: str | None = None
    alignment: str = "none"
    against_teacher_of: str | None = None  # only a teacher is trained, and compared with that one
    control_of: str | None = None
    test_on: dict[str, tuple[str, ...]] = field(default_factory=dict)


BOTH_SITES = dict.fromkeys((MONTGOMERY, SHENZHEN), (MONTGOMERY, SHENZHEN))
SCENARIOS = {
    "a": Scenario("3d_fullres", (HIPPOCAMPUS, NODULE, GLIOMA), (HIPPOCAMPUS, NODULE, GLIOMA)),
    "b": Scenario("2d", (MONTGOMERY, SHENZHEN), (MONTGOMERY, SHENZHEN), test_on=BOTH_SITES),
    "c": Scenario("2d", (MONTGOMERY, SHENZHEN), (MONTGOMERY,), few_labels=MONTGOMERY, test_on=BOTH_SITES),
    "d": Scenario("3d_fullres", (HIPPOCAMPUS, NODULE, GLIOMA), (HIPPOCAMPUS,), student_width=0.5, teacher_of="a"),
    "e": Scenario("3d_fullres", (HIPPOCAMPUS, NODULE), (HIPPOCAMPUS,), few_labels=HIPPOCAMPUS, teacher_budget=0.1),
    "f": Scenario(
        "3d_fullres",
        (HIPPOCAMPUS, NODULE),
        (HIPPOCAMPUS,),
        few_labels=HIPPOCAMPUS,
        teacher_budget=0.5,
        sampling_exponent=0.0,
        control_of="e",
    ),
    "g": Scenario("2d", (MONTGOMERY, SHENZHEN), (MONTGOMERY, SHENZHEN), alignment="dann", against_teacher_of="b"),
}
TRAINERS = {kind: f"nnUNetTrainerKD{kind.capitalize()}" for kind in ("teacher", "control", "student")}


@dataclass(frozen=True)
class Run:
    """One training. ``variant`` names settings of a student that are not the defaults."""

    scenario: str
    kind: str
    dataset: str
    fold: int
    seed: int
    variant: str = ""

    @property
    def name(self) -> str:
        """Folder name of the run."""
        parts = (self.scenario, self.kind + self.variant, self.dataset[7:10], f"f{self.fold}", f"s{self.seed}")
        return "_".join(parts)


# ---- preparation (parent process) -----------------------------------------------------------------------------------


def environment(raw: str | Path, root: Path, preprocessed: str, results: str, threads: int) -> dict[str, str]:
    """Environment of one process."""
    from nnunet_kd.environment import add_trainers_folder

    return {
        **os.environ,
        "nnUNet_raw": str(raw),
        "nnUNet_preprocessed": str(root / preprocessed),
        "nnUNet_results": str(root / "results" / results),
        "nnUNet_extTrainer": add_trainers_folder(os.environ.get("nnUNet_extTrainer", "")),
        "nnUNet_compile": "f",
        "nnUNet_n_proc_DA": "0" if threads == 1 else "2",  # the planner needs a positive number
        "nnUNet_def_n_proc": "2",
        "OMP_NUM_THREADS": str(threads),
        "MPLBACKEND": "Agg",
    }


def call(command: list[str], env: dict[str, str], log: Path) -> None:
    """Run a console command of this interpreter; show the end of its log if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream:
        tool = str(Path(sys.executable).parent / command[0])
        command = [tool, *command[1:]]
        code = subprocess.run(command, env=env, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"{' '.join(command)} failed:\n" + "\n".join(log.read_text().splitlines()[-25:]))


def prepare(root: Path, names: list[str]) -> None:
    """Stock planning and preprocessing, small plans, few-label variants, joint plans."""
    for member in {member for name in names for member in SCENARIOS[name].members}:
        link_raw(root, member)
    for scenario in {SCENARIOS[name].configuration: SCENARIOS[name] for name in names}.values():
        configuration = scenario.configuration
        alike = [SCENARIOS[name] for name in names if SCENARIOS[name].configuration == configuration]
        members = sorted({member for other in alike for member in other.members})
        for member in members:
            prepare_dataset(root, member, configuration)
    for name in names:
        scenario = SCENARIOS[name]
        if scenario.teacher_of is not None:
            continue
        if scenario.few_labels is not None:
            link_members(root, name, scenario)
        env = environment(root / "raw", root, preprocessed_folder(name), "shared", 2)
        ids = [member[7:10] for member in scenario.members]
        command = ["nnUNetKD_plan_and_preprocess", "-d", *ids, "--joint", joint_id(name), "-p", SMALL_PLANS]
        command += ["-c", scenario.configuration, "--width", str(WIDTH[scenario.configuration])]
        call(command, env, root / "logs" / f"joint_{name}.log")
        if scenario.few_labels is not None:
            keep_few_labels(root / preprocessed_folder(name), scenario.few_labels)
            call(command, env, root / "logs" / f"joint_{name}_few.log")
    if "d" in names:
        env = environment(root / "raw", root, "preprocessed", "shared", 2)
        command = ["nnUNetKD_plan_student", "-d", HIPPOCAMPUS[7:10], "-p", SMALL_PLANS, "--width", "0.5"]
        call([*command, "--min_features", "4", "-plans_name", student_plans("d")], env, root / "logs" / "student_d.log")


def prepare_dataset(root: Path, dataset: str, configuration: str) -> None:
    """Stock planning and preprocessing of a dataset in ``root / "raw"``, where that is missing, and small plans."""
    folder = root / "preprocessed" / dataset
    if not (folder / f"{BASE_PLANS}.json").is_file():
        env, number = environment(root / "raw", root, "preprocessed", "shared", 2), dataset[7:10]
        command = ["nnUNetv2_plan_and_preprocess", "-d", number, "-c", configuration, "-np", "2", "-npfp", "2"]
        command += ["-gpu_memory_target", str(MEMORY_TARGET_GB[configuration]), "-overwrite_plans_name", BASE_PLANS]
        call(command, env, root / "logs" / f"prepare_{number}.log")
    write_small_plans(folder, WIDTH[configuration])


def joint_id(scenario: str) -> str:
    """Joint dataset of a scenario."""
    return str(900 + "abcdefg".index(SCENARIOS[scenario].teacher_of or scenario))


def preprocessed_folder(scenario: str) -> str:
    """Folder with the splits of a scenario."""
    return "preprocessed" if SCENARIOS[scenario].few_labels is None else f"preprocessed_{scenario}"


def student_plans(scenario: str) -> str:
    """Plans of a scenario's students."""
    return SMALL_PLANS if SCENARIOS[scenario].student_width == 1 else "nnUNetKDPlansHalf"


def link_raw(root: Path, member: str) -> None:
    """A raw folder that shares the images but declares segmentation alone; tasks.py measures classes and boxes."""
    source, target = Path(os.environ["NNUNET_KD_DATA"]) / member, root / "raw" / member
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        if entry.name != "dataset.json" and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    description = json.loads((source / "dataset.json").read_text())
    if "nnunet_kd" in description:
        description["nnunet_kd"]["tasks"] = {"segmentation": True}
    (target / "dataset.json").write_text(json.dumps(description, indent=4))


def write_small_plans(folder: Path, width: float, batch_size: int = BATCH_SIZE) -> None:
    """The stock plans with narrow networks and small batches, which a CPU can train."""
    from nnunet_kd.networks.width import scale_width

    plans = json.loads((folder / f"{BASE_PLANS}.json").read_text())
    plans["plans_name"] = SMALL_PLANS
    for configuration in plans["configurations"].values():
        if "architecture" in configuration:
            configuration["architecture"] = scale_width(configuration["architecture"], width, 8)
            configuration["batch_size"] = batch_size
    (folder / f"{SMALL_PLANS}.json").write_text(json.dumps(plans, indent=4))


def link_members(root: Path, name: str, scenario: Scenario) -> None:
    """A preprocessed folder that shares the images but has splits of its own."""
    for member in scenario.members:
        source, target = root / "preprocessed" / member, root / preprocessed_folder(name) / member
        target.mkdir(parents=True, exist_ok=True)
        for entry in source.iterdir():
            if entry.is_dir() and not (target / entry.name).exists():
                (target / entry.name).symlink_to(entry, target_is_directory=True)
            elif entry.suffix == ".json" and not entry.name.startswith(("nnUNetKD", "splits_final")):
                shutil.copy(entry, target / entry.name)


def keep_few_labels(preprocessed: Path, member: str) -> None:
    """Keep 8 training cases per fold, every n-th of the sorted ones; validation stays."""
    file = preprocessed / member / "splits_final.json"
    splits = json.loads(file.read_text())
    for split in splits:
        cases = sorted(split["train"])
        split["train"] = cases[:: max(1, len(cases) // LABELLED)][:LABELLED]
    file.write_text(json.dumps(splits, indent=4))


def plan_runs(names: list[str], folds: list[int], seeds: list[int], variant: str) -> tuple[list[Run], list[Run]]:
    """Teachers, and what depends on them."""
    teachers, others = [], []
    for name in names:
        scenario = SCENARIOS[name]
        for fold in folds:
            for seed in seeds:
                teacher = Run(scenario.teacher_of or name, "teacher", scenario.members[0], fold, seed)
                if teacher not in teachers:
                    teachers.append(teacher)
                for dataset in () if scenario.against_teacher_of else scenario.students:
                    control = Run(scenario.control_of or name, "control", dataset, fold, seed)
                    if control not in others:
                        others.append(control)
                    others.append(Run(name, "student", dataset, fold, seed, variant))
    return teachers, others


# ---- one run (child process) ----------------------------------------------------------------------------------------


def train_and_test(root: Path, run: Run, steps: int, epochs: int, settings: dict) -> None:
    """Train with the real trainer, test on its validation cases, write per-case rows."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    scenario = SCENARIOS[run.scenario]
    budget = scenario.teacher_budget * len(scenario.members) if run.kind == "teacher" else 1.0
    training = {
        "num_epochs": epochs,
        "num_iterations_per_epoch": max(1, round(steps * budget / epochs)),
        "num_val_iterations_per_epoch": 2,
        "seed": run.seed,
        "save_every": 1000,
    }
    if run.kind == "student":
        teacher = Run(scenario.teacher_of or run.scenario, "teacher", scenario.members[0], run.fold, run.seed)
        model = root / "results" / teacher.name / joint_name(run.scenario)
        folder = next(model.glob(f"nnUNetTrainerKDTeacher__*__{scenario.configuration}"))
        settings = {**settings, "teachers": {"joint": {"model": str(folder)}}}
    else:
        settings = {
            "budget": "total",
            "sampling_exponent": scenario.sampling_exponent,
            "alignment": scenario.alignment,
        }
    os.environ["nnUNetKD_settings"] = json.dumps({**settings, "training": training})
    dataset = joint_name(run.scenario) if run.kind == "teacher" else run.dataset
    plans = "nnUNetKDPlans" if run.kind == "teacher" else student_plans(run.scenario)
    trainer = get_trainer_from_args(
        dataset, scenario.configuration, run.fold, TRAINERS[run.kind], plans, False, torch.device("cpu")
    )
    trainer.run_training()
    rows = []
    if run.kind == "teacher":
        for member in scenario.members:
            trainer.joint_network.select(member)
            with trainer.speaking_for(member):
                rows += test(trainer, member, member)
    else:
        for other in scenario.test_on.get(run.dataset, (run.dataset,)):
            rows += test(trainer, run.dataset, other)
    (root / "runs").mkdir(exist_ok=True)
    (root / "runs" / f"{run.name}.json").write_text(json.dumps({"run": asdict(run), "steps": steps, "rows": rows}))


def joint_name(scenario: str) -> str:
    """Full name of the joint dataset."""
    return f"Dataset{joint_id(scenario)}_Joint"


def test(trainer: object, dataset: str, tested_on: str) -> list[dict]:
    """Dice of every validation case of ``tested_on`` on the preprocessed grid, without mirroring."""
    import numpy as np
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_kd.data.member import Member
    from nnunet_kd.evaluation.metrics import dice

    other = Member(tested_on, trainer.plans_manager.plans_name, trainer.configuration_name)
    if dataset == tested_on:
        cases, folder = trainer.do_split()[1], trainer.preprocessed_dataset_folder
    else:
        splits = json.loads(other.splits_file.read_text())
        cases, folder = splits[trainer.fold]["val"], str(Member(tested_on, SMALL_PLANS, "2d").data_folder)
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json, "", None
    )
    labels = {name: value for name, value in trainer.dataset_json["labels"].items() if value}
    data = trainer.dataset_class(folder, list(cases))
    rows = []
    for case in cases:
        image, reference, _, _ = data.load_case(case)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.asarray(image[:])))
        scores = dice(np.asarray(reference[0]).clip(0), logits.argmax(0).numpy(), list(labels.values()))
        rows += [
            {"tested_on": tested_on, "case": case, "class": name, "dice": float(value)}
            for name, value in zip(labels, scores, strict=True)
        ]
    trainer.set_deep_supervision_enabled(True)
    return rows


# ---- the table ------------------------------------------------------------------------------------------------------


def collect(root: Path, names: list[str], folds: list[int], seeds: list[int]) -> None:
    """Put all finished runs into one table."""
    import pandas as pd

    from nnunet_kd.evaluation.table import summarize, to_markdown, write_table

    rows = []
    for file in sorted((root / "runs").glob("*.json")):
        content = json.loads(file.read_text())
        run = Run(**content["run"])
        if run.fold not in folds or run.seed not in seeds:
            continue
        for name in names:
            scenario = SCENARIOS[name]
            other_teacher = scenario.teacher_of or scenario.against_teacher_of
            borrowed = {"teacher": other_teacher, "control": scenario.control_of}.get(run.kind)
            if run.scenario not in (name, borrowed):
                continue
            for row in content["rows"]:
                if run.kind == "teacher" and row["tested_on"] not in (*scenario.students, *scenario.test_on):
                    continue
                trained = run.dataset if run.kind != "teacher" else None
                for student in scenario.students if trained is None else (trained,):
                    if trained is None and row["tested_on"] not in scenario.test_on.get(student, (student,)):
                        continue
                    where = "" if row["tested_on"] == student else f", tested on {row['tested_on'][7:10]}"
                    rows.append(
                        {
                            "dataset": f"({name}) {student[7:10]}{where}",
                            "method": method_name(run, scenario),
                            "fold": run.fold,
                            "seed": run.seed,
                            **{key: row[key] for key in ("case", "class", "dice")},
                        }
                    )
    frame = pd.DataFrame(rows).sort_values("dataset", kind="stable")
    frame.to_csv(root / "cases.csv", index=False)
    alone = frame["dataset"].str[1].isin([name for name in names if SCENARIOS[name].against_teacher_of])
    parts = [(frame[~alone], "control"), (frame[alone], "teacher head")]
    table = pd.concat([summarize(part, against) for part, against in parts if len(part)], ignore_index=True)
    write_table(table, root)
    print(to_markdown(table))


def method_name(run: Run, scenario: Scenario) -> str:
    """A run's method in the table."""
    if run.kind != "teacher":
        return run.kind + run.variant
    aligned = SCENARIOS[run.scenario].alignment
    return "teacher head" + (f", {aligned}" if scenario.against_teacher_of and aligned != "none" else "")


# ---- what all benchmarks on real data share --------------------------------------------------------------------------


def add_run_arguments(parser: argparse.ArgumentParser, steps: int) -> None:
    """Where, which folds and seeds, and the budget; ``steps`` is its default."""
    parser.add_argument("-o", type=Path, required=True, help="Folder for everything; finished runs are not repeated")
    parser.add_argument("--folds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=steps, help="Training steps of everything but a joint teacher")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2, help="Runs at the same time, one thread each")
    parser.add_argument("--run", default=None, help=argparse.SUPPRESS)


def add_variant_arguments(parser: argparse.ArgumentParser) -> None:
    """Other settings of the students, and their name."""
    parser.add_argument("--settings", default="{}", help="Inline JSON for the students, for trying other terms")
    parser.add_argument("--variant", default="", help="Name of these settings in the table")


def need_data() -> None:
    """Stop where it is not said where the real data is."""
    if "NNUNET_KD_DATA" not in os.environ:
        sys.exit("Set NNUNET_KD_DATA to the nnUNet_raw folder with the real data.")


def for_each(runs: list[Run], action: Callable[[Run], None], workers: int) -> None:
    """Call ``action`` for every run, some at the same time."""
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(action, runs))


def start_again(
    script: str, root: Path, run: Run, more: list[str], args: argparse.Namespace, env: dict[str, str]
) -> None:
    """Call ``script`` in a process of its own for one run; a failure is reported and does not stop the others."""
    log = root / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, script, "-o", str(root), "--run", json.dumps(asdict(run)), "--steps", str(args.steps)]
    command += ["--epochs", str(args.epochs), *more]
    with log.open("w") as stream:
        code = subprocess.run(command, env=env, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    print(f"{run.name}: {'done' if code == 0 else f'FAILED, see {log}'}", flush=True)


def jobs(root: Path, runs: list[Run]) -> Iterator[Run]:
    """Runs that are not finished."""
    for run in runs:
        if not (root / "runs" / f"{run.name}.json").is_file():
            yield run


def main() -> None:
    """Parse, prepare, run what is missing, collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    add_run_arguments(parser, 600)
    add_variant_arguments(parser)
    args = parser.parse_args()
    root = args.o.resolve()
    if args.run is not None:
        train_and_test(root, Run(**json.loads(args.run)), args.steps, args.epochs, json.loads(args.settings))
        return
    need_data()
    prepare(root, args.scenarios)
    for group in plan_runs(args.scenarios, args.folds, args.seeds, args.variant):
        for_each(list(jobs(root, group)), lambda run: start(root, run, args), args.workers)
    collect(root, args.scenarios, args.folds, args.seeds)


def start(root: Path, run: Run, args: argparse.Namespace) -> None:
    """One run in a process of its own."""
    env = environment(root / "raw", root, preprocessed_folder(run.scenario), run.name, 1)
    start_again(__file__, root, run, ["--settings", args.settings], args, env)


if __name__ == "__main__":
    main()
