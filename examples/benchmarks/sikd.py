"""Shape-intensity distillation (SIKD) on real data: intra-dataset, cross-dataset, and together with the joint teacher.

Every method is trained with the plans, budget, fold and seed of its control; that of the paper's recipe has its loss,
cross entropy. Inside a dataset the validation cases of the fold are tested. Across datasets (chest x-rays of Montgomery
and Shenzhen) it is all cases of the other one; where the joint teacher takes part, which has seen the labelled training
cases of both, it is the other one's validation cases of the fold. Dice, HD95 and NSD are those of the preprocessed
grid, without mirroring. Controls and joint students of 306, 307 and 301 are those of real_data.py, which trains them
if they are missing in OUT.

    NNUNET_KD_DATA=.../nnUNet_raw python examples/benchmarks/sikd.py -o OUT --datasets 306 307 --folds 0 1 --seeds 0 1
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import real_data
from real_data import HIPPOCAMPUS, MONTGOMERY, SCENARIOS, SHENZHEN, SMALL_PLANS, Run, environment
from task_scenarios import LIVER

DATASETS = {name[7:10]: name for name in (MONTGOMERY, SHENZHEN, HIPPOCAMPUS, LIVER)}
CONFIGURATION = {MONTGOMERY: "2d", SHENZHEN: "2d", LIVER: "2d", HIPPOCAMPUS: "3d_fullres"}
JOINT_SCENARIO = {MONTGOMERY: "b", SHENZHEN: "b", HIPPOCAMPUS: "a"}
OTHER = {MONTGOMERY: SHENZHEN, SHENZHEN: MONTGOMERY}
SHAPE_TERM = {"teacher": "shape", "on": "features", "loss": "mse", "levels": ["decoder@1"], "weight": 2.0}
JOINT_TERMS = [
    {"teacher": "joint", "on": "logits", "loss": "kl", "temperature": 4.0, "weight": 1.0},
    {"teacher": "joint", "on": "features", "loss": "mse", "levels": ["bottleneck", "decoder@1/2"], "weight": 15.0},
]
METHODS = ("control", "sikd", "control_ce", "paper", "joint", "both")
NAMES = {
    "control": "control",
    "control_ce": "control, cross entropy",
    "sikd": "SIKD student",
    "paper": "SIKD student, paper's recipe",
    "joint": "joint student",
    "both": "joint + SIKD student",
}
JOINT_METHODS = ("joint", "both")
COMPARISONS = (  # a control, what is compared with it, and whether the joint teacher takes part
    ("control", ("sikd",), False),
    ("control_ce", ("paper",), False),
    ("control", ("sikd", "joint", "both"), True),
    ("sikd", ("both",), True),
    ("joint", ("both",), True),
)
TOLERANCE_MM = {"2d": 2.0, "3d_fullres": 1.0}


def prepare(root: Path, datasets: list[str]) -> None:
    """Plans and preprocessed data of every dataset, and the joint plans where there is a joint teacher."""
    scenarios = sorted({JOINT_SCENARIO[dataset] for dataset in datasets if dataset in JOINT_SCENARIO})
    if scenarios:
        real_data.prepare(root, scenarios)
    if LIVER in datasets:
        real_data.link_raw(root, LIVER)
        real_data.prepare_dataset(root, LIVER, "2d")


def run_of(method: str, dataset: str, fold: int, seed: int, weight: float, level: str) -> Run:
    """The training of a method; those that real_data.py has too are its own."""
    variant = ""
    if method in ("sikd", "both"):
        variant += f"W{weight:g}" if weight != SHAPE_TERM["weight"] else ""
        variant += "".join(filter(str.isalnum, level)) if [level] != SHAPE_TERM["levels"] else ""
    joint = JOINT_SCENARIO.get(dataset, "s")
    if method in ("control", "joint"):
        return Run(joint, "control" if method == "control" else "student", dataset, fold, seed)
    return Run("s", method, dataset, fold, seed, variant)


def folder_of(root: Path, run: Run) -> Path:
    """Model folder of a training."""
    return next((root / "results" / run.name / run.dataset).glob(f"*__{SMALL_PLANS}__{CONFIGURATION[run.dataset]}"))


def plan_runs(
    datasets: list[str], methods: list[str], folds: list[int], seeds: list[int], weight: float, level: str
) -> list[list[Run]]:
    """Trainings in three groups that depend on those before them: teachers, joint teachers too; the rest."""
    teachers, others = [], []
    for dataset in datasets:
        for fold in folds:
            for seed in seeds:
                if {"sikd", "both"} & set(methods):
                    teachers.append(Run("s", "shape", dataset, fold, seed))
                if "paper" in methods:
                    teachers.append(Run("s", "shapepaper", dataset, fold, seed))
                if set(JOINT_METHODS) & set(methods) and dataset in JOINT_SCENARIO:
                    scenario = JOINT_SCENARIO[dataset]
                    teachers.append(Run(scenario, "teacher", SCENARIOS[scenario].members[0], fold, seed))
                for method in methods:
                    if dataset in JOINT_SCENARIO or method not in JOINT_METHODS:
                        others.append(run_of(method, dataset, fold, seed, weight, level))
    return [list(dict.fromkeys(teachers)), others]


# ---- one training or test (child process) ---------------------------------------------------------------------------


def settings_of(root: Path, run: Run, steps: int, epochs: int, weight: float, level: str) -> tuple[str, dict[str, Any]]:
    """Trainer and settings of a training that real_data.py does not have."""
    training: dict[str, Any] = {
        "num_epochs": epochs,
        "num_iterations_per_epoch": max(1, round(steps / epochs)),
        "num_val_iterations_per_epoch": 2,
        "seed": run.seed,
        "save_every": 1000,
    }
    if run.kind == "control_ce":
        training["loss"] = "ce"
    recipe = "paper" if run.kind in ("paper", "shapepaper") else "nnunet"
    settings: dict[str, Any] = {"training": training, "sikd": {"recipe": recipe}}
    if run.kind in ("shape", "shapepaper"):
        return "nnUNetTrainerSIKDTeacher", settings
    if run.kind in ("control", "control_ce"):
        return "nnUNetTrainerKDControl", settings
    shape = Run("s", "shapepaper" if run.kind == "paper" else "shape", run.dataset, run.fold, run.seed)
    settings["teachers"] = {"shape": {"kind": "class_average", "model": str(folder_of(root, shape))}}
    if run.kind == "paper":
        return "nnUNetTrainerSIKDStudent", settings
    settings["terms"] = [{**SHAPE_TERM, "weight": weight, "levels": [level]}]
    if run.kind == "both":
        scenario = SCENARIOS[JOINT_SCENARIO[run.dataset]]
        teacher = Run(JOINT_SCENARIO[run.dataset], "teacher", scenario.members[0], run.fold, run.seed)
        models = (root / "results" / teacher.name).glob("Dataset*/nnUNetTrainerKDTeacher__*")
        settings["teachers"]["joint"] = {"model": str(next(models))}
        settings["terms"] += JOINT_TERMS
    return "nnUNetTrainerSIKDStudent", settings


def train(root: Path, run: Run, steps: int, epochs: int, weight: float, level: str) -> None:
    """Train with the real trainer."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    trainer_name, settings = settings_of(root, run, steps, epochs, weight, level)
    os.environ["nnUNetKD_settings"] = json.dumps(settings)
    trainer = get_trainer_from_args(
        run.dataset, CONFIGURATION[run.dataset], run.fold, trainer_name, SMALL_PLANS, False, torch.device("cpu")
    )
    trainer.run_training()
    (root / "runs").mkdir(exist_ok=True)
    (root / "runs" / f"{run.name}.json").write_text(json.dumps({"run": asdict(run), "steps": steps, "rows": []}))


