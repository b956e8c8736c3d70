from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_kd.data.side_files import (
    CaseBoxes,
    Problem,
    SideFileError,
    flip_axes,
    read_boxes,
    read_labels,
    side_file,
    write_boxes,
)
from nnunet_kd.data.tasks import ClassificationTarget, DetectionTarget

GRADE = ClassificationTarget("grade", "labels.csv", ("grade",), ("low", "mid", "high"), multilabel=False)
FINDINGS = ClassificationTarget("findings", "labels.csv", *[("effusion", "nodule")] * 2, multilabel=True)
OBJECTS = DetectionTarget("boxes.json", ("nodule", "cyst"))
NAN = float("nan")


def csv_file(folder: Path, *lines: str) -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def json_file(folder: Path, content: Any) -> Path:
    path = folder / "boxes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# --- labels -----------------------------------------------------------------------------------------------------------
def test_classes_become_one_hot_and_an_empty_value_nan(tmp_path: Path) -> None:
    lines = ["\ufeffpatient, case ,grade", "p1,a,mid", "p2,b,", "", "p3, c , high ", '"p, 4",d,low', "p3,c,high"]
    labels = read_labels(csv_file(tmp_path, *lines), GRADE)
    expected = {"a": [0, 1, 0], "b": [NAN] * 3, "c": [0, 0, 1], "d": [1, 0, 0]}
    assert labels.keys() == expected.keys()
    for case, values in expected.items():
        np.testing.assert_array_equal(labels[case], values)
        assert labels[case].dtype == np.float32


def test_findings_are_labelled_one_by_one(tmp_path: Path) -> None:
    labels = read_labels(csv_file(tmp_path, "case,nodule,effusion", "a,1,0", "b,,1.0", "c,,"), FINDINGS)
    np.testing.assert_array_equal([labels[case] for case in "abc"], [[0, 1], [1, NAN], [NAN, NAN]])


def test_all_problems_of_a_table_are_found_at_once_and_the_rest_is_read(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "case,grade", "a,low", "b,Mid", "c,nan", "d", ",low", "a,high", "e,high")
    problems: list[Problem] = []
    labels = read_labels(path, GRADE, problems)
    found = sorted((problem.where, problem.what) for problem in problems)
    assert [where for where, _ in found] == [
        "line 3, case b",
        "line 4, case c",
        "line 5",
        "line 6",
        "line 7, case a",
    ]
    for (_, what), text in zip(found, ["'Mid'", "'nan'", "1 values", "empty", "another row"], strict=True):
        assert text in what
    assert sum("Perhaps 'mid'?" in problem.remedy for problem in problems) == 1
    assert {case: np.nansum(values) for case, values in labels.items()} == {"a": 1, "b": 0, "c": 0, "e": 1}
    with pytest.raises(SideFileError) as error:
        read_labels(path, GRADE)
    assert str(error.value).splitlines() == [str(problem) for problem in problems]


@pytest.mark.parametrize("value", ["nan", "2", "yes", "0.5", "-1", "inf"])
def test_a_finding_is_0_or_1(tmp_path: Path, value: str) -> None:
    problems: list[Problem] = []
    labels = read_labels(csv_file(tmp_path, "case,effusion,nodule", f"a,{value},1"), FINDINGS, problems)
    assert [(problem.where, f"'{value}'" in problem.what) for problem in problems] == [("line 2, case a", True)]
    np.testing.assert_array_equal(labels["a"], [NAN, 1])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "does not exist"),
        ("case,grade\na,low\nb,größer\n".encode("latin-1"), "line 3 is not UTF-8"),
        (b'case,grade\na,low\nb,"mid\n', "malformed CSV"),
        (b"case;grade\na;low\n", "not separated by commas"),
        (b"case,label\na,low\n", "no column 'grade'; there are case, label"),
        (b"id,label\na,low\n", "no column 'case', 'grade'"),
        (b"case,grade,grade\na,low,low\n", "more than one column 'grade'"),
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"\ncase,grade\na,low\n", "the first line is empty"),
    ],
)
def test_an_unreadable_table_is_one_problem(tmp_path: Path, content: bytes | None, named: str) -> None:
    path = tmp_path / "labels.csv"
    if content is not None:
        path.write_bytes(content)
    problems: list[Problem] = []
    read_labels(path, GRADE, problems)
    assert len(problems) == 1
    assert problems[0].file == str(path)
    assert named in problems[0].what
    assert problems[0].remedy


