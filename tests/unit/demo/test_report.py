"""From predicted files to rows, table and figure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from matplotlib.figure import Figure
from PIL import Image

from nnunet_kd.data.side_files import CaseBoxes, write_boxes
from nnunet_kd.data.tasks import ClassificationTarget
from nnunet_kd.demo.figure import Row, best_slice, grey_window
from nnunet_kd.demo.pipeline import CONTROL, METHODS, STUDENT, TEACHER, DemoDataset
from nnunet_kd.demo.report import class_text, image_files, report, typical_case
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.prediction_files import write_box_predictions, write_classification_predictions

NUM_CASES = 7


def write(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.0, 3.0))
    sitk.WriteImage(image, str(file))


@pytest.fixture
def dataset(tmp_path: Path) -> DemoDataset:
    """Seven cases with a 4 x 4 x 4 cube. The student is right, the control misses one slice, the teacher two."""
    raw = tmp_path / "Dataset001_A"
    predictions = {method: tmp_path / "predicted" / method for method in METHODS}
    fold_folders = {method: tmp_path / "results" / method for method in METHODS}
    for index in range(NUM_CASES):
        reference = np.zeros((8, 12, 12), np.uint8)
        reference[2:6, 2:6, 2:6] = 1
        write(raw / "labelsTs" / f"c{index}.nii.gz", reference)
        for channel in range(2):
            noise = np.random.default_rng(index).normal(size=reference.shape).astype(np.float32)
            write(raw / "imagesTs" / f"c{index}_{channel:04d}.nii.gz", noise + channel + reference)
        for method, first in ((STUDENT, 2), (CONTROL, 3), (TEACHER, 4)):
            prediction = reference.copy()
            prediction[:first] = 0
            write(predictions[method] / f"c{index}.nii.gz", prediction)
    for method, folder in fold_folders.items():
        folder.mkdir(parents=True)
        line = "Pseudo dice per member: Dataset001_A 0.5 (3 steps)" if method == TEACHER else "Pseudo dice [0.5]"
        (folder / "training_log_1.txt").write_text(f"x: Epoch 0\nx: {line}\n")
    labels = {"background": 0, "cube": 1}
    description = {"labels": labels, "file_ending": ".nii.gz", "channel_names": {"0": "T1", "1": "T2"}}
    (raw / "dataset.json").write_text(json.dumps(description))
    return DemoDataset("Dataset001_A", raw, raw / "labelsTs", raw / "labelsTs", 3, predictions, fold_folders, None)


GRADE = ClassificationTarget("grade", "classification.csv", ("grade",), ("low", "high"), multilabel=False)
# AUROC 1, 10 of 12 pairs in order, 6 of 12
HIGH = {STUDENT: (0, 0.1, 0.2, 0.6, 0.7, 0.8, 0.9), CONTROL: (0, 0.1, 0.75, 0.6, 0.7, 0.8, 0.9), TEACHER: (0.5,) * 7}


def add_tasks(dataset: DemoDataset, tasks: dict) -> None:
    """Cases 3 to 6 are of high grade. Each has a box, at the cube. All find it; the control also one more, first."""
    file = dataset.raw_folder / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "nnunet_kd": {"tasks": tasks}}))
    cases = [f"c{index}" for index in range(NUM_CASES)]
    rows = [f"{case},{'low' if index < 3 else 'high'}" for index, case in enumerate(cases)]
    (dataset.side_folder / "classification.csv").write_text("\n".join(["case,grade", *rows]))
    cube, corner = np.array([[2.0, 2, 2, 6, 6, 6]]), np.array([[0.0, 0, 0, 2, 2, 2]])
    one = np.zeros(1, np.int64)
    write_boxes(dataset.side_folder / "boxes.json", dict.fromkeys(cases, CaseBoxes(one, cube)), ["cube"])
    for method, folder in dataset.predictions.items():
        high = dict(zip(cases, HIGH[method], strict=True))
        probabilities = {case: {"grade": np.array([1 - high[case], high[case]])} for case in cases}
        write_classification_predictions(folder / "classification.csv", probabilities, [GRADE])
        boxes = {case: (one, cube, np.array([0.5])) for case in cases}
        if method == CONTROL:
            both = np.zeros(2, np.int64), np.concatenate([corner, cube]), np.array([0.9, 0.5])
            boxes = dict.fromkeys(cases, both)
        write_box_predictions(folder / "boxes.json", boxes, ["cube"])


TASKS = {
    "classification": {"column": "grade", "classes": ["low", "high"]},
    "detection": {"classes": ["cube"]},
}


def test_table_and_figure(dataset: DemoDataset, tmp_path: Path) -> None:
    text = report([dataset], tmp_path)
    table = pd.read_csv(tmp_path / "table.csv").set_index("method")
    # 4 of 4, 3 of 4 and 2 of 4 slices: Dice 1, 2*3/7, 2*2/6
    assert table["mean"].to_dict() == pytest.approx({TEACHER: 2 / 3, CONTROL: 6 / 7, STUDENT: 1.0})
    assert table.loc[STUDENT, "difference"] == pytest.approx(1 / 7)
    assert table.loc[TEACHER, "losses"] == NUM_CASES
    assert text == (tmp_path / "table.md").read_text().strip()
    assert len(pd.read_csv(tmp_path / "cases.csv")) == NUM_CASES * len(METHODS)
    with Image.open(tmp_path / "figure.png") as figure:
        pixels = np.asarray(figure.convert("RGB"))
    assert pixels.std() > 10


def test_all_tasks_are_in_the_table(dataset: DemoDataset, tmp_path: Path) -> None:
    add_tasks(dataset, TASKS)
    text = report([dataset], tmp_path)
    table = pd.read_csv(tmp_path / "table.csv").set_index(["metric", "method"])
    assert table.loc[("Dice", STUDENT), "mean"] == 1.0
    auroc, ap = table.loc["AUROC of grade"], table.loc["AP of boxes at IoU 0.1"]
    assert auroc["mean"].to_dict() == pytest.approx({TEACHER: 0.5, CONTROL: 10 / 12, STUDENT: 1.0})
    # of the control, every box is found, but only after as many false ones: precision 1/2 at every recall
    assert ap["mean"].to_dict() == pytest.approx({TEACHER: 1.0, CONTROL: 0.5, STUDENT: 1.0})
    for part in (auroc, ap):
        assert part["num_cases"].tolist() == [NUM_CASES] * 3
        assert (part["low"] <= part["mean"]).all()
        assert part.loc[STUDENT, "difference"] == pytest.approx(part.loc[STUDENT, "mean"] - part.loc[CONTROL, "mean"])
        assert np.isnan(part.loc[CONTROL, "p_value"])
    # corrected for the six comparisons of the table
    assert table["p_holm"].min() == pytest.approx(6 * table["p_value"].min())
    for line in ("Dataset001_A, Dice", "Dataset001_A, AUROC of grade", "Dataset001_A, AP of boxes at IoU 0.1"):
        assert text.count(f"| {line} ") == len(METHODS)


def test_figure_shows_boxes_and_classes(dataset: DemoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Row] = []
    monkeypatch.setattr("nnunet_kd.demo.report.draw", lambda rows, file: drawn.extend(rows))
    add_tasks(dataset, TASKS)
    report([dataset], tmp_path)
    (row,) = drawn
    assert row.boxes.tolist() == [[2, 2, 2, 6, 6, 6]]
    assert row.predicted_boxes[CONTROL][0].tolist() == [[0, 0, 0, 2, 2, 2], [2, 2, 2, 6, 6, 6]]
    assert row.predicted_boxes[CONTROL][1].tolist() == [0.9, 0.5]
    index = int(row.case[1:])
    assert row.image_classes["reference"] == ("low" if index < 3 else "high")
    name, probability = row.image_classes[STUDENT].split()
    assert float(probability) == pytest.approx(max(HIGH[STUDENT][index], 1 - HIGH[STUDENT][index]))
    assert name == ("high" if HIGH[STUDENT][index] > 0.5 else "low")


def test_drawn_figure(dataset: DemoDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    add_tasks(dataset, TASKS)
    report([dataset], tmp_path)
    *images, curves = figures[0].axes
    titles = [axis.get_title().split("\n") for axis in images]
    assert [title[0] for title in titles] == ["reference", *METHODS]
    assert [title[1].split()[0] in GRADE.classes for title in titles] == [True] * 4
    assert curves.get_title() == "while training"
    # the control's first box lies in other slices than the cube, which all have found
    for axis, solid in zip(images, (0, 1, 1, 1), strict=True):
        styles = [patch.get_linestyle() for patch in axis.patches]
        assert sorted(styles) == sorted(["--", *["-"] * solid])
        assert {patch.get_bbox().bounds for patch in axis.patches} == {(1.5, 1.5, 4.0, 4.0)}
        assert ("0.50" in [text.get_text() for text in axis.texts]) == bool(solid)


def test_dataset_without_segmentations(dataset: DemoDataset, tmp_path: Path) -> None:
    add_tasks(dataset, {"segmentation": False, **TASKS})
    for folder in dataset.predictions.values():
        for file in folder.glob("*.nii.gz"):
            file.unlink()
    report([dataset], tmp_path)
    assert set(pd.read_csv(tmp_path / "table.csv")["metric"]) == {"AUROC of grade", "AP of boxes at IoU 0.1"}


def test_boxes_that_no_method_predicts_are_left_out_but_not_those_of_one(dataset: DemoDataset, tmp_path: Path) -> None:
    add_tasks(dataset, TASKS)
    (dataset.predictions[STUDENT] / "boxes.json").unlink()
    with pytest.raises(NnUNetKDError, match=r"student.*boxes\.json: the file does not exist"):
        report([dataset], tmp_path)
    for method in (TEACHER, CONTROL):
        (dataset.predictions[method] / "boxes.json").unlink()
    report([dataset], tmp_path)
    assert set(pd.read_csv(tmp_path / "table.csv")["metric"]) == {"Dice", "AUROC of grade"}


def test_missing_case(dataset: DemoDataset, tmp_path: Path) -> None:
    add_tasks(dataset, TASKS)
    file = dataset.predictions[CONTROL] / "classification.csv"
    file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("c4")))
    with pytest.raises(NnUNetKDError, match=r"control.classification\.csv lacks 1 of 7 cases, among them c4"):
        report([dataset], tmp_path)


def test_class_texts() -> None:
    findings = ClassificationTarget("findings", "x.csv", ("a", "b", "c"), ("a", "b", "c"), multilabel=True)
    assert class_text(GRADE, np.array([0.0, 1.0])) == "high"
    assert class_text(GRADE, np.array([0.625, 0.375])) == "low 0.62"
    assert class_text(GRADE, np.array([np.nan, np.nan])) == ""
    assert class_text(findings, np.array([0.9, 0.2, 0.5])) == "a 0.90, c 0.50"
    assert class_text(findings, np.array([0.0, 0.0, 1.0])) == "c"
    assert class_text(findings, np.zeros(3)) == "no finding"


def test_typical_case_is_the_students_median() -> None:
    values = {"a": 0.9, "b": 0.1, "c": 0.5, "d": float("nan")}
    rows = pd.DataFrame([{"method": STUDENT, "case": case, "dice": value} for case, value in values.items()])
    assert typical_case(rows, list(values)) == "c"
    assert typical_case(rows, ["b", "c"]) == "c"
    assert typical_case(rows[:0], ["x", "y", "z"]) == "y"


def test_image_files_are_the_channels_of_this_case_in_order(dataset: DemoDataset) -> None:
    assert [Path(file).name for file in image_files(dataset, "c1")] == ["c1_0000.nii.gz", "c1_0001.nii.gz"]


def row(reference: np.ndarray, classes: dict[str, int], boxes: list[list[float]]) -> Row:
    own = np.array(boxes, float).reshape(-1, 6)
    return Row("d", "c", reference, reference, {}, [1.0, 1.0, 1.0], classes, None, {}, boxes=own)


def test_slice_shows_the_smallest_class_else_the_first_box() -> None:
    reference = np.zeros((5, 6, 6), int)
    reference[1] = 1
    reference[3, 2, 2] = 2
    box = [[3.0, 1, 1, 5, 2, 2], [0.0, 1, 1, 2, 2, 2]]
    assert best_slice(row(reference, {"big": 1, "small": 2, "absent": 3}, box)) == 3
    assert best_slice(row(np.zeros((5, 6, 6)), {"big": 1}, [])) == 2
    assert best_slice(row(np.zeros((5, 6, 6)), {}, box)) == 4


def test_air_does_not_decide_the_grey_values() -> None:
    image = np.full((10, 40, 40), -1000.0)
    image[3:7, 12:28, 12:28] = 50
    image[4:6, 16:24, 16:24] = 120
    reference = (image >= 50).astype(int)
    assert grey_window(image, reference) == (50 - 70, 120 + 0.25 * 70)
    assert grey_window(image, np.zeros(image.shape, int))[0] < -1000
