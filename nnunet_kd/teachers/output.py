"""What a student and its teacher have in common, and what every teacher returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from nnunet_kd.data.tasks import Tasks
from nnunet_kd.spaces.labels import LabelMap
from nnunet_kd.tasks.detection_head import BoxMaps
from nnunet_kd.teachers.slices import Slices


@dataclass(frozen=True)
class Taught:
    """What a teacher can teach its student.

    ``tasks``: of "segmentation", "classification" and "detection" those that both have and can compare.
    ``label_map``: from the student's label space to the one in which the two are compared; the identity where only the
    student has a segmentation, None where it has none.
    """

    tasks: tuple[str, ...] = ()
    label_map: LabelMap | None = None


@dataclass
class TeacherOutput:
    """Targets for one batch, without gradient.

    ``logits``: [B, C, *S] on the student's grid in the label space in which the two are compared, or None.
    ``features``: level name to [B, C, *s]; [B, C, K, h, w] of the ``slices`` of a 3D patch, if these are given.
    ``classification``: target's name to logits [B, classes of the student's target, in its order].
    ``pooled``: [B, C], the pooled features behind these logits, or None.
    ``boxes``: the detection head's maps on the grids of the student's, or None.
    """

    logits: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
    classification: dict[str, Tensor] = field(default_factory=dict)
    pooled: Tensor | None = None
    boxes: BoxMaps | None = None
    slices: Slices | None = None


def task_names(tasks: Tasks) -> tuple[str, ...]:
    """The tasks that a dataset has, of "segmentation", "classification" and "detection", in this order."""
    has = {
        "segmentation": tasks.segmentation,
        "classification": bool(tasks.classification),
        "detection": tasks.detection is not None,
    }
    return tuple(name for name, present in has.items() if present)
