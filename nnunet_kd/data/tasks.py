"""The tasks that a dataset declares in dataset.json under ``nnunet_kd``: segmentation, classification, detection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.settings import BLOCK

CLASSIFICATION_FILE = "classification.csv"
DETECTION_FILE = "boxes.json"
ONE_COLUMN = '{"file": "classification.csv", "column": "grade", "classes": ["II", "III"]}'
SEVERAL_COLUMNS = '{"file": "classification.csv", "columns": ["effusion", "nodule"]}'
DETECTION = '{"file": "boxes.json", "classes": ["nodule"]}'
CLASSIFICATION_FORM = f"{ONE_COLUMN}, or {SEVERAL_COLUMNS} (one column of 0 and 1 per finding), or a list of these"


class TaskError(NnUNetKDError):
    """``nnunet_kd`` in a dataset.json declares tasks in a form that is not allowed."""


@dataclass(frozen=True)
class ClassificationTarget:
    """One thing to classify per image.

    Attributes:
        name: Name in the outputs; by default the column, or "findings" where several columns are given.
        file: CSV file beside dataset.json.
        columns: One column whose values are the classes, or one column of 0 and 1 per finding.
        classes: Classes in the order of the outputs; of findings, the columns.
        multilabel: Several classes may be present at once (a sigmoid per class instead of a softmax).
    """

    name: str
    file: str
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    multilabel: bool


@dataclass(frozen=True)
class DetectionTarget:
    """Objects to find as boxes.

    Attributes:
        file: JSON file beside dataset.json.
        classes: Classes in the order of the outputs.
    """

    file: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Tasks:
    """What a dataset has labels for.

    Attributes:
        segmentation: ``labelsTr`` holds real segmentations.
        classification: Targets in the order of their declaration.
        detection: None without boxes.
        split_by: Column of ``groups_file`` whose values must not be on both sides of a fold (patient, site).
    """

    segmentation: bool = True
    classification: tuple[ClassificationTarget, ...] = ()
    detection: DetectionTarget | None = None
    split_by: str | None = None

    @classmethod
    def from_dataset_json(cls, dataset_json: Mapping[str, Any]) -> Tasks:
        """Read ``nnunet_kd.tasks`` and ``nnunet_kd.split_by``; without them a dataset is segmentation only.

        Raises:
            TaskError: Keys or values have another form than the allowed one, one per line, or no task is left.
        """
        wrong: list[TaskError] = []
        tasks = cls.understood(dataset_json, wrong)
        if wrong:
            raise TaskError("\n".join(map(str, wrong)))
        return tasks

    @classmethod
    def understood(cls, dataset_json: Mapping[str, Any], wrong: list[TaskError]) -> Tasks:
        """As :meth:`from_dataset_json`, but what has another form is collected in ``wrong`` and left out."""
        block = _object(dataset_json.get(BLOCK, {}), BLOCK, '{"tasks": {...}, "split_by": COLUMN}', wrong) or {}
        own = [key for key in block if key != "members"]  # which a joint dataset has
        _known_keys(own, BLOCK, ("tasks", "split_by"), wrong)
        form = '{"segmentation": true, "classification": ..., "detection": ...}'
        tasks = _object(block.get("tasks", {}), "tasks", form, wrong) or {}
        _known_keys(tasks, "tasks", ("segmentation", "classification", "detection"), wrong)
        segmentation, split_by = tasks.get("segmentation", True), block.get("split_by")
        if not isinstance(segmentation, bool):
            wrong.append(_wrong("tasks.segmentation", segmentation, "true or false"))
        if split_by is not None and not _is_name(split_by):
            wrong.append(_wrong("split_by", split_by, f"the name of a column of {CLASSIFICATION_FILE}"))
            split_by = None
        classification = _classification(tasks["classification"], wrong) if "classification" in tasks else ()
        detection = _detection(tasks["detection"], wrong) if "detection" in tasks else None
        if not wrong and not segmentation and not classification and detection is None:
            wrong.append(
                TaskError(
                    f"dataset.json declares no task: {BLOCK}.tasks.segmentation is false and there is neither "
                    f"'classification' nor 'detection'. Declare one, for example \"detection\": {DETECTION}."
                )
            )
        return cls(segmentation is not False, classification, detection, split_by)

    @property
    def is_segmentation_only(self) -> bool:
        """Segmentation is the one task, as in stock nnU-Net."""
        return self.segmentation and not self.classification and self.detection is None

    def with_heads(self, classification: Mapping[str, Any] | None, detection: Mapping[str, Any] | None) -> Tasks:
        """The tasks that a network learns which has heads with these settings (None: no such head).

        Raises:
            TaskError: A head was planned for other targets or classes than are declared.
        """
        targets = [[target.name, len(target.classes)] for target in self.classification]
        if classification is not None and list(map(list, classification["targets"])) != targets:
            raise TaskError(_changed("tasks.classification", targets, classification["targets"]))
        classes = [] if self.detection is None else list(self.detection.classes)
        if detection is not None and list(detection["classes"]) != classes:
            raise TaskError(_changed("tasks.detection", classes, detection["classes"]))
        return replace(
            self,
            classification=() if classification is None else self.classification,
            detection=None if detection is None else self.detection,
        )

    @property
    def meaning(self) -> dict[str, Any]:
        """What the outputs of heads for these tasks mean, as plain JSON types: targets and classes in their order."""
        return {
            "segmentation": self.segmentation,
            "classification": [
                {"name": own.name, "classes": list(own.classes), "multilabel": own.multilabel}
                for own in self.classification
            ],
            "detection": None if self.detection is None else list(self.detection.classes),
        }

    @property
    def groups_file(self) -> str:
        """The file with the column ``split_by``: the first classification target's, else classification.csv."""
        return self.classification[0].file if self.classification else CLASSIFICATION_FILE


