"""AdaIN-based adaptation of lung segmentation on real chest x-rays: how much of the gap between domains it closes.

Scenarios (source with labels -> target without): "findings" 306 normal -> 306 tuberculosis; "both" 306 normal -> 307
tuberculosis; "sites" 306 -> 307. Methods: nnU-Net on the source alone, the same with nnU-Net's strongest augmentation
(nnUNetTrainerDA5), AdaIN with the paper's generator and with the planned U-Net, and nnU-Net with the target's labels as
the upper bound. One third of the target is held back and tested; images are halved to 128 x 128 pixels, networks have a
quarter of the planned width. Every method takes the same number of iterations and has the same folds and seeds; one
of AdaIN's has several steps of optimizers. Dice and HD95 (pixels) on the preprocessed grid, without mirroring.

    NNUNET_KD_DATA=.../nnUNet_raw python examples/benchmarks/adain.py -o OUT --folds 0 --seeds 0 1
    NNUNET_KD_DATA=.../nnUNet_raw python examples/benchmarks/adain.py -o OUT --costs
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import real_data
from real_data import MONTGOMERY, SHENZHEN, SMALL_PLANS, Run, environment

NUM_SPLITS, SIZE = 3, 128
METHODS = ("source", "augmented", "stargan", "conditional_unet", "upper")
NAMES = {
    "source": "nnU-Net, source only",
    "augmented": "nnU-Net DA5, source only",
    "stargan": "AdaIN, generator",
    "conditional_unet": "AdaIN, conditional U-Net",
    "upper": "nnU-Net with the target's labels",
}
# the paper's rate is for 40,000 iterations of each stage; a larger one was chosen on fold 1 of "sites", seed 0
SHORT_TRAINING = {"stargan": {"learning_rate": 1e-3}, "conditional_unet": {}}
CODES = {"self": "", "seg": " (without a code)", "two_step": " (two steps)"}
HEALTHY, ILL = "normal", "tuberculosis"


@dataclass(frozen=True)
class Scenario:
    """Datasets, labels of the domains in the classification file (None: all cases), what the upper bound trains on."""

    target: str
    source_label: str | None
    target_label: str | None


SCENARIOS = {
    "findings": Scenario(MONTGOMERY, HEALTHY, ILL),
    "both": Scenario(SHENZHEN, HEALTHY, ILL),
    "sites": Scenario(SHENZHEN, None, None),
}


# ---- preparation ----------------------------------------------------------------------------------------------------


def prepare(root: Path, scenarios: list[str]) -> None:
    """Halved raw datasets with three folds, small stock plans, and plans of every adaptation."""
    for dataset in (MONTGOMERY, SHENZHEN):
        halve(root / "raw" / dataset, dataset)
        write_splits(root, dataset)
        real_data.prepare_dataset(root, dataset, "2d")
    env = environment(root / "raw", root, "preprocessed", "shared", 2)
    for name in scenarios:
        scenario = SCENARIOS[name]
        for network in ("stargan", "conditional_unet"):
            command = ["nnUNetKD_plan_adaptation", "-source", "306", "-target", scenario.target[7:10], "-c", "2d"]
            command += ["-p", SMALL_PLANS, "--network", network, "-plans_name", plans_of(name, network), "-np", "2"]
            for flag, label in (("-source_label", scenario.source_label), ("-target_label", scenario.target_label)):
                command += [] if label is None else [flag, label]
            real_data.call(command, env, root / "logs" / f"plan_{name}_{network}.log")


def plans_of(scenario: str, method: str) -> str:
    """Plans of a method."""
    return f"nnUNetKDPlans_{scenario}_{method}" if method in ("stargan", "conditional_unet") else SMALL_PLANS


def halve(folder: Path, dataset: str) -> None:
    """Write the dataset at half the resolution, where that is missing."""
    from PIL import Image

    raw = Path(os.environ["NNUNET_KD_DATA"]) / dataset
    for kind, filter_ in (("imagesTr", Image.Resampling.BOX), ("labelsTr", Image.Resampling.NEAREST)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for file in sorted((raw / kind).glob("*.png")):
            if not (folder / kind / file.name).is_file():
                Image.open(file).resize((SIZE, SIZE), filter_).save(folder / kind / file.name)
    for name in ("dataset.json", "classification.csv"):
        (folder / name).write_text((raw / name).read_text())


def write_splits(root: Path, dataset: str) -> None:
    """Three folds, so that a third of the cases is held back."""
    file = root / "preprocessed" / dataset / "splits_final.json"
    if file.is_file():
        return
    from sklearn.model_selection import KFold

    cases = sorted(path.name[: -len("_0000.png")] for path in (root / "raw" / dataset / "imagesTr").glob("*.png"))
    folds = KFold(NUM_SPLITS, shuffle=True, random_state=12345).split(cases)
    splits = [{"train": [cases[i] for i in train], "val": [cases[i] for i in val]} for train, val in folds]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(splits, indent=4))


def cases_of(root: Path, dataset: str, fold: int, side: str, label: str | None) -> list[str]:
    """Cases of a fold with a label."""
    splits = json.loads((root / "preprocessed" / dataset / "splits_final.json").read_text())
    with (root / "raw" / dataset / "classification.csv").open(newline="") as file:
        labels = {row["case"]: row["label"] for row in csv.DictReader(file)}
    return [case for case in splits[fold][side] if label is None or labels[case] == label]


# ---- one training or test (child process) ---------------------------------------------------------------------------


def dataset_of(run: Run) -> str:
    """The dataset that a run trains on."""
    return SCENARIOS[run.scenario].target if run.kind == "upper" else MONTGOMERY


def train(root: Path, run: Run, steps: int, epochs: int, settings: dict[str, Any]) -> None:
    """Train with the real trainer."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    scenario, dataset = SCENARIOS[run.scenario], dataset_of(run)
    training = {
        "num_epochs": epochs,
        "num_iterations_per_epoch": max(1, round(steps / epochs)),
        "num_val_iterations_per_epoch": 2,
        "seed": run.seed,
        "save_every": 1000,
    }
    given: dict[str, Any] = {"training": training}
    is_adaptation = run.kind in ("stargan", "conditional_unet")
    if is_adaptation:
        given["adaptation"] = {**SHORT_TRAINING[run.kind], **settings}
    else:
        # the upper bound has the labels of the target's domain, inside one dataset those of the source, too
        label = scenario.source_label if run.kind != "upper" else scenario.target_label
        if run.kind == "upper" and dataset == MONTGOMERY:
            label = None
        given["labeled"] = cases_of(root, dataset, run.fold, "train", label)
    os.environ["nnUNetKD_settings"] = json.dumps(given)
    name = "nnUNetTrainerAdaIN" if is_adaptation else "nnUNetTrainerKDControl"
    plans = plans_of(run.scenario, run.kind)
    trainer = get_trainer_from_args(dataset, "2d", run.fold, name, plans, False, torch.device("cpu"))
    if run.kind == "augmented":
        trainer = with_strong_augmentation(trainer)
    started = time.time()
    trainer.run_training()
    (root / "runs").mkdir(exist_ok=True)
    record = {"run": asdict(run), "steps": steps, "settings": settings, "seconds": time.time() - started}
    (root / "runs" / f"{run.name}.json").write_text(json.dumps(record))


