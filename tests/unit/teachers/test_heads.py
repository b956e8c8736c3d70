"""Matching of a teacher's heads with a student's: orders of classes, and errors that name both sides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nnunet_kd.data.tasks import ClassificationTarget, Tasks
from nnunet_kd.errors import TeacherError
from nnunet_kd.tasks.detection_plan import DetectionPlan
from nnunet_kd.teachers.heads import match_classification, match_detection

PLAN = DetectionPlan(strides=((2, 2), (4, 4)), anchors=(((4.0, 4.0),), ((8.0, 8.0),)), classes=("nodule", "cyst"))


def targets(*entries: dict[str, Any]) -> tuple[ClassificationTarget, ...]:
    return Tasks.from_dataset_json({"nnunet_kd": {"tasks": {"classification": list(entries)}}}).classification


GRADE = {"column": "grade", "classes": ["I", "II", "III"]}
FINDINGS = {"columns": ["dark", "bright"]}


def test_classes_are_matched_by_name_in_any_order() -> None:
    student = targets(GRADE, FINDINGS)
    teacher = targets(
        {"columns": ["bright", "dark"]},
        {"column": "x", "name": "grade", "classes": ["III", "I", "II"]},
        {**GRADE, "name": "more"},
    )
    assert match_classification(student, teacher) == {"grade": (1, 2, 0), "findings": (1, 0)}


@pytest.mark.parametrize(
    ("teacher", "named"),
    [
        ((), "no classification head"),
        (targets(FINDINGS), "'findings' (any of dark, bright), the student's 'grade' (one of I, II, III)"),
        (
            targets({**GRADE, "classes": ["I", "II"]}),
            "'grade' (one of I, II), the student's 'grade' (one of I, II, III)",
        ),
        (
            targets({"columns": ["I", "II", "III"], "name": "grade"}),
            "'grade' (any of I, II, III), the student's 'grade' (one",
        ),
    ],
)
def test_other_targets_or_classes_are_an_error(teacher: tuple[ClassificationTarget, ...], named: str) -> None:
    with pytest.raises(TeacherError) as error:
        match_classification(targets(GRADE), teacher)
    assert named in str(error.value)


def test_student_without_targets_needs_none() -> None:
    assert match_classification((), ()) == {}


def test_equal_detection_heads_may_differ_in_their_thresholds() -> None:
    match_detection(PLAN, replace(PLAN, score_threshold=0.5, nms_threshold=0.1), (1.0, 1.0))


@pytest.mark.parametrize(
    ("teacher", "zoom", "named"),
    [
        (None, (1.0, 1.0), "no detection head"),
        (PLAN, (1.0, 2.0), "[1.0, 2.0] times the student's resolution"),
        (
            replace(PLAN, classes=("cyst", "nodule")),
            (1.0, 1.0),
            "The classes of its detection head are ('cyst', 'nodule')",
        ),
        (replace(PLAN, strides=((2, 2), (8, 8))), (1.0, 1.0), "The strides"),
        (replace(PLAN, anchors=(((4.0, 5.0),), ((8.0, 8.0),))), (1.0, 1.0), "The anchors"),
    ],
)
def test_other_detection_heads_are_an_error(teacher: DetectionPlan | None, zoom: tuple[float, ...], named: str) -> None:
    with pytest.raises(TeacherError) as error:
        match_detection(PLAN, teacher, zoom)
    assert named in str(error.value)
