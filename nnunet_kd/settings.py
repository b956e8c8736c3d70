"""The ``nnunet_kd`` settings: parse, merge, validate, write (our design).

Settings come from, later over earlier: the trainer's preset; what the joint dataset says of the member; the block
``nnunet_kd`` of the plans file; the environment variable ``nnUNetKD_settings`` (a JSON or YAML file, or inline JSON).
Objects merge deeply, lists replace. An unknown key or a value out of range is a :class:`SettingsError` that names the
key and what is allowed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from nnunet_kd.errors import SettingsError

ENVIRONMENT_VARIABLE = "nnUNetKD_settings"
BLOCK = "nnunet_kd"


@dataclass(frozen=True)
class Training:
    """The budget. Defaults are stock nnU-Net's.

    ``loss``: of the segmentation; "ce" leaves out the Dice part. ``num_threads``: of torch on a CPU; null takes all, as
    nnU-Net does.
    """

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    initial_lr: float = 0.01
    weight_decay: float = 3e-5
    oversample_foreground_percent: float = 0.33
    seed: int | None = None
    save_every: int = 50
    num_threads: int | None = None
    loss: Literal["dice_ce", "ce"] = "dice_ce"


@dataclass(frozen=True)
class TaskSettings:
    """How a dataset's tasks are trained together, where its plans have heads for them.

    ``segmentation``, ``classification``, ``detection``: weights of the tasks' losses. ``balance``: how rare image-level
    classes are made up for: "sampling" draws each class, and each group of a class, equally often; "loss" weighs the
    loss by class frequency; "none". ``label_smoothing``: of the classification loss, in [0, 1). ``minimum_visible``: a
    box counts in a patch where at least this fraction of its object is visible, in [0, 1].
    """

    segmentation: float = 1.0
    classification: float = 1.0
    detection: float = 1.0
    balance: Literal["sampling", "loss", "none"] = "sampling"
    label_smoothing: float = 0.0
    minimum_visible: float = 0.3


@dataclass(frozen=True)
class Schedule:
    """Weight factor over the training: constant, or a linear or cosine ramp from ``start`` to ``warmup``.

    ``start`` and ``warmup`` are fractions of all epochs in [0, 1].
    """

    kind: Literal["constant", "linear", "cosine"] = "linear"
    warmup: float = 0.1
    start: float = 0.0


@dataclass(frozen=True)
class Guard:
    """What keeps a weak teacher from hurting (our design). See ``training/guard.py``, also for the scores of the tasks.

    ``margin``: the terms of a teacher fade out linearly while its score on the training batches falls behind the
    student's by up to this margin; null switches the fading off.
    ``exponent``: the terms of a teacher are multiplied by its score on the training batches to this power; 0 is off.
    """

    margin: float | None = None
    exponent: float = 0.0

    @property
    def watches(self) -> bool:
        """Whether the scores of teacher and student on the training batches are needed."""
        return self.margin is not None or self.exponent > 0


@dataclass(frozen=True)
class ShapeIntensity:
    """Shape-intensity distillation (SIKD), see ``training/shape_intensity.py``.

    ``recipe``: "nnunet" is nnU-Net's loss and standardised features, "paper" what the paper has. ``scope``: a class is
    averaged over the "patch" that the teacher sees, or over the whole "case"; students take that of their teacher.
    """

    recipe: Literal["nnunet", "paper"] = "nnunet"
    scope: Literal["patch", "case"] = "patch"


@dataclass(frozen=True)
class Teacher:
    """Where targets come from. ``model`` is a trained model folder, absolute or relative to ``nnUNet_results``.

    ``kind``: "nnunet" sees the student's images, "class_average" (SIKD) their class-wise averages.
    """

    kind: Literal["nnunet", "class_average"] = "nnunet"
    model: str = ""
    fold: int | str | list[int] = "same"
    checkpoint: str = "checkpoint_final.pth"
    head: str | None = None
    labels: dict[str, str] | None = None
    allow_leakage: bool = False
    precision: Literal["auto", "float32"] = "auto"


@dataclass(frozen=True)
class Term:
    """One line of the student's extra loss. ``options`` go to the loss (for example ``balance`` of kl).

    ``on``: what is compared: segmentation logits, features of ``levels``, logits of the classification targets, or
    boxes. Of the terms on boxes, "imitation" compares features too and takes the levels of the student's detection head
    where it names none. ``foreground_only``: patches of nothing but background do not count (features only).
    """

    teacher: str = "joint"
    on: Literal["logits", "features", "classification", "boxes"] = "logits"
    loss: str = "kl"
    weight: float = 1.0
    temperature: float | None = None
    schedule: Schedule = field(default_factory=Schedule)
    deep_supervision: bool = True
    levels: list[str] = field(default_factory=list)
    foreground_only: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """All settings of one training.

    ``joint`` names the joint dataset whose teacher a student uses, where several fit. The next four belong to the
    joint teacher. ``sampling_exponent``: a member with n training cases is drawn with p ~ n^exponent. ``budget``:
    "member" multiplies the teacher's iterations so that every member gets at least the steps that its control gets,
    "total" keeps ``num_iterations_per_epoch`` for all members together. ``alignment`` "dann" adds a classifier of the
    member behind gradient reversal at the bottleneck.
    """

    joint: str | None = None
    training: Training = field(default_factory=Training)
    tasks: TaskSettings = field(default_factory=TaskSettings)
    sampling_exponent: float = 0.5
    budget: Literal["member", "total"] = "member"
    alignment: Literal["none", "dann"] = "none"
    alignment_weight: float = 0.01
    sikd: ShapeIntensity = field(default_factory=ShapeIntensity)
    teachers: dict[str, Teacher] = field(default_factory=dict)
    terms: list[Term] = field(default_factory=list)
    guard: Guard = field(default_factory=Guard)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, complete with all defaults."""
        return dataclasses.asdict(self)