def with_strong_augmentation(trainer: Any) -> Any:
    """The same trainer with the augmentation of nnUNetTrainerDA5, under the name of the control."""
    from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5

    trainer.__class__ = type(type(trainer).__name__, (nnUNetTrainerDA5, type(trainer)), {})
    return trainer


def test(root: Path, run: Run) -> None:
    """Dice and HD95 of the held-back cases of the target, and of the source's where it was trained on."""
    import numpy as np
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_kd.data.domains import target_collection
    from nnunet_kd.data.member import Member
    from nnunet_kd.evaluation.metrics import evaluate_case
    from nnunet_kd.inference.task_codes import choose_prediction

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    scenario, dataset = SCENARIOS[run.scenario], dataset_of(run)
    model = next((root / "results" / run.name / dataset).glob(f"*__{plans_of(run.scenario, run.kind)}__2d"))
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (run.fold,), "checkpoint_final.pth")
    source, target = Member(MONTGOMERY, SMALL_PLANS, "2d"), Member(scenario.target, SMALL_PLANS, "2d")
    # a method that was trained on the source sees images as its plans preprocess them
    folder = target.data_folder
    if scenario.target != MONTGOMERY and run.kind != "upper":
        folder = source.base_folder / target_collection(scenario.target) / source.data_folder.name
    places = [("target", target, folder, scenario.target_label)]
    if run.kind != "upper":
        places.append(("source", source, source.data_folder, scenario.source_label))
    rows = []
    for code in CODES if run.kind in ("stargan", "conditional_unet") else ("self",):
        if run.kind in ("stargan", "conditional_unet"):
            choose_prediction(predictor, code)
        for place, member, images, label in places:
            cases = cases_of(root, member.name, run.fold, "val", label)
            data = source.dataset_class(str(images), cases)
            references = member.dataset_class(str(member.data_folder), cases)
            for case in cases:
                logits = predictor.predict_sliding_window_return_logits(
                    torch.from_numpy(np.asarray(data.load_case(case)[0][:]))
                )
                truth = np.asarray(references.load_case(case)[1][0]).clip(0)
                (score,) = evaluate_case(truth, logits.argmax(0).numpy(), [1], (1.0,) * truth.ndim, 2.0)
                rows.append({"place": place, "case": case, "code": code, **asdict(score)})
    (root / "scores").mkdir(exist_ok=True)
    (root / "scores" / f"{run.name}.json").write_text(json.dumps(rows))


