"""Evaluation of all tasks of a prediction folder against the references of a dataset."""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from nnunet_kd.data.side_files import (
    CaseBoxes,
    read_boxes,
    read_labels,
)
from nnunet_kd.data.tasks import CLASSIFICATION_FILE, DETECTION_FILE, ClassificationTarget, DetectionTarget
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.classification import (
    Array,
    ClassificationScores,
    evaluate_classification,
    group_keys,
    interval_of,
    resample_groups,
)
from nnunet_kd.evaluation.detection import (
    FALSE_POSITIVE_RATES,
    FROC_IOU,
    DetectionScores,
    evaluate_detection,
)
from nnunet_kd.evaluation.folder import evaluate_folder
from nnunet_kd.evaluation.prediction_files import (
    read_box_predictions,
    read_classification_predictions,
)
from nnunet_kd.evaluation.reference import ReferenceDataset

TASKS = ("segmentation", "classification", "detection")
SEGMENTATION_METRICS = ("dice", "nsd", "hd95_mm", "volume_error_ml")

# class (empty for all classes), metric, value, low, high
Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class TargetEvaluation:
    """One classification target: its scores and what they were computed from, [N, C] each."""

    target: ClassificationTarget
    cases: tuple[str, ...]
    reference: Array
    probabilities: Array
    scores: ClassificationScores


