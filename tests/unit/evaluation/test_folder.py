"""Evaluating folders: files, spacing order, regions and ignore label as nnU-Net has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.folder import evaluate_folder, foreground_classes

LABELS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}


def write_volume(file: Path, array: np.ndarray, spacing_zyx: tuple[float, ...]) -> None:
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing_zyx[::-1])
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Case a: a core moved by 2 slices of 5 mm. Case b: perfect, except where the reference says ignore."""
    reference, prediction = np.zeros((2, 10, 8, 8), int)
    reference[2, 4, 4], prediction[4, 4, 4] = 2, 2
    write_volume(tmp_path / "labels" / "a.nii.gz", reference, (5.0, 1.0, 1.0))
    write_volume(tmp_path / "predicted" / "a.nii.gz", prediction, (5.0, 1.0, 1.0))
    reference, prediction = np.zeros((2, 10, 8, 8), int)
    reference[2:5], prediction[2:5] = 1, 1
    reference[7:], prediction[7:] = 3, 2
    write_volume(tmp_path / "labels" / "b.nii.gz", reference, (5.0, 1.0, 1.0))
    write_volume(tmp_path / "predicted" / "b.nii.gz", prediction, (5.0, 1.0, 1.0))
    dataset_json = {"labels": LABELS, "file_ending": ".nii.gz", "channel_names": {"0": "T1"}}
    (tmp_path / "predicted" / "dataset.json").write_text(json.dumps(dataset_json))
    return tmp_path / "labels", tmp_path / "predicted"


def test_background_and_ignore_are_no_classes() -> None:
    assert foreground_classes({"labels": LABELS}) == {"whole": (1, 2), "core": 2}


def test_rows(folders: tuple[Path, Path]) -> None:
    rows = evaluate_folder(*folders, tolerance_mm=10.0, show_progress=False).set_index(["case", "class"])
    assert sorted(rows.index) == [("a", "core"), ("a", "whole"), ("b", "core"), ("b", "whole")]
    moved = rows.loc[("a", "core")]
    assert moved["dice"] == 0
    assert moved["hd95_mm"] == pytest.approx(10.0)
    assert moved["nsd"] == 1
    perfect = rows.loc[("b", "whole")]
    assert (perfect["dice"], perfect["hd95_mm"], perfect["nsd"]) == (1, 0, 1)
    assert np.isnan(rows.loc[("b", "core"), "dice"])


def test_only_named_cases(folders: tuple[Path, Path]) -> None:
    rows = evaluate_folder(*folders, cases=["b"], classes={"whole": (1, 2)}, show_progress=False)
    assert rows[["case", "class"]].to_numpy().tolist() == [["b", "whole"]]


def test_missing_prediction_is_named(folders: tuple[Path, Path]) -> None:
    (folders[1] / "a.nii.gz").unlink()
    with pytest.raises(NnUNetKDError, match=r"1 of 2 cases have no prediction in .*predicted, among them a\."):
        evaluate_folder(*folders, show_progress=False)


def test_folder_without_references(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NnUNetKDError, match="no reference"):
        evaluate_folder(tmp_path / "empty", folders[1], show_progress=False)


def test_shapes_that_differ_name_the_case(folders: tuple[Path, Path]) -> None:
    write_volume(folders[1] / "a.nii.gz", np.zeros((9, 8, 8)), (5.0, 1.0, 1.0))
    with pytest.raises(NnUNetKDError, match=r"a: the prediction .* \(9, 8, 8\)"):
        evaluate_folder(*folders, show_progress=False)


def test_missing_dataset_json(folders: tuple[Path, Path]) -> None:
    (folders[1] / "dataset.json").unlink()
    with pytest.raises(NnUNetKDError, match=r"dataset\.json does not exist"):
        evaluate_folder(*folders, show_progress=False)


def test_2d_images(tmp_path: Path) -> None:
    for folder, column in (("labels", 2), ("predicted", 5)):
        array = np.zeros((8, 9), np.uint8)
        array[3, column] = 1
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / "x.png")
    description = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".png", "channel_names": {"0": "image"}}
    rows = evaluate_folder(tmp_path / "labels", tmp_path / "predicted", description, show_progress=False)
    assert rows["hd95_mm"].tolist() == pytest.approx([3.0])
    assert rows["volume_error_ml"].isna().all()  # the readers make up the third spacing


@pytest.mark.parametrize(
    ("spacing", "volume_error_ml"), [((0.5, 0.5), np.nan), ((999.0, 0.5, 0.5), np.nan), ((4.0, 0.5, 0.5), 0.001)]
)
def test_a_2d_image_has_no_volume_and_a_single_slice_has(
    tmp_path: Path, spacing: tuple[float, ...], volume_error_ml: float
) -> None:
    for folder, size in (("labels", 2), ("predicted", 3)):
        array = np.zeros((8, 9) if len(spacing) == 2 else (1, 8, 9), int)
        array[..., :size, 0] = 1
        write_volume(tmp_path / folder / "x.nii.gz", array, spacing)
    description = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz", "channel_names": {"0": "T1"}}
    rows = evaluate_folder(tmp_path / "labels", tmp_path / "predicted", description, show_progress=False)
    assert rows["volume_error_ml"].tolist() == pytest.approx([volume_error_ml], nan_ok=True)


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("folder", ["labels", "predicted"])
def test_a_segmentation_that_cannot_be_read_is_named(folders: tuple[Path, Path], folder: str, case: str) -> None:
    broken = folders[0].parent / folder / f"{case}.nii.gz"
    broken.write_bytes(b"no image")
    with pytest.raises(NnUNetKDError, match=r"cannot (be )?read") as error:
        evaluate_folder(*folders, show_progress=False)
    assert str(broken) in str(error.value)
