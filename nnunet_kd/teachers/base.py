"""What every kind of teacher offers its student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_kd.data.tasks import Tasks
from nnunet_kd.settings import Teacher as TeacherSettings
from nnunet_kd.settings import Term
from nnunet_kd.spaces.labels import LabelMap, LabelSpace
from nnunet_kd.tasks.detection_plan import DetectionPlan
from nnunet_kd.teachers.output import Taught, TeacherOutput


@dataclass(frozen=True)
class Student:
    """What a teacher must know of its student. ``tasks``: those that its network learns."""

    dataset: str
    plans_manager: PlansManager
    configuration: str
    configuration_manager: ConfigurationManager
    dataset_json: dict[str, Any]
    channel_names: tuple[str, ...]
    fold: int | str
    tasks: Tasks
    detection_plan: DetectionPlan | None

    @property
    def label_space(self) -> LabelSpace:
        """The student's classes."""
        return LabelSpace.from_dataset_json(self.dataset_json)

    @property
    def num_previous_stage_channels(self) -> int:
        """One-hot channels that a cascade appends to the image."""
        total = determine_num_input_channels(self.plans_manager, self.configuration_manager, self.dataset_json)
        return total - len(self.channel_names)


class HiddenCases(NamedTuple):
    """Cases of the student's dataset whose labels no teacher of it may know.

    Of ``validation`` it may not even have seen the images; ``unlabeled`` training cases are unlabelled to the student.
    """

    validation: Collection[str] = ()
    unlabeled: Collection[str] = ()


class BatchTeacher(ABC):
    """Turns a student's batches into targets.

    Construction finds every mismatch; :meth:`load` makes it ready to teach on a device. It is no nn.Module, so it
    can end up neither in the student's checkpoint nor in its DDP wrapper.

    Attributes:
        taught: The student's tasks that it can teach. Features it can teach besides.
        refusals: Of each other task of the student, why not.
        teacher_map: From its classes to those in which it is compared with its student; None if it knows no classes.
        always_projects: Whether a projector stands between features of equal width, too.
        files: The files of its weights.
        training_cases: Per dataset, the cases that it has seen.
        leaked_cases: Cases among these whose labels its student must not know.
        precision_note: A sentence about its precision, once that is decided; or nothing.
    """

    always_projects = True

    def __init__(self, name: str, settings: TeacherSettings, student: Student) -> None:
        self.name = name
        self.settings = settings
        self.student = student
        self.taught = Taught()
        self.refusals: dict[str, str] = {}
        self.teacher_map: LabelMap | None = None
        self.files: list[Path] = []
        self.training_cases: dict[str, set[str]] = {}
        self.leaked_cases: list[str] = []
        self.precision_note = ""

    @property
    def origin(self) -> str:
        """Where it comes from, for the log."""
        return ", ".join(str(file) for file in self.files)

    def check_term(self, term: Term, where: str) -> None:  # noqa: B027 (most kinds take any term)
        """Raise SettingsError for a term that this kind cannot teach; ``where`` is its place in the settings."""

    @abstractmethod
    def feature_channels(self, levels: Sequence[str]) -> dict[str, int]:
        """Width of its features at each of ``levels``."""

    def pooled_channels(self) -> int:
        """Width of the features that its classification pools; only asked of a teacher that has one."""
        raise NotImplementedError

    @abstractmethod
    def load(
        self,
        device: torch.device,
        levels: Sequence[str],
        tasks: Collection[str],
        compile_network: bool,
        hidden: HiddenCases,
    ) -> None:
        """Read the weights to ``device`` and refuse leakage.

        Args:
            device: Where to teach.
            levels: Levels whose features are wanted.
            tasks: All tasks that will ever be wanted.
            compile_network: Whether to compile the forward pass.
            hidden: Cases of the student's dataset whose labels it may not know.

        Raises:
            TeacherError: A file is broken, or does not fit.
            LeakageError: It was trained on such cases.
        """

    @abstractmethod
    def __call__(self, batch: Mapping[str, Any], tasks: Collection[str]) -> TeacherOutput:
        """Teach one batch, without gradient.

        Args:
            batch: The student's batch; its images [B, C, *S] and targets are on the teacher's device.
            tasks: What is wanted besides the features, of ``taught.tasks``.
        """

    # ---- a teacher that changes with its student --------------------------------------------------------------------

    def follow(self, network: nn.Module) -> None:  # noqa: B027 (most teachers are frozen)
        """Training starts: ``network`` is the student's, without wrappers."""

    def after_step(self) -> None:  # noqa: B027
        """The student has taken a training step."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it, tensors and plain types; empty for a frozen teacher."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore :meth:`state`, after :meth:`follow`."""
