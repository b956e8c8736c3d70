"""Predictions of classes and boxes as files.

A prediction folder holds any of: segmentations ``<case><file ending>``; ``classification.csv`` with the header
``case,<target>/<class>,...`` and probabilities; ``boxes.json``, case -> list of
``{"label": CLASS, "box": [x0, y0, (z0,) x1, y1, (z1)], "score": s}``, by falling score, in voxel-edge coordinates of
the stored image. This module is the one place that knows these formats.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nnunet_kd.data.side_files import (
    Problem,
    SideFileError,
    flip_axes,
    read_boxes,
    read_rows,
)
from nnunet_kd.data.tasks import ClassificationTarget, DetectionTarget
from nnunet_kd.evaluation.classification import (
    Array,
)
from nnunet_kd.evaluation.detection import (
    PredictedBoxes,
)
from nnunet_kd.files import replacing

# probabilities of a softmax that were written with a few digits only still add up to 1 within this
SUM_TOLERANCE = 1e-2
PREDICT_AGAIN = "Predict again with nnUNetKD_predict, or correct the file."

# case -> target name -> probabilities [C]
ClassPredictions: TypeAlias = dict[str, dict[str, Array]]


def write_classification_predictions(
    path: Path, predictions: Mapping[str, Mapping[str, NDArray[Any]]], targets: Sequence[ClassificationTarget]
) -> None:
    """Write probabilities, with 9 significant digits, which keep a float32.

    Args:
        path: The file; replaced if it exists.
        predictions: Case to target name to probabilities [C], in the order of the target's classes.
        targets: The targets, in the order of the columns.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", *_columns(targets)])
    for case, own in predictions.items():
        writer.writerow([case, *(f"{value:.9g}" for target in targets for value in own[target.name])])
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def read_classification_predictions(file: Path, targets: Sequence[ClassificationTarget]) -> ClassPredictions:
    """Read probabilities.

    Args:
        file: As written by ``write_classification_predictions``; columns of other targets are not looked at.
        targets: The targets to read.

    Returns:
        Case to target name to probabilities [C], in the order of the target's classes.

    Raises:
        SideFileError: Lists what is wrong: a column is missing, a class is unknown, a case has two rows, a value is not
            a probability, or those of a multi-class target do not add up to 1.
    """
    problems: list[Problem] = []
    rows = read_rows(file, _columns(targets), problems)
    if any(problem.is_unread for problem in problems):
        raise SideFileError.listing(problems)
    if not problems:
        problems += _unknown_classes(file, targets)
    predictions: ClassPredictions = {}
    for row in rows:
        values = np.array([_probability(text) for text in row.values])
        if np.isnan(values).any():
            column = _columns(targets)[int(np.isnan(values).argmax())]
            what = f"{column} is '{row.values[int(np.isnan(values).argmax())]}', which is not a number in [0, 1]"
            problems.append(Problem(str(file), str(row), what, PREDICT_AGAIN))
            continue
        if row.case in predictions:
            problems.append(Problem(str(file), str(row), "the case has another row", "Leave one row per case."))
        ends = np.cumsum([len(target.classes) for target in targets])[:-1]
        predictions[row.case] = {target.name: own for target, own in zip(targets, np.split(values, ends), strict=True)}
        for target in targets:
            total = predictions[row.case][target.name].sum()
            if not target.multilabel and abs(total - 1) > SUM_TOLERANCE:
                what = f"the probabilities of {target.name} add up to {total:g}, not to 1"
                problems.append(Problem(str(file), str(row), what, PREDICT_AGAIN))
    if problems:
        raise SideFileError.listing(problems)
    return predictions


def write_box_predictions(path: Path, predictions: Mapping[str, PredictedBoxes], classes: Sequence[str]) -> None:
    """Write boxes by falling score, one case per line, with 9 significant digits.

    Args:
        path: The file; replaced if it exists.
        predictions: Case to labels [N], boxes [N, 2 * dimension] in array order and scores [N] in [0, 1]. A case in
            which nothing was found has empty arrays.
        classes: Names of the labels.
    """
    lines = []
    for case, (labels, boxes, scores) in predictions.items():
        corners = flip_axes(np.asarray(boxes, dtype=np.float64)) if len(labels) else np.zeros((0, 2))
        entries = [
            {
                "label": classes[labels[index]],
                "box": [float(f"{edge:.9g}") for edge in corners[index]],
                "score": float(f"{scores[index]:.9g}"),
            }
            for index in np.argsort(-np.asarray(scores), kind="stable")
        ]
        lines.append(f"{json.dumps(case)}: {json.dumps(entries)}")
    with replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read_box_predictions(file: Path, classes: Sequence[str], dimension: int) -> dict[str, PredictedBoxes]:
    """Read predicted boxes.

    Args:
        file: As written by ``write_box_predictions``.
        classes: Names of the labels.
        dimension: 2 or 3.

    Returns:
        Case to labels [N], boxes [N, 2 * dimension] in array order and scores [N], by falling score.

    Raises:
        SideFileError: Lists what is wrong: malformed JSON, an unknown class, a box that is none, or a score that is
            missing or not in [0, 1].
    """
    problems: list[Problem] = []
    boxes = read_boxes(file, DetectionTarget(file.name, tuple(classes)), dimension, problems)
    if problems:
        raise SideFileError.listing(problems)
    predictions: dict[str, PredictedBoxes] = {}
    for case, entries in json.loads(file.read_text(encoding="utf-8-sig")).items():
        scores = np.array([_score(entry.get("score")) for entry in entries], dtype=np.float64)
        for index in np.flatnonzero(np.isnan(scores)):
            what = f"its score is {json.dumps(entries[index].get('score'))}, not a number in [0, 1]"
            problems.append(Problem(str(file), f"case {case}, box {index}", what, PREDICT_AGAIN))
        order = np.argsort(-scores, kind="stable")
        predictions[case] = (boxes[case].labels[order], boxes[case].boxes[order], scores[order])
    if problems:
        raise SideFileError.listing(problems)
    return predictions


def _columns(targets: Sequence[ClassificationTarget]) -> list[str]:
    return [f"{target.name}/{name}" for target in targets for name in target.classes]


def _unknown_classes(file: Path, targets: Sequence[ClassificationTarget]) -> Iterable[Problem]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        header = [name.strip() for name in next(csv.reader(lines))]
    for target in targets:
        for column in header:
            if column.startswith(f"{target.name}/") and column not in _columns(targets):
                what = f"column '{column}' is of no class of {target.name}; its classes are {', '.join(target.classes)}"
                yield Problem(str(file), "header", what, "Predict with a model of this dataset, or correct the header.")


def _probability(text: str) -> float:
    """The number, NaN if it is none in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        return float("nan")
    return value if 0 <= value <= 1 else float("nan")


def _score(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= 1 else float("nan")