def test(root: Path, run: Run) -> None:
    """Dice, HD95 and NSD of every class in the validation cases, and in all cases of the other dataset."""
    import numpy as np
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_kd.data.member import Member
    from nnunet_kd.evaluation.metrics import evaluate_case

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    configuration = CONFIGURATION[run.dataset]
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder_of(root, run)), (run.fold,), "checkpoint_final.pth")
    rows = []
    for dataset in (run.dataset, *(OTHER[name] for name in (run.dataset,) if name in OTHER)):
        member = Member(dataset, SMALL_PLANS, configuration)
        own = json.loads(member.splits_file.read_text())[run.fold]["val"]
        data = member.dataset_class(str(member.data_folder))
        labels = {name: value for name, value in member.dataset_json["labels"].items() if value}
        unseen = dataset != run.dataset and run.kind not in JOINT_METHODS and run.kind != "student"
        for case in member.identifiers if unseen else own:
            image, reference, _, _ = data.load_case(case)
            logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.asarray(image[:])))
            truth, prediction = np.asarray(reference[0]).clip(0), logits.argmax(0).numpy()
            spacing = (1.0,) * (truth.ndim - len(member.configuration_manager.spacing))
            spacing += tuple(member.configuration_manager.spacing)
            scores = evaluate_case(truth, prediction, list(labels.values()), spacing, TOLERANCE_MM[configuration])
            rows += [
                {"tested_on": dataset, "case": case, "held_out": case in own, "class": name, **asdict(score)}
                for name, score in zip(labels, scores, strict=True)
            ]
    (root / "sikd").mkdir(exist_ok=True)
    (root / "sikd" / f"{run.name}.json").write_text(json.dumps(rows))


