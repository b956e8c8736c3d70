"""Tables of the finished runs of ``tasks.py``: predictions read back, scored over runs, compared with the control."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from real_data import Run
from task_scenarios import SCENARIOS

from nnunet_kd.data.side_files import CaseBoxes, read_boxes, read_labels
from nnunet_kd.evaluation.paired_tasks import (
    ScoredRun,
    classification_scoring,
    detection_scoring,
    summarize_runs,
)
from nnunet_kd.evaluation.prediction_files import read_box_predictions, read_classification_predictions
from nnunet_kd.evaluation.reference import ReferenceDataset
from nnunet_kd.evaluation.table import summarize, to_markdown

NAMES = {
    "auroc": "AUROC (macro)",
    "f1": "macro-F1",
    "balanced_accuracy": "balanced accuracy",
    "ap@0.1": "AP at IoU 0.1",
    "froc_mean": "FROC mean sensitivity",
}
LEAST_PROBABILITY = 1e-6  # the log loss of a case is at most 13.8


def write_tables(root: Path, names: Sequence[str], folds: Sequence[int], seeds: Sequence[int]) -> None:
    """Print and write ``tables.md`` and ``METRIC.csv`` of all finished runs."""
    classification: list[ScoredRun] = []
    detection: list[ScoredRun] = []
    losses: list[dict] = []
    dice: list[dict] = []
    minutes: dict[str, list[float]] = {}
    steps: set[int] = set()
    for run, content, folders in finished_runs(root, names, folds, seeds):
        steps.add(content["steps"])
        kind = f"{run.scenario}, {run.kind}{run.variant} of {run.dataset[7:10]}"
        minutes.setdefault(kind, []).append(content["seconds"] / 60)
        for folder in folders:
            reference = ReferenceDataset.open(str(root / "preprocessed" / folder.name))
            if (folder / "classification.csv").is_file():
                scored, rows = classification_run(run, reference, folder)
                classification.append(scored)
                losses += rows
            if (folder / "boxes.json").is_file():
                detection.append(detection_run(run, reference, folder))
            if (folder / "summary.json").is_file() and reference.tasks.segmentation:
                dice += dice_rows(run, folder)
    parts = []
    for runs in (classification, detection):
        for metric, table in (summarize_runs(runs, "control") if has_control(runs) else {}).items():
            table.to_csv(root / f"{metric.replace('@', '_at_')}.csv", index=False)
            if metric in NAMES:
                parts.append(to_markdown(table, metric=NAMES[metric]))
    for rows, metric, name in ((losses, "log_loss", "log loss"), (dice, "dice", "Dice")):
        frame = pd.DataFrame(rows, columns=["dataset", "method", "fold", "seed", "case", "class", metric])
        frame.to_csv(root / f"{metric}_cases.csv", index=False)
        if "control" in set(frame["method"]):
            table = summarize(frame, "control", metric=metric, higher_is_better=metric == "dice")
            table.to_csv(root / f"{metric}.csv", index=False)
            parts.append(to_markdown(table, metric=name))
    notes = (
        "AUROC, F1, balanced accuracy, AP and FROC: mean over runs; intervals and p from a bootstrap of groups, paired;"
        " won, lost and tied count runs. Log loss and Dice: per case, Wilcoxon; won, lost and tied count cases."
    )
    cost = "\n".join(
        f"{kind}: {np.mean(own):.1f} min of one core per run, {len(own)} runs" for kind, own in minutes.items()
    )
    budget = f"Training steps: {' and '.join(map(str, sorted(steps)))}."
    text = "\n\n".join([budget, notes, *parts, cost]) + "\n"
    (root / "tables.md").write_text(text)
    print(text)


def finished_runs(
    root: Path, names: Sequence[str], folds: Sequence[int], seeds: Sequence[int]
) -> Iterator[tuple[Run, dict, list[Path]]]:
    """Runs, the control first, with the content of their files and their folders of predictions."""
    contents = [json.loads(file.read_text()) for file in sorted((root / "runs").glob("*.json"))]
    order = ("control", "student", "teacher")
    contents.sort(key=lambda own: order.index(own["run"]["kind"]) if own["run"]["kind"] in order else len(order))
    for content in contents:
        run = Run(**content["run"])
        if run.scenario in names and run.fold in folds and run.seed in seeds:
            folders = sorted(folder for folder in (root / "predictions" / run.name).iterdir() if folder.is_dir())
            yield run, content, folders


def classification_run(run: Run, reference: ReferenceDataset, folder: Path) -> tuple[ScoredRun, list[dict]]:
    """The run for the metrics, and a row per case with its log loss.

    Cases of a class that no training case of the fold has are left out: nothing could have learned it.
    """
    target = reference.tasks.classification[0]
    labels = read_labels(reference.file(target.file), target)
    predictions = read_classification_predictions(folder / "classification.csv", [target])
    split = json.loads(reference.file("splits_final.json").read_text())[run.fold]
    learned = np.nansum([labels[case] for case in split["train"] if case in labels], axis=0) > 0
    cases = [case for case in split["val"] if case in labels and not (labels[case][~learned] == 1).any()]
    truth = np.array([labels[case] for case in cases], dtype=np.float64)
    probabilities = np.array([predictions[case][target.name] for case in cases])
    scoring = classification_scoring(truth, probabilities, multilabel=target.multilabel)
    scored = ScoredRun(
        folder.name[7:], method_name(run), (run.fold, run.seed), tuple(cases), scoring, reference.groups()
    )
    loss = -np.log(np.clip((truth * probabilities).sum(1), LEAST_PROBABILITY, 1))
    common = {"dataset": scored.dataset, "method": scored.method, "fold": run.fold, "seed": run.seed, "class": ""}
    return scored, [{**common, "case": case, "log_loss": float(own)} for case, own in zip(cases, loss, strict=True)]


def detection_run(run: Run, reference: ReferenceDataset, folder: Path) -> ScoredRun:
    """The run for the metrics."""
    target = reference.tasks.detection
    assert target is not None
    dimension = 2 if SCENARIOS[run.scenario].configuration == "2d" else 3
    boxes = read_boxes(reference.file(target.file), target, dimension)
    predictions = read_box_predictions(folder / "boxes.json", target.classes, dimension)
    cases = reference.validation_cases(run.fold)
    nothing = CaseBoxes(np.zeros(0, dtype=np.int64), np.zeros((0, 2 * dimension)))
    scoring = detection_scoring(
        [boxes.get(case, nothing) for case in cases], [predictions[case] for case in cases], len(target.classes)
    )
    return ScoredRun(folder.name[7:], method_name(run), (run.fold, run.seed), tuple(cases), scoring, reference.groups())


def dice_rows(run: Run, folder: Path) -> Iterator[dict]:
    """A row per case and class."""
    for case in json.loads((folder / "summary.json").read_text()).get("metric_per_case", []):
        name = Path(case["prediction_file"]).name.split(".")[0]
        common = {"dataset": folder.name[7:], "method": method_name(run), "fold": run.fold, "seed": run.seed}
        for label, metrics in case["metrics"].items():
            yield {**common, "case": name, "class": label, "dice": metrics["Dice"]}


def has_control(runs: Sequence[ScoredRun]) -> bool:
    """Whether there is something to compare with."""
    return any(run.method == "control" for run in runs)


def method_name(run: Run) -> str:
    """A run's method in the tables."""
    return "teacher head" if run.kind == "teacher" else run.kind + run.variant
