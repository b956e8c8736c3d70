from __future__ import annotations

from typing import Any

import pytest

from nnunet_kd.data.tasks import ClassificationTarget, DetectionTarget, TaskError, Tasks

GRADE = {"file": "grades.csv", "column": "grade", "classes": ["II", "III"]}
FINDINGS = {"columns": ["effusion", "nodule"]}


def declared(**tasks: Any) -> dict[str, Any]:
    return {"labels": {"background": 0, "lesion": 1}, "nnunet_kd": {"tasks": tasks, "split_by": "patient"}}


@pytest.mark.parametrize("dataset_json", [{}, {"nnunet_kd": {}}, {"nnunet_kd": {"tasks": {"segmentation": True}}}])
def test_without_tasks_a_dataset_is_segmentation_only(dataset_json: dict[str, Any]) -> None:
    tasks = Tasks.from_dataset_json(dataset_json)
    assert tasks == Tasks(True, (), None, None)
    assert tasks.is_segmentation_only


def test_every_task_is_read_in_the_order_of_its_declaration() -> None:
    second = {"name": "who", "column": "type", "classes": ["c", "a", "b"]}
    tasks = Tasks.from_dataset_json(
        declared(segmentation=False, classification=[GRADE, FINDINGS, second], detection={"classes": ["x", "a"]})
    )
    assert tasks.classification == (
        ClassificationTarget("grade", "grades.csv", ("grade",), ("II", "III"), multilabel=False),
        ClassificationTarget("findings", "classification.csv", *[("effusion", "nodule")] * 2, multilabel=True),
        ClassificationTarget("who", "classification.csv", ("type",), ("c", "a", "b"), multilabel=False),
    )
    assert tasks.detection == DetectionTarget("boxes.json", ("x", "a"))
    assert (tasks.segmentation, tasks.split_by, tasks.groups_file) == (False, "patient", "grades.csv")
    assert not tasks.is_segmentation_only


def test_groups_are_read_from_classification_csv_where_nothing_is_classified() -> None:
    tasks = Tasks.from_dataset_json(declared(detection={"classes": ["x"]}))
    assert tasks.groups_file == "classification.csv"
    assert not tasks.is_segmentation_only


@pytest.mark.parametrize(
    ("tasks", "named"),
    [
        ({"segmentation": "no"}, ["tasks.segmentation", "'no'", "true or false"]),
        ({"segmentation": False}, ["no task", "classification", "detection"]),
        ({"classfication": GRADE}, ["classfication", "classification, detection"]),
        ({"": 1, "classification": GRADE}, ["unknown key ''"]),
        ({"classification": "grade"}, ["tasks.classification", '"column"', '"columns"', "list"]),
        ({"classification": []}, ["tasks.classification", "[]"]),
        ({"classification": {"classes": ["a", "b"]}}, ["neither", "'column' or 'columns'"]),
        ({"classification": {**GRADE, **FINDINGS}}, ["both", "'column' or 'columns'"]),
        ({"classification": {**FINDINGS, "classes": ["a", "b"]}}, ["Remove 'classes'"]),
        ({"classification": {**GRADE, "classes": ["II"]}}, ["classification.classes", "['II']", "at least 2"]),
        ({"classification": {**GRADE, "classes": ["II", "II"]}}, ["classification.classes", "different"]),
        ({"classification": {**GRADE, "classes": [2, 3]}}, ["classification.classes", "[2, 3]"]),
        ({"classification": {"column": "grade"}}, ["classification.classes", "None"]),
        ({"classification": {**GRADE, "column": ""}}, ["classification.column", "grades.csv"]),
        ({"classification": {"columns": "effusion"}}, ["classification.columns", "'effusion'"]),
        ({"classification": {**GRADE, "file": "../grades.csv"}}, ["classification.file", "beside dataset.json"]),
        ({"classification": {**GRADE, "name": "a/b"}}, ["classification.name", "'a/b'"]),
        ({"classification": [GRADE, {**GRADE, "classes": ["x", "y"]}]}, ["'grade'", '"name"']),
        ({"classification": [GRADE, {**FINDINGS, "label": "x"}]}, ["classification[1]", "'label'", "columns"]),
        ({"detection": ["nodule"]}, ["tasks.detection", '"classes"']),
        ({"detection": {"file": "boxes.json"}}, ["detection.classes", "None"]),
        ({"detection": {"classes": []}}, ["detection.classes", "at least 1"]),
    ],
)
def test_a_wrong_form_is_named_with_the_allowed_one(tasks: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(TaskError) as error:
        Tasks.from_dataset_json(declared(**tasks))
    assert "dataset.json" in str(error.value)
    for text in named:
        assert text in str(error.value)


@pytest.mark.parametrize("key", ["splitby", "task"])
def test_an_unknown_key_of_the_block_is_an_error(key: str) -> None:
    with pytest.raises(TaskError, match=rf"nnunet_kd in dataset\.json has the unknown key '{key}'.*split_by"):
        Tasks.from_dataset_json({"nnunet_kd": {key: {}}})


@pytest.mark.parametrize("block", [None, [], {"tasks": []}, {"tasks": None}, {"split_by": 3}, {"split_by": " "}])
def test_a_block_of_another_type_is_an_error(block: Any) -> None:
    with pytest.raises(TaskError, match=r"nnunet_kd.* in dataset\.json is .* It must be"):
        Tasks.from_dataset_json({"nnunet_kd": block})


def test_all_that_is_wrong_with_a_task_is_said_and_the_rest_of_it_is_understood() -> None:
    target = {**GRADE, "classes": ["II", "III", "IV", "III"], "weight": 2, "loss": "ce"}
    tasks = declared(classification=[target, {"file": "a/b.csv"}], detection={"file": 3, "classes": "x", "iou": 0.5})
    wrong: list[TaskError] = []
    understood = Tasks.understood(tasks, wrong)
    assert [str(error).split(" in dataset.json ")[0] + ": " + str(error).split("'")[1] for error in wrong[:3]] == [
        "nnunet_kd.tasks.classification[0]: loss",
        "nnunet_kd.tasks.classification[0]: weight",
        "nnunet_kd.tasks.classification[0].classes: III",
    ]
    assert "names 'III' more than once" in str(wrong[2])
    keys = ["classification[1].file", "classification[1]", "detection", "detection.classes", "detection.file"]
    assert [str(error).split()[0].removeprefix("nnunet_kd.tasks.") for error in wrong[3:]] == keys
    grade = ClassificationTarget("grade", "grades.csv", ("grade",), ("II", "III", "IV"), multilabel=False)
    assert understood == Tasks(True, (grade,), None, "patient")
