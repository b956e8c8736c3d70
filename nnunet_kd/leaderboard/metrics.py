"""The metrics that a recipe may name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["segmentation", "resized_grid", "classification", "detection"]


@dataclass(frozen=True)
class Metric:
    """A metric: how it is called, which evaluation has it, and the column or name that it has there.

    ``digits``: after the point, in texts.
    """

    title: str
    kind: Kind
    column: str
    higher_is_better: bool = True
    digits: int = 3


METRICS = {
    "dice": Metric("Dice", "segmentation", "dice"),
    "nsd": Metric("NSD", "segmentation", "nsd"),
    "hd95": Metric("HD95 (mm)", "segmentation", "hd95_mm", higher_is_better=False, digits=2),
    "dice_percent": Metric("Dice on the resized grid (%)", "resized_grid", "dice_percent", digits=2),
    "average_surface_distance_voxels": Metric(
        "Average surface distance on the resized grid (voxels)",
        "resized_grid",
        "average_surface_distance_voxels",
        higher_is_better=False,
        digits=2,
    ),
    "auroc": Metric("AUROC", "classification", "auroc"),
    "auprc": Metric("AUPRC", "classification", "auprc"),
    "f1": Metric("F1", "classification", "f1"),
    "balanced_accuracy": Metric("Balanced accuracy", "classification", "balanced_accuracy"),
    "ap@0.1": Metric("AP at IoU 0.1", "detection", "ap@0.1"),
    "ap@0.5": Metric("AP at IoU 0.5", "detection", "ap@0.5"),
    "froc": Metric("FROC", "detection", "froc_mean"),
}


def task_of(metric: Metric) -> str:
    """The task that a dataset must have."""
    return "segmentation" if metric.kind == "resized_grid" else metric.kind
