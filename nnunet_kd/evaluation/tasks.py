"""Predictions of all tasks as files, and their evaluation against the references of a dataset.

A prediction folder holds any of: segmentations ``<case><file ending>``; ``classification.csv`` with the header
``case,<target>/<class>,...`` and probabilities; ``boxes.json``, case -> list of
``{"label": CLASS, "box": [x0, y0, (z0,) x1, y1, (z1)], "score": s}``, by falling score, in voxel-edge coordinates of
the stored image. This module is the one place that knows these formats.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from numpy.typing import NDArray

from nnunet_kd.data.member import dataset_name, read_json
from nnunet_kd.data.side_files import (
    CaseBoxes,
    Problem,
    SideFileError,
    flip_axes,
    read_boxes,
    read_labels,
    read_rows,
)
from nnunet_kd.data.splits import REPAIR_SPLITS, read_groups
from nnunet_kd.data.tasks import CLASSIFICATION_FILE, DETECTION_FILE, ClassificationTarget, DetectionTarget, Tasks
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
    PredictedBoxes,
    evaluate_detection,
)
from nnunet_kd.evaluation.folder import evaluate_folder
from nnunet_kd.files import replacing

TASKS = ("segmentation", "classification", "detection")
SEGMENTATION_METRICS = ("dice", "nsd", "hd95_mm", "volume_error_ml")
# probabilities of a softmax that were written with a few digits only still add up to 1 within this
SUM_TOLERANCE = 1e-2
PREDICT_AGAIN = "Predict again with nnUNetKD_predict, or correct the file."

# case -> target name -> probabilities [C]
ClassPredictions: TypeAlias = dict[str, dict[str, Array]]
# class (empty for all classes), metric, value, low, high
Row: TypeAlias = dict[str, Any]


# --- prediction files -------------------------------------------------------------------------------------------------
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


# --- references -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ReferenceDataset:
    """A dataset with references.

    Attributes:
        name: Name of its folder.
        folders: Where its files are looked for, in this order: the given folder, and the dataset's folders in
            nnUNet_preprocessed and nnUNet_raw.
        dataset_json: Its dataset.json.
        tasks: What it has labels for.
    """

    name: str
    folders: tuple[Path, ...]
    dataset_json: Mapping[str, Any]
    tasks: Tasks

    @classmethod
    def open(cls, reference: str) -> ReferenceDataset:
        """Open a raw or preprocessed dataset folder, or a dataset id or name that nnU-Net's folders have.

        Raises:
            NnUNetKDError: There is no such dataset, or its dataset.json is missing or broken.
        """
        given = [Path(reference).resolve()] if Path(reference).is_dir() else []
        name = given[0].name if given else dataset_name(reference)
        roots = [Path(str(root)) for root in (nnUNet_preprocessed, nnUNet_raw) if root.is_set()]
        known = [folder.resolve() for folder in (root / name for root in roots) if folder.is_dir()]
        folders = tuple(dict.fromkeys([*given, *known]))
        if not folders:
            raise NnUNetKDError(
                f"{reference} is neither a folder nor a dataset in nnUNet_preprocessed or nnUNet_raw. Give with -ref a "
                f"raw or preprocessed dataset folder, or a dataset id."
            )
        file = _find(folders, ("dataset.json",)) or folders[0] / "dataset.json"
        dataset_json = read_json(file, "Give with -ref a raw or preprocessed dataset folder, or a dataset id.")
        return cls(name, folders, dataset_json, Tasks.from_dataset_json(dataset_json))

    def file(self, name: str) -> Path:
        """A file of the dataset.

        Raises:
            NnUNetKDError: No folder has it.
        """
        found = _find(self.folders, (name,))
        if found is None:
            searched = " nor in ".join(str(folder) for folder in self.folders)
            raise NnUNetKDError(f"{name} of {self.name} is not in {searched}. Put it there, or give another -ref.")
        return found

    @property
    def segmentation_folder(self) -> Path | None:
        """``gt_segmentations`` or ``labelsTr``; None if there is neither."""
        return _find(self.folders, ("gt_segmentations", "labelsTr"))

    def segmented_cases(self) -> list[str]:
        """Cases with a reference segmentation, sorted."""
        return _stems(self.segmentation_folder, self.dataset_json["file_ending"])

    def cases(self) -> set[str]:
        """All training cases, also those without any label."""
        images = _stems(_find(self.folders, ("imagesTr",)), self.dataset_json["file_ending"])
        with_image = {image.rpartition("_")[0] for image in images}  # without the channel number
        return with_image | set(self.segmented_cases()) | set(self.dataset_json.get("dataset", {}))

    def groups(self) -> dict[str, str]:
        """Case to group by ``split_by``; empty without it.

        Raises:
            NnUNetKDError: The file or the column is missing, or the file is not UTF-8.
        """
        if self.tasks.split_by is None:
            return {}
        file = self.file(self.tasks.groups_file)
        try:
            return read_groups(file, self.tasks.split_by)
        except UnicodeDecodeError as error:
            raise NnUNetKDError(f"{file} is not UTF-8. Save it with the encoding UTF-8.") from error

    def validation_cases(self, fold: int) -> list[str]:
        """Validation cases of a fold of splits_final.json.

        Raises:
            NnUNetKDError: There is no such file or fold.
        """
        file = self.file("splits_final.json")
        splits = read_json(file, REPAIR_SPLITS)
        if not isinstance(splits, list) or not all(isinstance(split, dict) and "val" in split for split in splits):
            raise NnUNetKDError(f"{file} is not a list of folds that have 'train' and 'val'. {REPAIR_SPLITS}")
        if not 0 <= fold < len(splits):
            raise NnUNetKDError(f"{file} has no fold {fold}. Its folds are 0 to {len(splits) - 1}.")
        return sorted(splits[fold]["val"])


def _find(folders: Iterable[Path], names: Sequence[str]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).exists()), None)


def _stems(folder: Path | None, file_ending: str) -> list[str]:
    files = [] if folder is None else folder.glob(f"*{file_ending}")
    return sorted(file.name[: -len(file_ending)] for file in files)


# --- evaluation -------------------------------------------------------------------------------------------------------
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
    cases = selection.of("detection", predictions, reference.cases() | boxes.keys())
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
