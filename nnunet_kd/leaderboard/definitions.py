"""What a recipe can say, and the defaults (our design)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Splits:
    """A protocol with one fold: ``validation`` cases, and cases that are ``left_out`` of it (those of the test set)."""

    validation: list[str]
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Test:
    """A test set: cases of another ``dataset`` of the recipe, or folders of ``images`` and ``labels``.

    ``cases``: all cases of the other dataset, or the validation cases of the same fold, which a joint teacher of both
    has not seen. ``images`` and ``labels`` are relative to the raw dataset folder.
    """

    dataset: str | None = None
    cases: Literal["all", "validation"] = "all"
    images: str | None = None
    labels: str | None = None


@dataclass(frozen=True)
class Dataset:
    """One line of the table: an nnU-Net dataset under some settings.

    ``id`` and ``name`` (without ``DatasetXXX_``) are nnU-Net's; several entries may share them. ``tasks``: what the
    table is about; where the recipe has ``raw``, nothing else is learned either. ``splits``: cases of the only fold, or
    "existing", which requires a splits_final.json; null leaves the folds to nnU-Net. ``settings``: for every method;
    the text "$seed" is the seed of the run. ``validation``: whether the fold's validation cases are part of the table.
    ``tests``: test sets by name. ``labels``: names of the labels 0, 1, ... where dataset.json does not have the names
    of the protocol. ``grid``: of the metrics on the resized grid, [z, y, x]. ``tolerance_mm``: of the normalised
    surface Dice. ``preparation``: commands after the planning, for example those of a method that plans itself.
    ``configurations``: others than the recipe's.
    """

    id: int
    name: str
    title: str = ""
    tasks: list[Literal["segmentation", "classification", "detection"]] = field(
        default_factory=lambda: ["segmentation"]
    )
    splits: Splits | Literal["existing"] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    validation: bool = True
    tests: dict[str, Test] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    grid: list[int] = field(default_factory=list)
    tolerance_mm: float = 2.0
    preparation: list[str] = field(default_factory=list)
    configurations: list[str] | None = None

    @property
    def folder(self) -> str:
        """Name of nnU-Net's folder."""
        return f"Dataset{self.id:03d}_{self.name}"

    @property
    def is_segmentation_only(self) -> bool:
        """Segmentation is the one task."""
        return self.tasks == ["segmentation"]


@dataclass(frozen=True)
class StudentPlans:
    """Narrower plans, made by nnUNetKD_plan_student."""

    name: str
    width: float
    min_features: int = 8


@dataclass(frozen=True)
class Plans:
    """How the datasets are planned.

    ``base``: plans of the datasets and of the members of joint datasets, made by ``planner`` for
    ``gpu_memory_target`` GB (null: the planner's). ``student``: what all but joint teachers are trained with; null is
    ``base``, or the plans with heads where a dataset has classes or boxes.
    """

    base: str = "nnUNetPlans"
    planner: str = "ExperimentPlanner"
    gpu_memory_target: float | None = None
    student: StudentPlans | None = None


@dataclass(frozen=True)
class Joint:
    """A joint dataset, see nnUNetKD_plan_and_preprocess. ``members`` are datasets of the recipe."""

    id: int
    members: list[str]
    name: str = "Joint"
    plans: str = "nnUNetKDPlans"
    width: float = 1.0
    heads: str | None = None

    @property
    def folder(self) -> str:
        """Name of nnU-Net's folder."""
        return f"Dataset{self.id:03d}_{self.name}"


@dataclass(frozen=True)
class Method:
    """A trainer with settings.

    ``on_joints``: trained on these joint datasets instead of each dataset; its lines are those of its heads.
    ``teachers``: name of a teacher in the settings -> method that trains it, on the same fold and seed. ``plans``:
    others than the recipe's. ``datasets``: null is all (of a joint teacher: all members). ``in_table``: false for a
    teacher that is trained for its students alone.
    """

    trainer: str
    title: str = ""
    on_joints: list[str] = field(default_factory=list)
    teachers: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    plans: str | None = None
    datasets: list[str] | None = None
    in_table: bool = True


@dataclass(frozen=True)
class Reference:
    """Rows of a published table. ``rows``: method -> per dataset, per metric; null where a number is not known.

    ``source``: where they were read, which the table repeats.
    """

    source: str
    datasets: list[str]
    metrics: list[str]
    rows: dict[str, list[list[float | None] | None]]


@dataclass(frozen=True)
class Recipe:
    """A leaderboard.

    ``raw``: a folder of raw datasets (variables such as $NAME are replaced) that is linked into the output folder,
    where everything is planned; null uses nnUNet_raw and nnUNet_preprocessed as they are. ``budget``: the settings
    ``training`` of all methods, ``settings``: further ones. ``control``: the method that the others are compared with.
    """

    name: str
    datasets: dict[str, Dataset]
    methods: dict[str, Method]
    control: str
    configurations: list[str]
    metrics: list[str]
    title: str = ""
    description: str = ""
    raw: str | None = None
    plans: Plans = field(default_factory=Plans)
    joints: dict[str, Joint] = field(default_factory=dict)
    folds: list[int] = field(default_factory=lambda: [0])
    seeds: list[int] = field(default_factory=lambda: [0])
    budget: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    reference: list[Reference] = field(default_factory=list)
