"""The kinds of teachers that settings can name."""

from __future__ import annotations

from nnunet_kd.teachers.class_average import ClassAverageTeacher
from nnunet_kd.teachers.nnunet import NNUNetTeacher

TEACHERS: dict[str, type[NNUNetTeacher]] = {"nnunet": NNUNetTeacher, "class_average": ClassAverageTeacher}
