"""True and predicted classes and boxes of a demo's test cases, read from files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunet_kd.data.side_files import CaseBoxes, read_boxes, read_labels
from nnunet_kd.data.tasks import CLASSIFICATION_FILE, DETECTION_FILE, ClassificationTarget
from nnunet_kd.demo.pipeline import METHODS, DemoDataset
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.detection import PredictedBoxes
from nnunet_kd.evaluation.prediction_files import (
    ClassPredictions,
    read_box_predictions,
    read_classification_predictions,
)


@dataclass
class Findings:
    """Classes and boxes of a dataset; all that nobody predicted is empty.

    Attributes:
        cases: The test cases.
        targets: What is classified.
        labels: Target to case to [classes] of 0 and 1, NaN where not labelled.
        probabilities: Method to case to target to [classes].
        box_classes: Names of the boxes' labels.
        boxes: Case to its true boxes.
        detections: Method to case to labels, boxes and scores.
    """

    cases: tuple[str, ...]
    targets: tuple[ClassificationTarget, ...] = ()
    labels: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict)
    probabilities: dict[str, ClassPredictions] = field(default_factory=dict)
    box_classes: tuple[str, ...] = ()
    boxes: dict[str, CaseBoxes] = field(default_factory=dict)
    detections: dict[str, dict[str, PredictedBoxes]] = field(default_factory=dict)


def read_findings(dataset: DemoDataset) -> Findings:
    """Read what the dataset declares and a method predicted; boxes of volumes, for example, have no head in 2d.

    Raises:
        NnUNetKDError: A file is wrong, or some methods lack a file or a case that others have.
    """
    tasks, cases = dataset.tasks, demo_cases(dataset)
    findings = Findings(cases)
    if tasks.classification and _is_predicted(dataset, CLASSIFICATION_FILE):
        findings.targets = tasks.classification
        unknown = {target.name: np.full(len(target.classes), np.nan) for target in tasks.classification}
        for target in tasks.classification:
            labels = read_labels(dataset.side_folder / target.file, target)
            findings.labels[target.name] = {case: labels.get(case, unknown[target.name]) for case in cases}
        for method in METHODS:
            file = dataset.predictions[method] / CLASSIFICATION_FILE
            findings.probabilities[method] = read_classification_predictions(file, tasks.classification)
            _check_cases(file, findings.probabilities[method], cases)
    if tasks.detection is not None and _is_predicted(dataset, DETECTION_FILE):
        findings.box_classes = tasks.detection.classes
        boxes = read_boxes(dataset.side_folder / tasks.detection.file, tasks.detection, dataset.dimension)
        nothing = CaseBoxes(np.zeros(0, dtype=np.int64), np.zeros((0, 2 * dataset.dimension)))
        findings.boxes = {case: boxes.get(case, nothing) for case in cases}
        for method in METHODS:
            file = dataset.predictions[method] / DETECTION_FILE
            findings.detections[method] = read_box_predictions(file, tasks.detection.classes, dataset.dimension)
            _check_cases(file, findings.detections[method], cases)
    return findings


def demo_cases(dataset: DemoDataset) -> tuple[str, ...]:
    """The cases that the demo is evaluated on."""
    if dataset.cases is not None:
        return dataset.cases
    ending = dataset.dataset_json["file_ending"]
    return tuple(sorted(file.name.removesuffix(ending) for file in dataset.reference_folder.glob(f"*{ending}")))


def _is_predicted(dataset: DemoDataset, name: str) -> bool:
    return any((folder / name).is_file() for folder in dataset.predictions.values())


def _check_cases(file: Path, predicted: Collection[str], cases: Sequence[str]) -> None:
    missing = [case for case in cases if case not in predicted]
    if missing:
        msg = (
            f"{file} lacks {len(missing)} of {len(cases)} cases, among them {', '.join(missing[:5])}. Delete its "
            f"folder and run the demo again."
        )
        raise NnUNetKDError(msg)
