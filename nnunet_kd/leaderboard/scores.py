"""Scores of every case that a run predicted, computed once and kept beside the predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.files import replacing
from nnunet_kd.leaderboard.definitions import Dataset, Recipe
from nnunet_kd.leaderboard.metrics import METRICS
from nnunet_kd.leaderboard.plan import raw_folder
from nnunet_kd.leaderboard.runs import Evaluation, hash_of, test_of

PER_CASE_KINDS = ("segmentation", "resized_grid")


@dataclass(frozen=True)
class References:
    """Where the truth of an evaluation is, and which cases it has."""

    folder: Path
    cases: Sequence[str]


def case_scores(recipe: Recipe, evaluation: Evaluation, out: Path) -> pd.DataFrame:
    """Scores per case and class: columns ``case``, ``class`` and those of the recipe's metrics of segmentation.

    They are read from the cache where it was made of the same predictions in the same way.

    Raises:
        NnUNetKDError: Predictions or references are missing, or do not fit.
    """
    kinds = [kind for kind in PER_CASE_KINDS if kind in {METRICS[name].kind for name in recipe.metrics}]
    dataset = recipe.datasets[evaluation.dataset]
    key = f"# {_key(evaluation, dataset, kinds)}\n"
    if evaluation.scores_file.is_file():
        with evaluation.scores_file.open(encoding="utf-8") as file:
            if file.readline() == key:
                return pd.read_csv(file, dtype={"case": str, "class": str})
    scores = _evaluate(recipe, evaluation, kinds, out)
    with replacing(evaluation.scores_file) as temporary:
        temporary.write_text(key + scores.to_csv(index=False), encoding="utf-8")
    return scores


def _key(evaluation: Evaluation, dataset: Dataset, kinds: Sequence[str]) -> str:
    files = (evaluation.predictions / "summary.json", evaluation.predictions)
    written = next((file.stat().st_mtime_ns for file in files if file.exists()), 0)
    how = [dataset.tolerance_mm, dataset.grid, dataset.labels]
    return hash_of([evaluation.run.hash, evaluation.test, list(kinds), how, written])


def _evaluate(recipe: Recipe, evaluation: Evaluation, kinds: Sequence[str], out: Path) -> pd.DataFrame:
    # imported late: a table of cached scores needs neither nnU-Net nor torch
    from nnunet_kd.evaluation.folder import evaluate_folder, foreground_classes
    from nnunet_kd.evaluation.reference import ReferenceDataset
    from nnunet_kd.evaluation.resized_grid import evaluate_on_grid

    dataset = recipe.datasets[evaluation.dataset]
    own = ReferenceDataset.open(dataset.folder)
    references = references_of(recipe, evaluation, out)
    classes = {name: value for value, name in enumerate(dataset.labels) if value} or foreground_classes(
        own.dataset_json
    )
    shared = (references.folder, evaluation.predictions, own.dataset_json)
    parts = []
    if "segmentation" in kinds:
        tolerance = dataset.tolerance_mm
        parts.append(
            evaluate_folder(
                *shared, cases=references.cases, classes=classes, tolerance_mm=tolerance, show_progress=False
            )
        )
    if "resized_grid" in kinds and dataset.grid:
        parts.append(evaluate_on_grid(*shared, dataset.grid, cases=references.cases, classes=classes))
    if len(parts) == 2:
        return parts[0].merge(parts[1], on=["case", "class"])
    return parts[0]


def references_of(recipe: Recipe, evaluation: Evaluation, out: Path) -> References:
    """The references of an evaluation.

    Raises:
        NnUNetKDError: They do not exist, or their labels are not those of the run's dataset.
    """
    from nnunet_kd.evaluation.reference import ReferenceDataset

    dataset, test = recipe.datasets[evaluation.dataset], test_of(recipe, evaluation)
    own = ReferenceDataset.open(dataset.folder)
    ending = own.dataset_json["file_ending"]
    if test is not None and test.labels is not None:
        folder = Path(raw_folder(recipe, out)) / dataset.folder / test.labels
        return References(folder, sorted(file.name[: -len(ending)] for file in folder.glob(f"*{ending}")))
    other = own if test is None else ReferenceDataset.open(recipe.datasets[str(test.dataset)].folder)
    if other.segmentation_folder is None:
        raise NnUNetKDError(f"{other.name} has no reference segmentations in {', '.join(map(str, other.folders))}.")
    if other.dataset_json["labels"] != own.dataset_json["labels"]:
        raise NnUNetKDError(
            f"{other.name} has the labels {other.dataset_json['labels']}, {own.name} {own.dataset_json['labels']}: "
            f"predictions of the one cannot be compared with references of the other."
        )
    if test is None or test.cases == "validation":
        return References(other.segmentation_folder, other.validation_cases(evaluation.run.fold))
    return References(other.segmentation_folder, other.segmented_cases())
