"""From predicted files to rows, table and figure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from PIL import Image

from nnunet_kd.demo.figure import best_slice, grey_window
from nnunet_kd.demo.pipeline import CONTROL, METHODS, STUDENT, TEACHER, DemoDataset
from nnunet_kd.demo.report import image_files, report, typical_case

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
    return DemoDataset("Dataset001_A", raw, raw / "labelsTs", predictions, fold_folders, None)


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


def test_typical_case_is_the_students_median() -> None:
    values = {"a": 0.9, "b": 0.1, "c": 0.5, "d": float("nan")}
    rows = pd.DataFrame([{"method": STUDENT, "case": case, "dice": value} for case, value in values.items()])
    assert typical_case(rows) == "c"


def test_image_files_are_the_channels_of_this_case_in_order(dataset: DemoDataset) -> None:
    assert [Path(file).name for file in image_files(dataset, "c1")] == ["c1_0000.nii.gz", "c1_0001.nii.gz"]


def test_slice_shows_the_smallest_class() -> None:
    reference = np.zeros((5, 6, 6), int)
    reference[1] = 1
    reference[3, 2, 2] = 2
    assert best_slice(reference, {"big": 1, "small": 2, "absent": 3}) == 3
    assert best_slice(np.zeros((5, 6, 6)), {"big": 1}) == 2


def test_air_does_not_decide_the_grey_values() -> None:
    image = np.full((10, 40, 40), -1000.0)
    image[3:7, 12:28, 12:28] = 50
    image[4:6, 16:24, 16:24] = 120
    reference = (image >= 50).astype(int)
    assert grey_window(image, reference) == (50 - 70, 120 + 0.25 * 70)
    assert grey_window(image, np.zeros(image.shape, int))[0] < -1000