def test_a_missing_column_hides_nothing_of_the_rows(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "case,nodule", "a,1", "b", "c,2", "d,0")
    problems: list[Problem] = []
    labels = read_labels(path, FINDINGS, problems)
    assert [(problem.where, problem.is_unread) for problem in problems] == [
        ("header", True),
        ("line 3", False),
        ("line 4, case c", False),
    ]
    assert "no column 'effusion'; there are case, nodule" in problems[0].what
    np.testing.assert_array_equal([labels[case] for case in "acd"], [[NAN, 1], [NAN, NAN], [NAN, 0]])


def test_an_error_lists_twenty_problems_and_counts_the_rest(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "case,grade", *[f"c{index},?" for index in range(33)])
    with pytest.raises(SideFileError) as error:
        read_labels(path, GRADE)
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert "13 more" in lines[-1]


# --- boxes ------------------------------------------------------------------------------------------------------------
def test_boxes_are_turned_into_array_order(tmp_path: Path) -> None:
    boxes = read_boxes(json_file(tmp_path, {"a": [{"label": "cyst", "box": [1, 2, 3.5, 4]}], "b": []}), OBJECTS, 2)
    np.testing.assert_array_equal(boxes["a"].boxes, [[2, 1, 4, 3.5]])
    np.testing.assert_array_equal(boxes["a"].labels, [1])
    assert boxes["b"].boxes.shape == (0, 4)
    assert boxes["b"].labels.dtype == np.int64
    boxes = read_boxes(json_file(tmp_path, {"a": [{"label": "nodule", "box": [1, 2, 3, 4, 5, 6]}]}), OBJECTS, 3)
    np.testing.assert_array_equal(boxes["a"].boxes, [[3, 2, 1, 6, 5, 4]])


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"label": "Nodule", "box": [0, 0, 1, 1]}, "'Nodule' is not a class"),
        ({"label": ["nodule"], "box": [0, 0, 1, 1]}, "['nodule'] is not a class"),
        ({"label": "cyst", "bbox": [0, 0, 1, 1]}, "is not a box"),
        ([0, 0, 1, 1], "is not a box"),
        ({"label": "cyst", "box": [0, 0, 0, 1, 1, 1]}, "is a box in 3D, but the images are 2D"),
        ({"label": "cyst", "box": [0, 0, 1]}, "is not a list of 4 numbers"),
        ({"label": "cyst", "box": "0 0 1 1"}, "is not a list of 4 numbers"),
        ({"label": "cyst", "box": [0, 0, 1, "1"]}, "not a number"),
        ({"label": "cyst", "box": [0, 0, 1, True]}, "not a number"),
        ({"label": "cyst", "box": [0, 0, 1, None]}, "not a number"),
        ({"label": "cyst", "box": [0, 0, 1, NAN]}, "not a number"),
        ({"label": "cyst", "box": [0, 0, 1, float("inf")]}, "not a number"),
        ({"label": "cyst", "box": [0, 0, 1, 10**400]}, "not a number"),
        ({"label": "cyst", "box": [3, 0, 3, 1]}, "x1 = 3 is not above x0 = 3"),
        ({"label": "cyst", "box": [0, 5, 3, 1]}, "y1 = 1 is not above y0 = 5"),
        ({"label": "cyst", "box": [0, 0, 8.5, 1]}, "x goes from 0 to 8.5, but the image from 0 to 8"),
        ({"label": "cyst", "box": [0, -1, 8, 1]}, "y goes from -1 to 1, but the image from 0 to 6"),
    ],
)
def test_a_wrong_box_is_named_and_left_out(tmp_path: Path, entry: Any, named: str) -> None:
    good = {"label": "cyst", "box": [0, 0, 8, 6]}
    problems: list[Problem] = []
    path = json_file(tmp_path, {"a": [good, entry, good]})
    boxes = read_boxes(path, OBJECTS, 2, problems, image_sizes={"a": (6, 8)})
    assert [problem.where for problem in problems] == ["case a, box 1"]
    assert named in problems[0].what
    np.testing.assert_array_equal(boxes["a"].boxes, [[0, 0, 6, 8]] * 2)
    with pytest.raises(SideFileError, match="case a, box 1"):
        read_boxes(path, OBJECTS, 2, image_sizes={"a": (6, 8)})


