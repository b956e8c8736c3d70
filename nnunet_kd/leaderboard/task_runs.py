"""Predicted classes and boxes of a run, with their references, for ``evaluation/paired_tasks.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnunet_kd.data.side_files import CaseBoxes, read_boxes, read_labels
from nnunet_kd.data.tasks import CLASSIFICATION_FILE, DETECTION_FILE
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.paired_tasks import ScoredRun, classification_scoring, detection_scoring
from nnunet_kd.evaluation.prediction_files import read_box_predictions, read_classification_predictions
from nnunet_kd.evaluation.reference import ReferenceDataset
from nnunet_kd.leaderboard.plan import Plan
from nnunet_kd.leaderboard.runs import Evaluation, test_of


def scored_run(plan: Plan, evaluation: Evaluation, place: Mapping[str, Any], kind: str) -> ScoredRun:
    """What one run predicted.

    Args:
        plan: Of the recipe.
        evaluation: Of the run.
        place: Its dataset, method, fold and seed in the table.
        kind: "classification" (the first target) or "detection".

    Raises:
        NnUNetKDError: The dataset has no such task, or a file is missing or wrong.
    """
    test = test_of(plan.recipe, evaluation)
    if test is not None and test.dataset is None:
        raise NnUNetKDError(
            "A test set of classes or boxes must be a dataset of the recipe, which has their references."
        )
    tested = evaluation.dataset if test is None else str(test.dataset)
    reference = ReferenceDataset.open(plan.recipe.datasets[tested].folder)
    fold = evaluation.run.fold if test is None or test.cases == "validation" else None
    make = _classification if kind == "classification" else _detection
    cases, scoring = make(reference, evaluation, fold)
    return ScoredRun(
        place["dataset"], place["method"], (place["fold"], place["seed"]), cases, scoring, reference.groups()
    )


def _classification(
    reference: ReferenceDataset, evaluation: Evaluation, fold: int | None
) -> tuple[tuple[str, ...], Any]:
    if not reference.tasks.classification:
        raise NnUNetKDError(f"dataset.json of {reference.name} declares no classification.")
    target = reference.tasks.classification[0]
    labels = read_labels(reference.file(target.file), target)
    predictions = read_classification_predictions(evaluation.predictions / CLASSIFICATION_FILE, [target])
    cases = _cases(reference, fold, predictions.keys(), set(labels))
    unknown = np.full(len(target.classes), np.nan)
    truth = np.array([labels.get(case, unknown) for case in cases], dtype=np.float64)
    probabilities = np.array([predictions[case][target.name] for case in cases])
    return cases, classification_scoring(truth, probabilities, multilabel=target.multilabel)


def _detection(reference: ReferenceDataset, evaluation: Evaluation, fold: int | None) -> tuple[tuple[str, ...], Any]:
    target = reference.tasks.detection
    if target is None:
        raise NnUNetKDError(f"dataset.json of {reference.name} declares no detection.")
    dimension = 2 if evaluation.run.configuration == "2d" else 3
    boxes = read_boxes(reference.file(target.file), target, dimension)
    predictions = read_box_predictions(evaluation.predictions / DETECTION_FILE, target.classes, dimension)
    cases = _cases(reference, fold, predictions.keys(), set(boxes))
    nothing = CaseBoxes(np.zeros(0, dtype=np.int64), np.zeros((0, 2 * dimension)))
    truth = [boxes.get(case, nothing) for case in cases]
    return cases, detection_scoring(truth, [predictions[case] for case in cases], len(target.classes))


def _cases(reference: ReferenceDataset, fold: int | None, predicted: Any, known: set[str]) -> tuple[str, ...]:
    """The validation cases of the fold, or all that have a reference; each must be predicted."""
    cases = sorted(known | reference.cases()) if fold is None else reference.validation_cases(fold)
    missing = [case for case in cases if case not in predicted]
    if missing:
        raise NnUNetKDError(f"{len(missing)} of {len(cases)} cases are not predicted, for example {missing[0]}")
    return tuple(cases)
