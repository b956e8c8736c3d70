"""Boxes to look at: those whose scores brought few false positives in the final validation (our design).

``boxes.json`` keeps all boxes, as average precision and FROC need them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nnunet_kd.data.tasks import DETECTION_FILE
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.prediction_files import read_box_predictions, write_box_predictions
from nnunet_kd.inference.trained_model import TrainedModel
from nnunet_kd.settings import BLOCK

REPORTED_FILE = "boxes_reported.json"


def minimum_scores(
    model: TrainedModel, classes: Sequence[str], rate: float, member: str | None = None
) -> NDArray[np.float64]:
    """The lowest score to report of each class [classes], in [0, 1].

    It is the mean over the model's folds of the lowest score that had at most so many false positives per validation
    image (FROC at IoU 0.1, in ``summary.json``): 0 where all boxes of a fold may be kept, 1 where none may. The folds
    were validated one by one with mirroring; of fold "all", validation cases are training cases.

    Args:
        model: A model with boxes.
        classes: Its classes.
        rate: False positives per image and class, one of ``FALSE_POSITIVE_RATES``.
        member: Of a joint teacher.

    Raises:
        NnUNetKDError: A fold has no final validation with these classes.
    """
    scores = []
    for file in model.files.values():
        summary = file.parent / (member or "") / "validation" / "summary.json"
        try:
            detection = json.loads(summary.read_text())[BLOCK]["detection"]
            column = detection["froc_rates"].index(rate)
            own = {entry["name"]: entry["froc_thresholds"][column] for entry in detection["classes"]}
            scores.append([1.0 if own[name] is None else float(own[name]) for name in classes])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise NnUNetKDError(
                f"The scores for --false_positives are chosen in the final validation, and {summary} has none for "
                f"{', '.join(classes)}. Let nnUNetv2_train ... --val write it, or leave --false_positives out."
            ) from error
    return np.mean(scores, axis=0)


def write_reported(folder: Path, classes: Sequence[str], dimension: int, minimum: NDArray[np.float64]) -> Path:
    """Write the boxes of ``boxes.json`` that score at least the minimum of their class as ``boxes_reported.json``.

    Args:
        folder: Where both are.
        classes: Of the boxes.
        dimension: 2 or 3.
        minimum: [classes].
    """
    reported = {}
    for case, (labels, boxes, scores) in read_box_predictions(folder / DETECTION_FILE, classes, dimension).items():
        kept = scores >= minimum[labels]
        reported[case] = (labels[kept], boxes[kept], scores[kept])
    write_box_predictions(folder / REPORTED_FILE, reported, classes)
    return folder / REPORTED_FILE
