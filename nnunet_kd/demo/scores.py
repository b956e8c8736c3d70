"""One table over all tasks of a demo: Dice, AUROC of every target, AP of the boxes; every method against the control.

Dice belongs to a case, so its intervals and tests are those of ``evaluation/table.py``; AUROC and AP belong to a set of
cases, so theirs are those of ``evaluation/paired_tasks.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from nnunet_kd.data.splits import read_groups
from nnunet_kd.demo.findings import Findings
from nnunet_kd.demo.pipeline import CONTROL, METHODS, DemoDataset
from nnunet_kd.evaluation.detection import FROC_IOU
from nnunet_kd.evaluation.folder import evaluate_folder
from nnunet_kd.evaluation.paired_tasks import ScoredRun, classification_scoring, detection_scoring, summarize_runs
from nnunet_kd.evaluation.statistics import holm
from nnunet_kd.evaluation.table import summarize, to_markdown

TOLERANCE_MM = 2.0
CASE_COLUMNS = ["case", "class", "dice", "dataset", "method"]


def evaluate_segmentations(datasets: Sequence[DemoDataset]) -> pd.DataFrame:
    """Rows of ``evaluate_folder`` for every dataset that segments and every method, columns ``dataset``, ``method``."""
    parts = [pd.DataFrame(columns=CASE_COLUMNS)]
    for dataset in datasets:
        for method in METHODS if dataset.tasks.segmentation else ():
            own = evaluate_folder(
                dataset.reference_folder,
                dataset.predictions[method],
                dataset.dataset_json,
                cases=dataset.cases,
                tolerance_mm=TOLERANCE_MM,
                show_progress=False,
            )
            parts.append(own.assign(dataset=dataset.name, method=method))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def score_table(
    datasets: Sequence[DemoDataset], segmentations: pd.DataFrame, findings: Mapping[str, Findings]
) -> pd.DataFrame:
    """A line per dataset, metric and method, with the columns of ``summarize`` and ``metric``.

    Args:
        datasets: In the order of the lines.
        segmentations: As :func:`evaluate_segmentations` returns it.
        findings: Classes and boxes of each dataset.

    Returns:
        ``wins``, ``losses`` and ``ties`` count cases for Dice, and for AUROC and AP the one set of cases. ``p_holm`` is
        corrected for all comparisons of the table.
    """
    dice = summarize(segmentations, CONTROL) if len(segmentations) else None
    parts = []
    for dataset in datasets:
        if dice is not None:
            parts.append(dice[dice["dataset"] == dataset.name].assign(metric="Dice"))
        for metric, (name, runs) in _runs(dataset, findings[dataset.name]).items():
            parts.append(summarize_runs(runs, CONTROL)[name].assign(metric=metric))
    table = pd.concat(parts, ignore_index=True)
    table["p_holm"] = holm(table["p_value"].astype(float).tolist())
    return table[["dataset", "metric", *table.columns.drop(["dataset", "metric"])]]


def as_text(table: pd.DataFrame) -> str:
    """The table as Markdown, the metric beside the dataset."""
    return to_markdown(table.assign(dataset=table["dataset"] + ", " + table["metric"]), metric="score")


def _runs(dataset: DemoDataset, findings: Findings) -> dict[str, tuple[str, list[ScoredRun]]]:
    """What a line calls a metric -> its name in ``summarize_runs``, and the methods."""
    cases = findings.cases
    runs: dict[str, tuple[str, list[ScoredRun]]] = {}
    groups = {}
    if dataset.tasks.split_by is not None:
        groups = read_groups(dataset.side_folder / dataset.tasks.groups_file, dataset.tasks.split_by)
    for target in findings.targets:
        truth = np.array([findings.labels[target.name][case] for case in cases], dtype=np.float64)
        own = []
        for method, predicted in findings.probabilities.items():
            probabilities = np.array([predicted[case][target.name] for case in cases])
            scoring = classification_scoring(truth, probabilities, multilabel=target.multilabel)
            own.append(ScoredRun(dataset.name, method, "", cases, scoring, groups))
        runs[f"AUROC of {target.name}"] = ("auroc", own)
    own = []
    for method, detected in findings.detections.items():
        boxes, found = [findings.boxes[case] for case in cases], [detected[case] for case in cases]
        scoring = detection_scoring(boxes, found, len(findings.box_classes))
        own.append(ScoredRun(dataset.name, method, "", cases, scoring, groups))
    if own:
        runs[f"AP of boxes at IoU {FROC_IOU:g}"] = ("ap@0.1", own)
    return runs
