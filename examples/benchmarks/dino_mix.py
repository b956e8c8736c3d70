"""Semi-supervised training (DINO-Mix) on real data and on the synthetic organs of the demo.

A few training cases keep their labels, the others are unlabelled. The control is trained on the labelled ones alone,
with the same plans, budget, fold and seed; its batch is twice their labelled part, so that there is a second control
with as many labelled patches as they have. Mean teacher is DINO-Mix without its two contributions; "+ PIC" adds the
progressive imbalance-aware CutMix, "+ FKD" the foundation teacher, "DINO-Mix" has both. Without --foundation the
foundation teacher is a vision transformer with RANDOM weights. Dice of the validation cases is computed on the
preprocessed grid without mirroring; the tail class is the one with the fewest voxels in the dataset. Where a CPU is
too slow for volumes, -c 2d trains all tasks on slices; an OUT has one configuration, batch and foundation size.

    NNUNET_KD_DATA=.../nnUNet_raw python examples/benchmarks/dino_mix.py -o OUT --tasks 301@3 301@10 --folds 0 --seeds 0
    ... -o OUT2D -c 2d --batch_size 8 --foundation_size 112 --folds 0 1 --seeds 0 1
    python examples/benchmarks/dino_mix.py -o OUT --costs      # seconds per step against the control, interleaved
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import real_data
from real_data import HIPPOCAMPUS, NODULE, SMALL_PLANS, Run, environment
from task_scenarios import LIVER

from nnunet_kd.demo.organs import DATASET as ORGANS
from nnunet_kd.demo.organs import write_organs

CONFIGURATION = {HIPPOCAMPUS: "3d_fullres", NODULE: "3d_fullres", LIVER: "2d", ORGANS: "3d_fullres"}
TASKS = {"301@3": HIPPOCAMPUS, "301@10": HIPPOCAMPUS, "322@5": LIVER, "302@5": NODULE, "974@10": ORGANS}
METHODS: dict[str, dict[str, bool] | None] = {
    "control": None,
    "control_half": None,
    "mean_teacher": {"cutmix": False, "foundation": False},
    "pic": {"cutmix": True, "foundation": False},
    "fkd": {"cutmix": False, "foundation": True},
    "full": {"cutmix": True, "foundation": True},
}
NAMES = {"control": "control (labelled only)", "mean_teacher": "mean teacher", "pic": "+ PIC", "fkd": "+ FKD"}
NAMES |= {"full": "DINO-Mix", "control_half": "control, as many labelled patches"}
DECAY = 0.99  # of the moving average: these trainings are shorter than the 1,000 steps that the default looks back
ORGANS_WIDTH = 0.5  # a quarter of the width did not find the small organ in 1,600 steps with all labels
NUM_TIMED, NUM_WARM = 9, 2


def prepare(root: Path, tasks: list[str], configuration: str | None, batch_size: int) -> None:
    """Plans and preprocessed data of every dataset."""
    for dataset in dict.fromkeys(TASKS[task] for task in tasks):
        if dataset == ORGANS:
            write_organs(root / "raw")
        else:
            real_data.need_data()
            real_data.link_raw(root, dataset)
        own = configuration or CONFIGURATION[dataset]
        real_data.prepare_dataset(root, dataset, own)
        width = ORGANS_WIDTH if dataset == ORGANS else real_data.WIDTH[own]
        real_data.write_small_plans(root / "preprocessed" / dataset, width, batch_size)


def keep_options(root: Path, options: dict[str, Any]) -> None:
    """Stop where runs in OUT have other options."""
    file = root / "options.json"
    if file.is_file() and json.loads(file.read_text()) != options:
        sys.exit(f"{root} has runs with {file.read_text()}, not {json.dumps(options)}. Choose another -o.")
    root.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(options))


def run_of(task: str, method: str, fold: int, seed: int) -> Run:
    """The training of a method."""
    return Run(f"semi{task.partition('@')[2]}", method, TASKS[task], fold, seed)


def settings_of(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Settings of a training; the seed also draws the labelled cases."""
    training = {
        "num_epochs": args.epochs,
        "num_iterations_per_epoch": max(1, round(args.steps / args.epochs)),
        "num_val_iterations_per_epoch": 2,
        "seed": run.seed,
        "save_every": 1000,
    }
    labeled = {"fraction": int(run.scenario.removeprefix("semi")) / 100, "seed": run.seed}
    parts = METHODS[run.kind]
    if parts is None:
        return {"training": training, "labeled": labeled}
    weights = {"pretrained": False} if args.foundation is None else {"weights": str(args.foundation)}
    foundation = {**weights, "size": args.foundation_size, "cache": args.cache}
    teachers = {"foundation": {"foundation": foundation}, "ema": {"decay": DECAY}}
    own = {**json.loads(args.settings), **parts}
    return {"training": training, "labeled": labeled, "dino_mix": own, "teachers": teachers}