# ---- the table ------------------------------------------------------------------------------------------------------


def collect(root: Path, datasets: list[str], folds: list[int], seeds: list[int], weight: float, level: str) -> None:
    """One table per metric and comparison."""
    import pandas as pd

    from nnunet_kd.evaluation.table import summarize, to_markdown, write_table

    for control, others, joint in COMPARISONS:
        rows = []
        for dataset, method, fold, seed in itertools.product(datasets, (control, *others), folds, seeds):
            file = root / "sikd" / f"{run_of(method, dataset, fold, seed, weight, level).name}.json"
            for row in json.loads(file.read_text()) if file.is_file() else ():
                across = row["tested_on"] != dataset
                if joint and not row["held_out"]:
                    continue
                which = "validation cases" if joint else "all"
                where = f", {which} of {row['tested_on'][7:10]}" if across else ""
                place = {"dataset": dataset[7:10] + where, "method": NAMES[method], "fold": fold, "seed": seed}
                rows.append({**row, **place})
        frame = pd.DataFrame(rows)
        if not len(frame) or frame["method"].nunique() < 2 or NAMES[control] not in set(frame["method"]):
            continue
        name = f"{control}_against_{'_'.join(others)}"
        for metric, title, higher in (("dice", "Dice", True), ("hd95_mm", "HD95 (mm)", False), ("nsd", "NSD", True)):
            table = summarize(frame, NAMES[control], metric=metric, higher_is_better=higher)
            write_table(table, root / "sikd", f"{name}_{metric}", metric=title)
            print(to_markdown(table, metric=title).replace("difference to control", f"difference to {NAMES[control]}"))
            print()


def start(root: Path, run: Run, args: argparse.Namespace, testing: bool) -> None:
    """One training or test in a process of its own."""
    if run.scenario != "s" and not testing:
        real_data.start(root, run, args)
        return
    env = environment(root / "raw", root, "preprocessed", run.name, 1)
    more = ["--weight", str(args.weight), "--level", args.level, *(["--test"] if testing else [])]
    real_data.start_again(__file__, root, run, more, args, env)


def refuse_other_budget(root: Path, runs: list[Run], steps: int) -> None:
    """Stop where a finished run had other steps."""
    for run in runs:
        file = root / "runs" / f"{run.name}.json"
        recorded = json.loads(file.read_text())["steps"] if file.is_file() else steps
        if recorded != steps:
            sys.exit(f"{file} was trained for {recorded} steps. Choose another -o, or --steps {recorded}.")


def main() -> None:
    """Parse, prepare, train and test what is missing, collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=list(DATASETS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    real_data.add_run_arguments(parser, 600)
    parser.add_argument("--weight", type=float, default=2.0, help="Weight of SIKD's term in nnU-Net's recipe")
    parser.add_argument("--level", default=SHAPE_TERM["levels"][0], help="Of the features in nnU-Net's recipe")
    parser.add_argument("--test", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.settings = "{}"
    root = args.o.resolve()
    if args.run is not None:
        run = Run(**json.loads(args.run))
        if args.test:
            test(root, run)
        else:
            train(root, run, args.steps, args.epochs, args.weight, args.level)
        return
    real_data.need_data()
    datasets = [DATASETS[number] for number in args.datasets]
    prepare(root, datasets)
    groups = plan_runs(datasets, args.methods, args.folds, args.seeds, args.weight, args.level)
    refuse_other_budget(root, [run for group in groups for run in group], args.steps)
    for group in groups:
        missing = list(real_data.jobs(root, group))
        real_data.for_each(missing, lambda run: start(root, run, args, testing=False), args.workers)
    untested = [run for run in groups[-1] if not (root / "sikd" / f"{run.name}.json").is_file()]
    real_data.for_each(untested, lambda run: start(root, run, args, testing=True), args.workers)
    collect(root, datasets, args.folds, args.seeds, args.weight, args.level)


if __name__ == "__main__":
    main()
