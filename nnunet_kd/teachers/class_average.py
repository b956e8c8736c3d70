"""The teacher of SIKD: a network that sees class-wise averaged images, made from the student's batch and its labels.

Source: Dong, Du and Xu, Front. Comput. Sci. 2025 (arXiv 2409.17503).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nnunet_kd.data.case_means import CaseMeans, read_case_means
from nnunet_kd.data.member import Member
from nnunet_kd.errors import TeacherError
from nnunet_kd.settings import BLOCK
from nnunet_kd.settings import Teacher as TeacherSettings
from nnunet_kd.spaces.labels import LabelSpace
from nnunet_kd.teachers.averaging import check_labels, class_indices, class_means, paint
from nnunet_kd.teachers.base import Student
from nnunet_kd.teachers.discover import CLASS_AVERAGE_TRAINER, base_plans
from nnunet_kd.teachers.nnunet import AVERAGES, NNUNetTeacher

Scope = Literal["patch", "case"]


class ClassAverage:
    """Makes averaged images of batches.

    Args:
        member: The dataset of the batches.
        scope: "patch" takes the means of what the network sees; "case" those of the whole case, before augmentation.
    """

    def __init__(self, member: Member, scope: Scope) -> None:
        self.space = member.label_space
        check_labels(self.space)
        self._case_means: CaseMeans | None = read_case_means(member) if scope == "case" else None

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """The averaged image [B, C, *S] of a batch whose data and target are on one device."""
        image, target = batch["data"], batch["target"]
        classes = class_indices(target[0] if isinstance(target, list) else target, self.space)
        if self._case_means is None:
            means = class_means(image, classes)
        else:
            means = self._case_means(batch["keys"], image.device)
        return paint(means, classes, image)


class ClassAverageTeacher(NNUNetTeacher):
    """A frozen network that was trained on averaged images, see :class:`NNUNetTeacher`.

    Raises:
        TeacherError: It was trained on images, on other labels or on other channels than the student's.
    """

    always_projects = False  # as in the paper

    def __init__(self, name: str, settings: TeacherSettings, student: Student) -> None:
        if student.num_previous_stage_channels:
            raise NotImplementedError(
                f"Teacher '{name}' sees averaged images, which is not supported in the second stage of a cascade "
                f"({student.dataset} {student.configuration}). Train the student in 3d_lowres or 3d_fullres."
            )
        super().__init__(name, settings, student)
        self.scope: Scope = "patch"
        own, other = student.label_space, LabelSpace.from_dataset_json(self.dataset_json)
        if not student.tasks.segmentation or self.joint is not None or own != other:
            raise TeacherError(
                f"Teacher '{name}' in {self.folder} learned the labels {self.dataset_json['labels']}, but "
                f"{student.dataset} has {student.dataset_json['labels']}. A class-average teacher needs the labels of "
                f"its student. {how_to_train(student)}"
            )

    def check_checkpoint(self, file: Path, checkpoint: dict[str, Any]) -> None:
        """Also require that it was trained on averaged images."""
        super().check_checkpoint(file, checkpoint)
        recorded = checkpoint.get(BLOCK, {}).get(AVERAGES)
        if recorded is None:
            raise TeacherError(
                f"Teacher '{self.name}' ({file}) was trained on images and not on averaged ones. "
                f'{how_to_train(self.student)} Or set its "kind" to "nnunet".'
            )
        self.scope = recorded["scope"]

    def load(self, *args: Any, **kwargs: Any) -> None:
        """Also prepare the averages."""
        super().load(*args, **kwargs)
        student = self.student
        plans, plans_name = student.plans_manager.plans, student.plans_manager.plans_name
        description = {"plans": plans, "dataset_json": student.dataset_json}
        member = Member(student.dataset, plans_name, student.configuration, description)
        self.average = ClassAverage(member, self.scope)

    def see(self, batch: Mapping[str, Any]) -> Tensor:
        """The averaged images of a batch."""
        return self.average(batch)


def how_to_train(student: Student) -> str:
    """The command that trains the teacher of a student."""
    return (
        f"Train one: nnUNetv2_train {student.dataset[7:10]} {student.configuration} {student.fold} "
        f"-tr {CLASS_AVERAGE_TRAINER} -p {base_plans(student.plans_manager.plans)}"
    )