# keys of the block in a plans file that describe the joint dataset; they are data, not settings
DESCRIPTION_KEYS = ("version", "members", "channels", "heads", "member_of", "student")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` laid on top: objects merge deeply, everything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def read_user_settings(source: str | None = None) -> dict[str, Any]:
    """Read the user's settings from ``source`` or, if None, from the environment variable.

    Args:
        source: Path of a JSON or YAML file, or inline JSON. Empty or unset means no settings.

    Raises:
        SettingsError: The file is missing, or the text is not a JSON or YAML object.
    """
    source = os.environ.get(ENVIRONMENT_VARIABLE, "") if source is None else source
    if not source.strip():
        return {}
    if source.lstrip().startswith("{"):
        text, where = source, f"the inline value of {ENVIRONMENT_VARIABLE}"
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise SettingsError(
                f"{ENVIRONMENT_VARIABLE} names the file {path}, which does not exist. Give an existing JSON or YAML "
                f"file, or inline JSON that starts with '{{'."
            )
        text, where = _read_text(path), str(path)
    try:
        loaded = yaml.safe_load(text) if not text.lstrip().startswith("{") else json.loads(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"The settings in {where} are not valid JSON or YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise SettingsError(f"The settings in {where} must be an object with keys {_names(Settings)}, not {loaded!r}.")
    block = loaded.get(BLOCK, loaded)
    if not isinstance(block, dict):
        raise SettingsError(f"'{BLOCK}' in {where} must be an object with keys {_names(Settings)}, not {block!r}.")
    return block


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"The settings file {path} is no text: {error}. Give a JSON or YAML file.") from error


def parse_settings(values: Mapping[str, Any]) -> Settings:
    """Turn merged plain values into validated :class:`Settings`.

    Raises:
        SettingsError: Unknown key, wrong type, or value out of range; names the key and what is allowed.
    """
    settings = check_types(values)
    _check_ranges(settings)
    return settings


def check_types(values: Mapping[str, Any]) -> Settings:
    """Like :func:`parse_settings`, for settings that are not complete yet: keys and types, but no ranges.

    Raises:
        SettingsError: Unknown key or wrong type; names the key and what is allowed.
    """
    return _parse(Settings, {key: value for key, value in values.items() if key not in DESCRIPTION_KEYS}, "")


def resolve_settings(*layers: Mapping[str, Any]) -> Settings:
    """Merge layers (later over earlier) and parse the result."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, layer)
    return parse_settings(merged)


def without_terms(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer without what only students read, so that one settings file serves teacher, student and control."""
    return {key: value for key, value in layer.items() if key not in ("teachers", "terms", "guard")}


def _names(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def _parse(expected: Any, value: Any, where: str) -> Any:
    """Convert ``value`` to the annotated type ``expected``; ``where`` is the dotted key for messages."""
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        if not isinstance(value, Mapping):
            raise SettingsError(f"'{where}' must be an object with keys {_names(expected)}, not {value!r}.")
        types_of = typing.get_type_hints(expected)
        unknown = [key for key in value if key not in types_of]
        if unknown:
            raise SettingsError(f"Unknown setting '{_join(where, unknown[0])}'. Allowed here: {_names(expected)}.")
        return expected(**{key: _parse(types_of[key], item, _join(where, key)) for key, item in value.items()})
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        if value not in arguments:
            raise SettingsError(f"'{where}' is {value!r}. Allowed: {', '.join(map(repr, arguments))}.")
        return value
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return _parse(option, value, where)
            except SettingsError:
                continue
        raise SettingsError(f"'{where}' is {value!r}. Allowed types: {', '.join(_describe(a) for a in arguments)}.")
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"'{where}' must be a list, not {value!r}.")
        return [_parse(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise SettingsError(f"'{where}' must be an object, not {value!r}.")
        return {str(key): _parse(arguments[1], item, _join(where, str(key))) for key, item in value.items()}
    if expected is Any:
        return value
    if expected is types.NoneType:
        if value is not None:
            raise SettingsError(f"'{where}' must be null, not {value!r}.")
        return None
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise SettingsError(f"'{where}' must be {_describe(expected)}, not {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"'{where}' must be a finite number, not {value!r}.")
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _describe(expected: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    return names.get(expected, str(expected))


def _check_ranges(settings: Settings) -> None:
    training, guard, tasks = settings.training, settings.guard, settings.tasks
    positive = {
        "training.num_epochs": training.num_epochs,
        "training.num_iterations_per_epoch": training.num_iterations_per_epoch,
        "training.num_val_iterations_per_epoch": training.num_val_iterations_per_epoch,
        "training.initial_lr": training.initial_lr,
        "training.save_every": training.save_every,
        "training.num_threads": 1 if training.num_threads is None else training.num_threads,
    }
    for key, value in positive.items():
        if value <= 0:
            raise SettingsError(f"'{key}' is {value}; it must be greater than 0.")
    fractions = {
        "training.oversample_foreground_percent": training.oversample_foreground_percent,
        "tasks.label_smoothing": tasks.label_smoothing,
        "tasks.minimum_visible": tasks.minimum_visible,
    }
    not_negative = {
        "training.seed": training.seed,
        "training.weight_decay": training.weight_decay,
        "tasks.segmentation": tasks.segmentation,
        "tasks.classification": tasks.classification,
        "tasks.detection": tasks.detection,
        "sampling_exponent": settings.sampling_exponent,
        "alignment_weight": settings.alignment_weight,
        "guard.margin": guard.margin,
        "guard.exponent": guard.exponent,
    }
    for index, term in enumerate(settings.terms):
        where = f"terms[{index}]"
        fractions |= {f"{where}.schedule.warmup": term.schedule.warmup, f"{where}.schedule.start": term.schedule.start}
        not_negative[f"{where}.weight"] = term.weight
        if term.temperature is not None and term.temperature <= 0:
            raise SettingsError(f"'{where}.temperature' is {term.temperature}; it must be greater than 0.")
        if term.schedule.kind != "constant" and term.schedule.start > term.schedule.warmup:
            raise SettingsError(
                f"'{where}.schedule.start' is {term.schedule.start}, after the end of the ramp, 'warmup' = "
                f"{term.schedule.warmup}. Raise 'warmup' or lower 'start'."
            )
        if term.levels and term.on != "features" and (term.on, term.loss) != ("boxes", "imitation"):
            raise SettingsError(
                f"'{where}.levels' belongs to a term on features, or on boxes with the loss 'imitation'. Remove it, or "
                f"change '{where}.on'."
            )
        if term.on == "features" and not term.levels:
            raise SettingsError(
                f"'{where}.levels' is empty. A term on features names its levels, for example "
                f'["bottleneck", "decoder@1/2", "encoder@1/4"].'
            )
        if term.foreground_only and term.on != "features":
            raise SettingsError(f"'{where}.foreground_only' belongs to a term on features. Remove it.")
        if term.teacher not in settings.teachers:
            raise SettingsError(
                f"'{where}.teacher' is '{term.teacher}', but 'teachers' names {sorted(settings.teachers) or 'none'}."
            )
    for key, value in fractions.items():
        if not 0 <= value <= 1:
            raise SettingsError(f"'{key}' is {value}; it must lie between 0 and 1.")
    for key, number in not_negative.items():
        if number is not None and number < 0:
            raise SettingsError(f"'{key}' is {number}; it must not be negative.")
    for name, teacher in settings.teachers.items():
        if teacher.fold == []:
            raise SettingsError(f"'teachers.{name}.fold' is an empty list. Allowed: a number, a list, 'same', 'all'.")
        if isinstance(teacher.fold, str) and teacher.fold not in ("same", "all"):
            raise SettingsError(f"'teachers.{name}.fold' is '{teacher.fold}'. Allowed: number, list, 'same', 'all'.")