@dataclass
class Evaluation:
    """What a prediction folder is worth, task by task; None and empty where a task was not evaluated.

    Attributes:
        segmentation: One row per case and class, see ``evaluate_folder``.
        segmentation_rows: See ``summarize_segmentation``.
        classification: Per target.
        detection: The detection task.
        notes: What the numbers do not say, for example how many cases were left out.
    """

    segmentation: pd.DataFrame | None = None
    segmentation_rows: list[Row] = field(default_factory=list)
    classification: list[TargetEvaluation] = field(default_factory=list)
    detection: DetectionScores | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All metrics in JSON types; a value that does not exist (NaN) is null."""
        content: dict[str, Any] = {"notes": self.notes}
        if self.segmentation is not None:
            classes: dict[str, dict[str, Any]] = {}
            for row in self.segmentation_rows:
                interval = {key: row[key] for key in ("value", "low", "high")}
                classes.setdefault(row["class"], {})[row["metric"]] = interval
            mean = classes.pop("")
            num_cases = self.segmentation["case"].nunique()
            content["segmentation"] = {"num_cases": num_cases, "classes": classes, "mean": mean}
        if self.classification:
            content["classification"] = {own.target.name: asdict(own.scores) for own in self.classification}
        if self.detection is not None:
            content["detection"] = {"froc_rates": FALSE_POSITIVE_RATES, "froc_iou": FROC_IOU, **asdict(self.detection)}
            for own in content["detection"]["classes"]:
                del own["curve"]  # thousands of points, for the figure
        return _in_json_types(content)


def evaluate_tasks(
    reference: ReferenceDataset,
    prediction_folder: Path,
    *,
    tasks: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    tolerance_mm: float = 2.0,
    num_resamples: int = 1000,
    seed: int = 0,
    show_progress: bool = True,
) -> Evaluation:
    """Evaluate the predictions of a folder.

    Args:
        reference: The dataset with the references.
        prediction_folder: The predictions.
        tasks: Some of ``TASKS``. Default: those that the dataset declares and the folder has predictions for.
        cases: Cases to evaluate, all of which must be predicted. Default: all predicted cases of the dataset.
        tolerance_mm: Tolerance of the normalised surface Dice.
        num_resamples: Bootstrap samples of the intervals; groups by ``split_by`` are drawn as a whole.
        seed: Of the bootstrap.
        show_progress: Show a progress bar for segmentations.

    Raises:
        NnUNetKDError: A task that was asked for is missing on one side, there is nothing to evaluate, or a file is
            missing or wrong.
    """
    missing = {task: _missing(task, reference, prediction_folder) for task in TASKS}
    chosen = [task for task in TASKS if not missing[task]] if tasks is None else list(tasks)
    for task in chosen:
        if missing[task]:
            raise NnUNetKDError(f"{task} cannot be evaluated: {missing[task]}")
    if not chosen:
        reasons = "\n".join(f"  {task}: {reason}" for task, reason in missing.items())
        raise NnUNetKDError(f"There is nothing to evaluate in {prediction_folder}.\n{reasons}")
    evaluation = Evaluation()
    selection = _Selection(prediction_folder, cases, evaluation.notes)
    bootstrap = _Bootstrap(reference.groups(), num_resamples, seed)
    if "segmentation" in chosen and reference.segmentation_folder is not None:
        ending = reference.dataset_json["file_ending"]
        with_reference = reference.segmented_cases()
        predicted = [case for case in with_reference if (prediction_folder / f"{case}{ending}").is_file()]
        evaluation.segmentation = evaluate_folder(
            reference.segmentation_folder,
            prediction_folder,
            reference.dataset_json,
            cases=selection.of("segmentation", predicted, with_reference),
            tolerance_mm=tolerance_mm,
            show_progress=show_progress,
        )
        evaluation.segmentation_rows = summarize_segmentation(evaluation.segmentation, **vars(bootstrap))
    if "classification" in chosen:
        evaluation.classification = _evaluate_classification(reference, selection, bootstrap)
    if "detection" in chosen and reference.tasks.detection is not None:
        evaluation.detection = _evaluate_detection(reference, reference.tasks.detection, selection, bootstrap)
    return evaluation


def summarize_segmentation(
    rows: pd.DataFrame, groups: Mapping[str, Hashable], num_resamples: int = 1000, seed: int = 0
) -> list[Row]:
    """Mean over the cases in which a class has a value, with bootstrap intervals over groups.

    Args:
        rows: As returned by ``evaluate_folder``.
        groups: Case to group; a case without one is a group of its own.
        num_resamples: Number of bootstrap samples.
        seed: Of the bootstrap.

    Returns:
        One row per class and metric: ``class``, ``metric``, ``value``, ``low``, ``high``; class "" is the mean over
        classes within each case, averaged over cases.
    """
    classes = list(dict.fromkeys(rows["class"]))
    per_case = rows.set_index(["case", "class"])[list(SEGMENTATION_METRICS)].unstack("class")
    keys = group_keys(per_case.index, groups)
    weights = np.concatenate([np.zeros((0, len(keys))), *resample_groups(keys, num_resamples, seed=seed)])
    summary: list[Row] = []
    for name in [*classes, ""]:
        for metric in SEGMENTATION_METRICS:
            column = per_case[metric][name] if name else per_case[metric].mean(axis=1)
            known = ~column.isna().to_numpy()
            values = column.to_numpy(dtype=np.float64)[known]
            drawn = weights[:, known]
            total = drawn.sum(axis=1)
            means = np.divide(drawn @ values, total, out=np.full(len(total), np.nan), where=total > 0)
            interval = interval_of(float(values.mean()) if len(values) else float("nan"), means, len(set(keys)))
            summary.append({"class": name, "metric": metric, **vars(interval)})
    return summary


@dataclass(frozen=True)
class _Bootstrap:
    """What all bootstrap intervals of an evaluation share."""

    groups: Mapping[str, Hashable]
    num_resamples: int
    seed: int


@dataclass(frozen=True)
class _Selection:
    """Which cases of a prediction folder are evaluated: the named ones, or all that the dataset has (None)."""

    folder: Path
    cases: Sequence[str] | None
    notes: list[str]

    def of(self, what: str, predicted: Collection[str], known: Collection[str]) -> list[str]:
        """The cases to evaluate.

        Args:
            what: Task or target, for messages.
            predicted: Cases that have a prediction.
            known: Cases that can have a reference.

        Raises:
            NnUNetKDError: A named case lacks a prediction or is not known, or no case is left.
        """
        if self.cases is not None:
            for having, lack in (
                (known, "are not in the dataset"),
                (predicted, f"have no prediction in {self.folder}"),
            ):
                without = [case for case in self.cases if case not in having]
                if without:
                    raise NnUNetKDError(
                        f"{what}: {len(without)} of {len(self.cases)} cases {lack}, among them "
                        f"{', '.join(without[:5])}. Predict them, or name other cases."
                    )
            return list(self.cases)
        own = [case for case in predicted if case in known]
        if not own:
            raise NnUNetKDError(
                f"{what}: none of the {len(predicted)} predicted cases in {self.folder} is a case of the dataset. Give "
                f"with -ref the dataset whose training images were predicted."
            )
        if len(own) < len(predicted):
            self.notes.append(f"{what}: {len(predicted) - len(own)} predicted cases are not in the dataset")
        return own


def _missing(task: str, reference: ReferenceDataset, folder: Path) -> str:
    """Why a task cannot be evaluated; empty if it can."""
    declared = {
        "segmentation": reference.tasks.segmentation,
        "classification": bool(reference.tasks.classification),
        "detection": reference.tasks.detection is not None,
    }
    if not declared[task]:
        return f"dataset.json of {reference.name} declares no {task}."
    if task == "segmentation":
        ending = reference.dataset_json["file_ending"]
        cases = reference.segmented_cases()
        if not cases:
            searched = ", ".join(str(own) for own in reference.folders)
            return f"there are no reference segmentations (gt_segmentations or labelsTr, {ending}) in {searched}."
        if not any((folder / f"{case}{ending}").is_file() for case in cases):
            return f"{folder} has no segmentation of a case of {reference.name}, for example {cases[0]}{ending}."
        return ""
    file = {"classification": CLASSIFICATION_FILE, "detection": DETECTION_FILE}[task]
    return "" if (folder / file).is_file() else f"{folder} has no {file}."


def _evaluate_classification(
    reference: ReferenceDataset, selection: _Selection, bootstrap: _Bootstrap
) -> list[TargetEvaluation]:
    targets = reference.tasks.classification
    predictions = read_classification_predictions(selection.folder / CLASSIFICATION_FILE, targets)
    evaluated = []
    for target in targets:
        labels = read_labels(reference.file(target.file), target)
        cases = selection.of(target.name, predictions, reference.cases() | labels.keys())
        not_labelled = np.full(len(target.classes), np.nan)
        truth = np.array([labels.get(case, not_labelled) for case in cases], dtype=np.float64)
        probabilities = np.array([predictions[case][target.name] for case in cases])
        scores = evaluate_classification(
            truth,
            probabilities,
            target.classes,
            multilabel=target.multilabel,
            groups=group_keys(cases, bootstrap.groups),
            num_resamples=bootstrap.num_resamples,
            seed=bootstrap.seed,
        )
        if scores.num_cases < len(cases):
            selection.notes.append(
                f"{target.name}: {len(cases) - scores.num_cases} of {len(cases)} cases have no label"
            )
        evaluated.append(TargetEvaluation(target, tuple(cases), truth, probabilities, scores))
    return evaluated


def _evaluate_detection(
    reference: ReferenceDataset, target: DetectionTarget, selection: _Selection, bootstrap: _Bootstrap
) -> DetectionScores:
    references, predicted = reference.file(target.file), selection.folder / DETECTION_FILE
    dimension = _dimension(references) or _dimension(predicted) or 2
    boxes = read_boxes(references, target, dimension)
    predictions = read_box_predictions(predicted, target.classes, dimension)
    known = reference.cases() | boxes.keys()
    cases = selection.of("detection", predictions, known)
    left_out = len(known - set(cases))
    if selection.cases is None and left_out:
        selection.notes.append(
            f"detection: {left_out} cases of the dataset have no entry in {predicted} and are not counted (a case that "
            f"was predicted without boxes needs an empty list there)"
        )
    nothing = CaseBoxes(np.zeros(0, dtype=np.int64), np.zeros((0, 2 * dimension)))
    return evaluate_detection(
        {case: boxes.get(case, nothing) for case in cases},
        {case: predictions[case] for case in cases},
        target.classes,
        **vars(bootstrap),
    )


def _dimension(file: Path) -> int | None:
    """Dimension of the first box in a file; None without one, or where the file is malformed, which its reader says."""
    try:
        lists = json.loads(file.read_text(encoding="utf-8-sig")).values()
        return next(
            (len(entry["box"]) // 2 for entries in lists for entry in entries if len(entry["box"]) in (4, 6)), None
        )
    except (ValueError, AttributeError, KeyError, TypeError):
        return None


def _in_json_types(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _in_json_types(own) for key, own in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_in_json_types(own) for own in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value