@pytest.mark.parametrize(
    ("content", "where", "named"),
    [
        ('{"a": [}', "", "malformed JSON"),
        ("[" * 100_000, "", "malformed JSON"),
        ('{"a": [], "b": [], "a": []}', "key a", "more than once"),
        ([], "", "lists of boxes by case"),
        ({"images": [], "annotations": [], "categories": []}, "", "lists of boxes by case"),
        ({"a": {"label": "cyst"}}, "case a", "a list of boxes is needed"),
    ],
)
def test_a_file_of_another_form_is_a_problem(tmp_path: Path, content: Any, where: str, named: str) -> None:
    problems: list[Problem] = []
    read_boxes(json_file(tmp_path, content), OBJECTS, 2, problems)
    assert [problem.where for problem in problems] == [where]
    assert named in problems[0].what


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 3).flatmap(
        lambda dimension: st.dictionaries(
            st.text(min_size=1, max_size=5),
            st.lists(st.tuples(st.integers(0, 1), *[st.tuples(st.floats(0, 50), st.floats(0.5, 9))] * dimension)),
        ).map(lambda cases: (dimension, cases))
    )
)
def test_written_boxes_are_read_back(tmp_path_factory: pytest.TempPathFactory, drawn: Any) -> None:
    dimension, cases = drawn
    boxes = {
        case: CaseBoxes(
            np.array([label for label, *_ in entries], dtype=np.int64),
            np.array(
                [[start for start, _ in axes] + [start + size for start, size in axes] for _, *axes in entries]
            ).reshape(-1, 2 * dimension),
        )
        for case, entries in cases.items()
    }
    path = tmp_path_factory.mktemp("boxes") / "boxes.json"
    write_boxes(path, boxes, OBJECTS.classes)
    back = read_boxes(path, OBJECTS, dimension)
    assert list(back) == list(boxes)
    for case, own in boxes.items():
        np.testing.assert_array_equal(back[case].boxes, own.boxes)
        np.testing.assert_array_equal(back[case].labels, own.labels)


def test_flipping_axes_is_its_own_inverse() -> None:
    boxes = np.array([[1.0, 2, 3, 4, 5, 6]])
    np.testing.assert_array_equal(flip_axes(boxes), [[3, 2, 1, 6, 5, 4]])
    np.testing.assert_array_equal(flip_axes(flip_axes(boxes)), boxes)


# --- where the files are ----------------------------------------------------------------------------------------------
def test_the_preprocessed_copy_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "Dataset901_Toy"
    paths = {}
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        paths[variable] = tmp_path / variable / name / "boxes.json"
        paths[variable].parent.mkdir(parents=True)
        monkeypatch.setenv(variable, str(tmp_path / variable))
    with pytest.raises(SideFileError, match=f"{name} names boxes.json, which is not in .*nnUNet_preprocessed.* nor in"):
        side_file(name, "boxes.json")
    for variable, path in paths.items():
        path.touch()
        assert side_file(name, "boxes.json") == path, variable
    monkeypatch.delenv("nnUNet_preprocessed")
    assert side_file(name, "boxes.json") == paths["nnUNet_raw"]