# ---- the table ------------------------------------------------------------------------------------------------------


def collect(root: Path, scenarios: list[str], methods: list[str], folds: list[int], seeds: list[int]) -> None:
    """A table per place and metric, against nnU-Net on the source alone, and the share of the gap that is closed."""
    import pandas as pd

    from nnunet_kd.evaluation.table import summarize, to_markdown, write_table

    rows = []
    for scenario in scenarios:
        for method in methods:
            for fold in folds:
                for seed in seeds:
                    file = root / "scores" / f"{Run(scenario, method, MONTGOMERY, fold, seed).name}.json"
                    for row in json.loads(file.read_text()) if file.is_file() else ():
                        place = {"dataset": f"{scenario}, {row['place']}", "fold": fold, "seed": seed}
                        rows.append({**row, **place, "method": NAMES[method] + CODES[row["code"]]})
    frame = pd.DataFrame(rows)
    if not len(frame) or NAMES["source"] not in set(frame["method"]):
        return
    for metric, title, higher in (("dice", "Dice", True), ("hd95_mm", "HD95 (pixels)", False)):
        table = summarize(frame, NAMES["source"], metric=metric, higher_is_better=higher)
        write_table(table, root / "tables", f"adain_{metric}", metric=title)
        print(to_markdown(table, metric=title).replace("difference to control", "difference to source only"))
        print()
        if metric == "dice":
            print_gaps(table)


def print_gaps(table: Any) -> None:
    """Which part of the way from the source alone to the upper bound each method goes on the target."""
    print("Share of the gap between source only and the target's labels that is closed (Dice):")
    for dataset, own in table.groupby("dataset", sort=False):
        means = own.set_index("method")["mean"]
        if dataset.endswith("target") and NAMES["upper"] in means:
            gap = means[NAMES["upper"]] - means[NAMES["source"]]
            shares = (means - means[NAMES["source"]]) / gap
            listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            print(f"  {dataset} (gap {gap:+.3f}): {listed}")
    print()


# ---- costs ----------------------------------------------------------------------------------------------------------