def make_trainer(run: Run, args: argparse.Namespace) -> Any:
    """The real trainer."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    os.environ["nnUNetKD_settings"] = json.dumps(settings_of(run, args))
    name = "nnUNetTrainerDINOMix" if METHODS[run.kind] else "nnUNetTrainerKDControl"
    configuration = args.c or CONFIGURATION[run.dataset]
    return get_trainer_from_args(run.dataset, configuration, run.fold, name, SMALL_PLANS, False, torch.device("cpu"))


def train_and_test(root: Path, run: Run, args: argparse.Namespace) -> None:
    """Train, test on the validation cases, write per-case rows."""
    trainer = make_trainer(run, args)
    trainer.initialize()
    if run.kind == "control_half":
        halve_batch(trainer)
    trainer.run_training()
    rows = real_data.test(trainer, run.dataset, run.dataset)
    labeled, (training, validation) = trainer.do_split()[0], trainer.fold_split()
    tail = tail_class(trainer, [*training, *validation])
    content = {"run": asdict(run), "steps": args.steps, "labeled": labeled, "tail": tail}
    (root / "runs").mkdir(exist_ok=True)
    file = root / "runs" / f"{run.name}.json"
    file.write_text(json.dumps({**content, "foundation": str(args.foundation), "rows": rows}))


def halve_batch(trainer: Any) -> None:
    """As many labelled patches as the methods have, with the same share of forced foreground, by chance as theirs."""
    size, share = trainer.batch_size, trainer.oversample_foreground_percent
    trainer.oversample_foreground_percent = 1 - round(size * (1 - share)) / size
    trainer.probabilistic_oversampling = True
    trainer.batch_size = size // 2


def tail_class(trainer: Any, cases: list[str]) -> str:
    """The class with the fewest voxels in the cases."""
    import numpy as np

    names = {value: name for name, value in trainer.dataset_json["labels"].items() if value}
    counts = dict.fromkeys(names, 0)
    data = trainer.dataset_class(trainer.preprocessed_dataset_folder, cases)
    for case in cases:
        segmentation = np.asarray(data.load_case(case)[1][:])
        for value in names:
            counts[value] += int((segmentation == value).sum())
    return names[min(counts, key=lambda value: counts[value])]


def collect(root: Path, tasks: list[str], folds: list[int], seeds: list[int]) -> None:
    """Tables against either control: all classes of a dataset together, then each class."""
    import pandas as pd

    from nnunet_kd.evaluation.table import summarize, to_markdown, write_table

    rows = []
    for task in tasks:
        for method in METHODS:
            for fold in folds:
                for seed in seeds:
                    file = root / "runs" / f"{run_of(task, method, fold, seed).name}.json"
                    content = json.loads(file.read_text()) if file.is_file() else {"rows": [], "tail": ""}
                    number, _, percent = task.partition("@")
                    title = f"{number}, {percent} % labelled"
                    classes = {row["class"] for row in content["rows"]}
                    for row in content["rows"]:
                        place = {"method": NAMES[method], "fold": fold, "seed": seed, **row}
                        rows.append({**place, "dataset": title})
                        if len(classes) > 1:
                            tail = " (tail)" if row["class"] == content["tail"] else ""
                            rows.append({**place, "dataset": f"{title}: {row['class']}{tail}"})
    if not rows:
        return
    frame = pd.DataFrame(rows).sort_values("dataset", kind="stable")
    frame.to_csv(root / "dino_mix_cases.csv", index=False)
    for control, other, name in (("control", "control_half", "dino_mix"), ("control_half", "control", "dino_mix_half")):
        compared = frame[frame["method"] != NAMES[other]]
        if NAMES[control] in set(compared["method"]):
            table = summarize(compared, NAMES[control])
            write_table(table, root, name)
            print(to_markdown(table))


def measure_costs(task: str, args: argparse.Namespace) -> None:
    """Seconds per step and per batch of every method, interleaved in one process; medians, and ratios to two controls.

    One control has the batch of the plans, the other as many patches as the method. Methods with the foundation teacher
    are also measured with token maps of whole cases on disk.
    """
    args.cache = False
    made = {method: make_trainer(run_of(task, method, 0, 0), args) for method in METHODS if method != "control_half"}
    args.cache = True
    cached = {f"{method}, cache": make_trainer(run_of(task, method, 0, 0), args) for method in ("fkd", "full")}
    made |= cached
    made["control+"] = make_trainer(run_of(task, "control", 0, 0), args)
    patches = {}
    for method, trainer in made.items():
        trainer.initialize()
        patches[method] = trainer.batch_size + (trainer.batch_size // 2 if method.startswith(("pic", "full")) else 0)
        if method == "control+":
            patches[method] = trainer.batch_size = trainer.batch_size + trainer.batch_size // 2
        trainer.on_train_start()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
    steps: dict[str, list[float]] = {method: [] for method in made}
    loads: dict[str, list[float]] = {method: [] for method in made}
    for index in range(NUM_WARM + NUM_TIMED):
        for method, trainer in made.items():
            begin = time.perf_counter()
            batch = next(trainer.dataloader_train)
            start = time.perf_counter()
            trainer.train_step(batch)
            if index >= NUM_WARM:
                steps[method].append(time.perf_counter() - start)
                loads[method].append(start - begin)
    seconds = {method: statistics.median(values) for method, values in steps.items()}
    of_control = {patches[method]: seconds[method] for method in ("control", "control+")}
    print(f"| {task} | patches | seconds of a step | to the control | to one with as many patches | of a batch |")
    print("|---|---|---|---|---|---|")
    for method in made:
        ratios = (seconds[method] / seconds["control"], seconds[method] / of_control[patches[method]])
        own, _, cache = method.partition(", ")
        name = NAMES.get(own, "control, larger batch") + (", token maps on disk" if cache else "")
        shown = [f"{value:.2f}" for value in (seconds[method], *ratios, statistics.median(loads[method]))]
        print(f"| {name} | {patches[method]} | {' | '.join(shown)} |")


def start(root: Path, run: Run, args: argparse.Namespace) -> None:
    """One run in a process of its own."""
    more = options_of(args)
    real_data.start_again(__file__, root, run, more, args, environment(root / "raw", root, "preprocessed", run.name, 1))


def options_of(args: argparse.Namespace) -> list[str]:
    """For a process that trains."""
    more = ["--batch_size", str(args.batch_size), "--foundation_size", str(args.foundation_size)]
    more += ["--settings", args.settings, *(["--cache"] if args.cache else [])]
    more += [] if args.c is None else ["-c", args.c]
    return more + ([] if args.foundation is None else ["--foundation", str(args.foundation)])


def main() -> None:
    """Parse, prepare, run what is missing, collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="Dataset@percent labelled")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--foundation", type=Path, default=None, help="Weights of vit_small_patch16_dinov3")
    parser.add_argument("--foundation_size", type=int, default=224, help="Longer side of what it sees")
    parser.add_argument("--cache", action="store_true", help="Keep its tokens of whole cases on disk")
    parser.add_argument("-c", choices=("2d", "3d_fullres"), default=None, help="Configuration of all tasks")
    parser.add_argument("--batch_size", type=int, default=real_data.BATCH_SIZE)
    parser.add_argument("--settings", default="{}", help="Inline JSON for the block 'dino_mix'")
    parser.add_argument("--costs", action="store_true", help="Measure the steps of the first task instead")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    real_data.add_run_arguments(parser, 600)
    args = parser.parse_args()
    root = args.o.resolve()
    if args.run is not None:
        train_and_test(root, Run(**json.loads(args.run)), args)
        return
    if args.measure:
        measure_costs(args.tasks[0], args)
        return
    names = ("c", "batch_size", "foundation_size", "cache", "settings", "steps", "epochs")
    options = {name: getattr(args, name) for name in names}
    keep_options(root, {**options, "foundation": str(args.foundation)})
    prepare(root, args.tasks, args.c, args.batch_size)
    if args.costs:
        env = environment(root / "raw", root, "preprocessed", "costs", 1)
        command = [sys.executable, __file__, "-o", str(root), "--tasks", args.tasks[0], "--measure", *options_of(args)]
        sys.exit(subprocess.run(command, env=env, check=False).returncode)
    runs = [
        run_of(task, method, fold, seed)
        for task in args.tasks
        for fold in args.folds
        for seed in args.seeds
        for method in args.methods
    ]
    real_data.for_each(list(real_data.jobs(root, runs)), lambda run: start(root, run, args), args.workers)
    collect(root, args.tasks, args.folds, args.seeds)


if __name__ == "__main__":
    main()
