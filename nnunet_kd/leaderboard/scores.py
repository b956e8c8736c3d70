"""Scores of every case that a run predicted, computed once and kept beside the predictions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.metrics import Label
from nnunet_kd.files import replacing
from nnunet_kd.leaderboard.definitions import Recipe
from nnunet_kd.leaderboard.metrics import METRICS
from nnunet_kd.leaderboard.plan import nnunet_folder
from nnunet_kd.leaderboard.runs import Evaluation, hash_of, test_of

PER_CASE_KINDS = ("segmentation", "resized_grid")
NO_REFERENCES = "none"


@dataclass(frozen=True)
class References:
    """Where the truth of an evaluation is, which cases it has, and the classes that can be compared."""

    folder: Path
    cases: Sequence[str]
    classes: Mapping[str, Label]


def case_scores(recipe: Recipe, evaluation: Evaluation, out: Path) -> pd.DataFrame:
    """Scores per case and class: columns ``case``, ``class`` and those of the recipe's metrics of segmentation.

    They are read from the cache where it was made of the same predictions and references in the same way.

    Raises:
        NnUNetKDError: Predictions or references are missing, or do not fit.
    """
    if evaluation.scores_file.is_file():
        with evaluation.scores_file.open(encoding="utf-8") as file:
            if _is_current(file.readline(), _first_line(recipe, evaluation, out)):
                return pd.read_csv(file, dtype={"case": str, "class": str})
    scores = _evaluate(recipe, evaluation, out)
    write_scores(recipe, evaluation, scores, out)
    return scores


def write_scores(recipe: Recipe, evaluation: Evaluation, scores: pd.DataFrame, out: Path) -> None:
    """Keep scores beside the predictions that they belong to."""
    with replacing(evaluation.scores_file) as temporary:
        temporary.write_text(_first_line(recipe, evaluation, out) + scores.to_csv(index=False), encoding="utf-8")


def _kinds(recipe: Recipe) -> list[str]:
    wanted = {METRICS[name].kind for name in recipe.metrics}
    return [kind for kind in PER_CASE_KINDS if kind in wanted]


def _is_current(line: str, now: str) -> bool:
    """Whether scores were made of what there is now; references that are gone cannot have changed."""
    return line == now or (now.split()[2:] == [NO_REFERENCES] and line.split()[:2] == now.split()[:2])


def _first_line(recipe: Recipe, evaluation: Evaluation, out: Path) -> str:
    """Which predictions were scored, how, and with which references."""
    dataset = recipe.datasets[evaluation.dataset]
    files = (evaluation.predictions / "summary.json", evaluation.predictions)
    written = next((file.stat().st_mtime_ns for file in files if file.exists()), 0)
    how = [dataset.tolerance_mm, dataset.grid, dataset.labels, _kinds(recipe)]
    return f"# {hash_of([evaluation.hash, how, written])} {_hash_of_references(recipe, evaluation, out)}\n"


def _hash_of_references(recipe: Recipe, evaluation: Evaluation, out: Path) -> str:
    """Of names, sizes and times of the files; found without nnU-Net, whose import would take longer than a table."""
    dataset, test = recipe.datasets[evaluation.dataset], test_of(recipe, evaluation)
    raw, preprocessed = (Path(nnunet_folder(recipe, out, name)) for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    if test is not None and test.labels is not None:
        folders = [raw / dataset.folder / test.labels]
    else:
        other = dataset if test is None else recipe.datasets[str(test.dataset)]
        own = (root / other.folder for root in (preprocessed, raw))
        folders = [folder / name for folder in own for name in ("gt_segmentations", "labelsTr")]
    for folder in filter(Path.is_dir, folders):
        files = [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in os.scandir(folder)]
        return hash_of(sorted(files)) if files else NO_REFERENCES
    return NO_REFERENCES


def _evaluate(recipe: Recipe, evaluation: Evaluation, out: Path) -> pd.DataFrame:
    # imported late: a table of cached scores needs neither nnU-Net nor torch
    from nnunet_kd.evaluation.folder import evaluate_folder
    from nnunet_kd.evaluation.reference import ReferenceDataset
    from nnunet_kd.evaluation.resized_grid import evaluate_on_grid

    dataset = recipe.datasets[evaluation.dataset]
    own = ReferenceDataset.open(dataset.folder)
    references = references_of(recipe, evaluation, out)
    shared = (references.folder, evaluation.predictions, own.dataset_json)
    parts, kinds = [], _kinds(recipe)
    if "segmentation" in kinds:
        tolerance = dataset.tolerance_mm
        parts.append(
            evaluate_folder(
                *shared, cases=references.cases, classes=references.classes, tolerance_mm=tolerance, show_progress=False
            )
        )
    if "resized_grid" in kinds and dataset.grid:
        parts.append(evaluate_on_grid(*shared, dataset.grid, cases=references.cases, classes=references.classes))
    if len(parts) == 2:
        return parts[0].merge(parts[1], on=["case", "class"])
    return parts[0]


def references_of(recipe: Recipe, evaluation: Evaluation, out: Path) -> References:
    """The references of an evaluation.

    Raises:
        NnUNetKDError: They do not exist, or have no class of the run's dataset.
    """
    from nnunet_kd.evaluation.folder import foreground_classes
    from nnunet_kd.evaluation.reference import ReferenceDataset

    dataset, test = recipe.datasets[evaluation.dataset], test_of(recipe, evaluation)
    own = ReferenceDataset.open(dataset.folder)
    ending = own.dataset_json["file_ending"]
    classes = {name: value for value, name in enumerate(dataset.labels) if value} or foreground_classes(
        own.dataset_json
    )
    if test is not None and test.labels is not None:
        folder = Path(nnunet_folder(recipe, out, "nnUNet_raw")) / dataset.folder / test.labels
        return References(folder, sorted(file.name[: -len(ending)] for file in folder.glob(f"*{ending}")), classes)
    other = own if test is None else ReferenceDataset.open(recipe.datasets[str(test.dataset)].folder)
    if other.segmentation_folder is None:
        raise NnUNetKDError(f"{other.name} has no reference segmentations in {', '.join(map(str, other.folders))}.")
    if test is not None:
        classes = _common(classes, foreground_classes(other.dataset_json), own.name, other.name)
    if test is None or test.cases == "validation":
        return References(other.segmentation_folder, other.validation_cases(evaluation.run.fold), classes)
    return References(other.segmentation_folder, other.segmented_cases(), classes)


def _common(own: Mapping[str, Label], others: Mapping[str, Label], name: str, other_name: str) -> dict[str, Label]:
    """The classes that both have under one name.

    Raises:
        NnUNetKDError: There are none, or one has another label in each.
    """
    common = {key: value for key, value in own.items() if key in others}
    different = [key for key, value in common.items() if others[key] != value]
    if different or not common:
        what = f"'{different[0]}' under one label" if different else "a class in common"
        raise NnUNetKDError(
            f"{name} and {other_name} do not have {what} ({dict(own)}, {dict(others)}), so predictions of the one "
            f"cannot be compared with references of the other."
        )
    return common
