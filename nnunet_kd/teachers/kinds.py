"""The kinds of teachers that settings can name."""

from __future__ import annotations

from nnunet_kd.teachers.base import BatchTeacher
from nnunet_kd.teachers.class_average import ClassAverageTeacher
from nnunet_kd.teachers.ema import EMATeacher
from nnunet_kd.teachers.foundation import FoundationTeacher
from nnunet_kd.teachers.nnunet import NNUNetTeacher

TEACHERS: dict[str, type[BatchTeacher]] = {
    "nnunet": NNUNetTeacher,
    "class_average": ClassAverageTeacher,
    "ema": EMATeacher,
    "foundation": FoundationTeacher,
}
