"""The files ``classification.csv`` and ``boxes.json`` of an output folder, to which cases are added one by one.

Rows of cases that are not predicted again stay, as segmentations of other cases do in stock nnU-Net. So several calls,
also at the same time (``-num_parts``), fill one file: each merges its cases into what is there, under a lock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from nnunet_kd.data.box_geometry import clip, to_original
from nnunet_kd.data.side_files import SideFileError
from nnunet_kd.data.tasks import CLASSIFICATION_FILE, DETECTION_FILE, ClassificationTarget
from nnunet_kd.evaluation.detection import PredictedBoxes
from nnunet_kd.evaluation.prediction_files import (
    ClassPredictions,
    read_box_predictions,
    read_classification_predictions,
    write_box_predictions,
    write_classification_predictions,
)

LOCK_FILE = ".nnunet_kd.lock"
WRITING_SHARE = 0.05  # of the time, so that large files do not slow down many small cases


class TaskFiles:
    """Predictions of classes and boxes in a folder.

    Args:
        folder: The output folder; exists.
        targets: What is classified; none writes no ``classification.csv``.
        classes: Classes of the boxes; None writes no ``boxes.json``.
        dimension: Of the boxes, 2 or 3.
    """

    def __init__(
        self, folder: Path, targets: Sequence[ClassificationTarget], classes: Sequence[str] | None, dimension: int
    ) -> None:
        self.classification_file = folder / CLASSIFICATION_FILE
        self.boxes_file = folder / DETECTION_FILE
        self.targets = targets
        self.classes = classes
        self.dimension = dimension
        self._lock = FileLock(folder / LOCK_FILE)
        self._probabilities: ClassPredictions = {}
        self._boxes: dict[str, PredictedBoxes] = {}
        self._unwritten = False
        self._next_writing = 0.0

    def finished(self) -> set[str]:
        """Cases that are in all files that are written.

        Raises:
            SideFileError: A file is there already and is none of this model (other targets, classes or dimension) or
                damaged.
        """
        parts: list[set[str]] = []
        if self.targets:
            parts.append(set(self._read_probabilities()))
        if self.classes is not None:
            parts.append(set(self._read_boxes()))
        return set.intersection(*parts) if parts else set()

    def add(self, case: str, probabilities: Mapping[str, NDArray[Any]], boxes: PredictedBoxes | None) -> None:
        """Add a case.

        The files are written at once, or, where writing them takes long, as often as 5% of the time allows; so a kill
        loses next to nothing, and what it loses is not :meth:`finished`.

        Args:
            case: Name of the case.
            probabilities: Target name to [classes].
            boxes: In the stored image; None without detection.
        """
        self._unwritten = True
        self._probabilities[case] = {name: np.asarray(own, dtype=np.float64) for name, own in probabilities.items()}
        if boxes is not None:
            self._boxes[case] = boxes
        start = time.monotonic()
        if start >= self._next_writing:
            self.write()
            end = time.monotonic()
            self._next_writing = end + (end - start) / WRITING_SHARE

    def write(self) -> None:
        """Merge all added cases into the files, sorted by case."""
        if not self._unwritten:
            return
        with self._lock:
            if self.targets:
                probabilities = {**self._read_probabilities(), **self._probabilities}
                ordered = dict(sorted(probabilities.items()))
                write_classification_predictions(self.classification_file, ordered, self.targets)
            if self.classes is not None:
                boxes = {**self._read_boxes(), **self._boxes}
                write_box_predictions(self.boxes_file, dict(sorted(boxes.items())), self.classes)
        self._unwritten = False

    def _read_probabilities(self) -> ClassPredictions:
        if not self.classification_file.is_file():
            return {}
        with _of_this_model(self.classification_file):
            return read_classification_predictions(self.classification_file, self.targets)

    def _read_boxes(self) -> dict[str, PredictedBoxes]:
        assert self.classes is not None
        if not self.boxes_file.is_file():
            return {}
        with _of_this_model(self.boxes_file):
            return read_box_predictions(self.boxes_file, self.classes, self.dimension)


@contextmanager
def _of_this_model(file: Path) -> Iterator[None]:
    """Say of a file of predictions that does not fit what to do with the output folder."""
    try:
        yield
    except SideFileError as error:
        raise SideFileError(
            f"The output folder {file.parent} holds predictions of another model, or a damaged file "
            f"({error.problems[0].without_remedy}). Choose another folder with -o, or move {file.name} away."
        ) from error


def boxes_in_stored_image(
    boxes: PredictedBoxes,
    properties: Mapping[str, Any],
    transpose_forward: Sequence[int],
    preprocessed_shape: Sequence[int],
) -> PredictedBoxes:
    """Map boxes of the preprocessed array into the stored image, clip them to it and drop those without extent.

    Args:
        boxes: Labels [N], boxes [N, 2 * dim], scores [N].
        properties: The case's properties as nnU-Net's preprocessing wrote them.
        transpose_forward: From the plans.
        preprocessed_shape: Spatial shape (z, y, x) of the preprocessed array, 2D too.
    """
    labels, own, scores = boxes
    dimension = own.shape[1] // 2
    stored_shape = [int(properties["shape_before_cropping"][axis]) for axis in np.argsort(transpose_forward)]
    mapped = clip(to_original(own, properties, transpose_forward, preprocessed_shape), stored_shape[-dimension:])
    kept = (mapped[:, dimension:] > mapped[:, :dimension]).all(1)
    return labels[kept], mapped[kept], scores[kept]
