"""Which boxes to report: those whose scores brought few false positives in the final validation (our design)."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.detection import PredictedBoxes
from nnunet_kd.inference.trained_model import TrainedModel
from nnunet_kd.settings import BLOCK


def minimum_scores(
    model: TrainedModel, classes: Sequence[str], rate: float, member: str | None = None
) -> NDArray[np.float64]:
    """The lowest score to report of each class [classes].

    It is the mean over the model's folds of the lowest score that had at most so many false positives per validation
    image (FROC at IoU 0.1, of ``summary.json``). Of fold "all", validation cases are training cases. Infinite where
    the best score of a class had more in every fold.

    Args:
        model: A model with boxes.
        classes: Its classes.
        rate: False positives per image and class, one of ``FALSE_POSITIVE_RATES``.
        member: Of a joint teacher.

    Raises:
        NnUNetKDError: A fold has no final validation with these classes.
    """
    found = []
    for file in model.files.values():
        summary = file.parent / (member or "") / "validation" / "summary.json"
        try:
            detection = json.loads(summary.read_text())[BLOCK]["detection"]
            column = detection["froc_rates"].index(rate)
            own = {entry["name"]: entry["froc_thresholds"][column] for entry in detection["classes"]}
            found.append([own[name] for name in classes])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NnUNetKDError(
                f"The scores for --false_positives are chosen in the final validation, and {summary} has none for "
                f"{', '.join(classes)}. Let nnUNetv2_train ... --val write it, or leave --false_positives out."
            ) from error
    scores = np.array(found, dtype=np.float64)  # null: the best score had more false positives
    known = ~np.isnan(scores)
    total = np.where(known, scores, 0).sum(axis=0)
    return np.divide(total, known.sum(axis=0), out=np.full(len(classes), np.inf), where=known.any(axis=0))


def reported(boxes: PredictedBoxes, minimum: NDArray[np.float64]) -> PredictedBoxes:
    """The boxes that score at least the minimum of their class."""
    labels, corners, scores = boxes
    kept = scores >= minimum[labels]
    return labels[kept], corners[kept], scores[kept]