def measure(root: Path, kind: str, stage: int, steps: int) -> None:
    """Seconds of every step of one trainer, and the memory of this process."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    epochs = {"num_epochs": 2, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1, "seed": 0}
    os.environ["nnUNetKD_settings"] = json.dumps({"training": epochs})
    name = "nnUNetTrainerKDControl" if kind == "source" else "nnUNetTrainerAdaIN"
    trainer = get_trainer_from_args(
        MONTGOMERY, "2d", 0, name, plans_of("sites", kind), False, torch.device("cpu")
    )
    trainer.on_train_start()
    trainer.current_epoch = stage - 1
    trainer.on_train_epoch_start()
    batch, seconds = next(trainer.dataloader_train), []
    for _ in range(steps + 1):
        started = time.perf_counter()
        trainer.train_step(dict(batch))
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("MEASURED " + json.dumps({"seconds": seconds[1:], "memory": peak}))


def print_costs(root: Path, rounds: int, args: argparse.Namespace) -> None:
    """Interleaved rounds, each in a process of its own; medians of the ratio to stock nnU-Net's step of the round."""
    kinds = [("source", 1), ("stargan", 1), ("stargan", 2), ("conditional_unet", 1), ("conditional_unet", 2)]
    measured: dict[tuple[str, int], list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind, stage in kinds:
            env = environment(root / "raw", root, "preprocessed", f"costs_{kind}_{stage}_{number}", 1)
            run = Run("costs", f"{kind}_{stage}", MONTGOMERY, 0, number)
            more = ["--measure", kind, str(stage)]
            real_data.start_again(__file__, root, run, more, args, env)
            lines = (root / "logs" / f"{run.name}.log").read_text().splitlines()
            line = next(line for line in lines if line.startswith("MEASURED"))
            measured[kind, stage].append(json.loads(line.removeprefix("MEASURED ")))
    stock = [statistics.median(own["seconds"]) for own in measured["source", 1]]
    print("| training step | seconds | ratio to stock (range) | peak memory, MB |\n|---|---|---|---|")
    for (kind, stage), own in measured.items():
        seconds = [statistics.median(each["seconds"]) for each in own]
        ratios = sorted(each / base for each, base in zip(seconds, stock, strict=True))
        memory = statistics.median(each["memory"] for each in own)
        name = "stock nnU-Net (control)" if kind == "source" else f"{NAMES[kind]}, stage {stage}"
        print(
            f"| {name} | {statistics.median(seconds):.3f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}) | {memory:.0f} |"
        )


def start(root: Path, run: Run, args: argparse.Namespace, testing: bool) -> None:
    """One training or test in a process of its own."""
    env = environment(root / "raw", root, "preprocessed", run.name, 1)
    more = ["--settings", args.settings, *(["--test"] if testing else [])]
    real_data.start_again(__file__, root, run, more, args, env)


def main() -> None:
    """Parse, prepare, train and test what is missing, collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    real_data.add_run_arguments(parser, 600)
    parser.add_argument("--settings", default="{}", help="Inline JSON for the block 'adaptation'")
    parser.add_argument("--costs", action="store_true", help="Measure steps and memory instead")
    parser.add_argument("--rounds", type=int, default=5, help="Of --costs")
    parser.add_argument("--test", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    root = args.o.resolve()
    if args.measure is not None:
        measure(root, args.measure[0], int(args.measure[1]), 5)
        return
    if args.run is not None:
        run = Run(**json.loads(args.run))
        if args.test:
            test(root, run)
        else:
            train(root, run, args.steps, args.epochs, json.loads(args.settings))
        return
    real_data.need_data()
    prepare(root, args.scenarios)
    if args.costs:
        print_costs(root, args.rounds, args)
        return
    runs = [
        Run(scenario, method, MONTGOMERY, fold, seed)
        for fold in args.folds
        for seed in args.seeds
        for scenario in args.scenarios
        for method in args.methods
    ]
    missing = [run for run in runs if not (root / "runs" / f"{run.name}.json").is_file()]
    real_data.for_each(missing, lambda run: start(root, run, args, testing=False), args.workers)
    untested = [run for run in runs if not (root / "scores" / f"{run.name}.json").is_file()]
    real_data.for_each(untested, lambda run: start(root, run, args, testing=True), args.workers)
    collect(root, args.scenarios, args.methods, args.folds, args.seeds)


if __name__ == "__main__":
    main()