# --- forms: each function collects all that is wrong, and gives what can be understood -----------------------------
def _classification(value: Any, wrong: list[TaskError]) -> tuple[ClassificationTarget, ...]:
    key = "tasks.classification"
    entries = value if isinstance(value, list) else [value]
    if not entries:
        wrong.append(_wrong(key, value, CLASSIFICATION_FORM))
    targets: dict[str, ClassificationTarget] = {}
    for index, entry in enumerate(entries):
        target = _target(entry, f"{key}[{index}]" if isinstance(value, list) else key, wrong)
        if target is not None and targets.setdefault(target.name, target) is not target:
            wrong.append(
                TaskError(
                    f"{BLOCK}.{key} in dataset.json has several targets named '{target.name}'. Give each a \"name\" of "
                    f"its own."
                )
            )
    return tuple(targets.values())


def _target(value: Any, key: str, wrong: list[TaskError]) -> ClassificationTarget | None:
    entry = _object(value, key, CLASSIFICATION_FORM, wrong)
    if entry is None:
        return None
    _known_keys(entry, key, ("name", "file", "column", "columns", "classes"), wrong)
    file = _file(entry, key, CLASSIFICATION_FILE, wrong)
    columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    default_name: Any = "findings"
    if ("column" in entry) == ("columns" in entry):
        wrong.append(
            TaskError(
                f"{BLOCK}.{key} in dataset.json needs either 'column' or 'columns', and has {_both_or_none(entry)}. "
                f"Write {CLASSIFICATION_FORM}."
            )
        )
    elif "columns" in entry:
        columns = classes = _names(entry["columns"], f"{key}.columns", '["effusion", "nodule"]', 1, wrong)
        if "classes" in entry:
            wrong.append(
                TaskError(
                    f"{BLOCK}.{key} in dataset.json has 'columns' and 'classes', but every column is a class of its "
                    f"own there. Remove 'classes', or name one 'column' whose values are the classes."
                )
            )
    else:
        if _is_name(entry["column"]):
            columns, default_name = (entry["column"],), entry["column"]
        else:
            wrong.append(_wrong(f"{key}.column", entry["column"], f"the name of a column of {file or 'the file'}"))
        classes = _names(entry.get("classes"), f"{key}.classes", '["benign", "malignant"]', 2, wrong)
    name = entry.get("name", default_name)
    if not _is_name(name) or "/" in name:
        # predictions name their columns TARGET/CLASS
        wrong.append(_wrong(f"{key}.name", name, "a text without '/' (by default the column)"))
        return None
    if file is None or columns is None or classes is None:
        return None
    return ClassificationTarget(name, file, columns, classes, multilabel="columns" in entry)


def _both_or_none(entry: Mapping[str, Any]) -> str:
    return "both" if "column" in entry else "neither"


def _detection(value: Any, wrong: list[TaskError]) -> DetectionTarget | None:
    key = "tasks.detection"
    entry = _object(value, key, DETECTION, wrong)
    if entry is None:
        return None
    _known_keys(entry, key, ("file", "classes"), wrong)
    classes = _names(entry.get("classes"), f"{key}.classes", '["nodule"]', 1, wrong)
    file = _file(entry, key, DETECTION_FILE, wrong)
    return None if classes is None or file is None else DetectionTarget(file, classes)


def _object(value: Any, key: str, form: str, wrong: list[TaskError]) -> Mapping[str, Any] | None:
    if isinstance(value, Mapping):
        return value
    wrong.append(_wrong(key, value, form))
    return None


def _known_keys(entry: Iterable[str], key: str, allowed: Sequence[str], wrong: list[TaskError]) -> None:
    for unknown in sorted(set(entry) - set(allowed)):
        wrong.append(
            TaskError(
                f"{_place(key)} in dataset.json has the unknown key '{unknown}'. Allowed are {', '.join(allowed)}."
            )
        )


def _file(entry: Mapping[str, Any], key: str, default: str, wrong: list[TaskError]) -> str | None:
    file = entry.get("file", default)
    if _is_name(file) and PurePath(file).name == file:
        return str(file)
    wrong.append(_wrong(f"{key}.file", file, f"the name of a file beside dataset.json, for example '{default}'"))
    return None


def _names(value: Any, key: str, form: str, minimum: int, wrong: list[TaskError]) -> tuple[str, ...] | None:
    """The different names in the order of the list."""
    form = f"a list of at least {minimum} different text(s), for example {form}"
    if not isinstance(value, list) or not all(_is_name(name) for name in value) or len(set(value)) < minimum:
        wrong.append(_wrong(key, value, form))
        return None
    repeated = [name for name in dict.fromkeys(value) if value.count(name) > 1]
    if repeated:
        names = ", ".join(f"'{name}'" for name in repeated)
        wrong.append(TaskError(f"{_place(key)} in dataset.json names {names} more than once. Leave each once."))
    return tuple(dict.fromkeys(value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value == value.strip()


def _changed(key: str, declared: Any, planned: Any) -> str:
    return (
        f"{BLOCK}.{key} in dataset.json declares {declared}, but the plans have a head for {planned}. Run "
        f"nnUNetKD_plan_and_preprocess again (with the flags used before), or put back the dataset.json of that time."
    )


def _wrong(key: str, value: Any, form: str) -> TaskError:
    return TaskError(f"{_place(key)} in dataset.json is {value!r}. It must be {form}.")


def _place(key: str) -> str:
    return key if key == BLOCK else f"{BLOCK}.{key}"
