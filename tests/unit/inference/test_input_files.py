"""Folders and single files as the input of a prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from PIL import Image

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.inference.input_files import input_images, need_all_channels


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("a_0000", "a_0001", "b_1_0000", "b_1_0001"):
        (tmp_path / f"{name}.nii.gz").touch()
    return tmp_path


def test_a_folder_stays_a_folder(images: Path) -> None:
    assert input_images([str(images)], ".nii.gz") == str(images)


@pytest.mark.parametrize("names", [[], ["a.png", "b_0000.nii"], ["a.nii.gz", "a_0000.nii.gz.txt"]])
def test_a_folder_without_images_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(NnUNetKDError, match=r"holds no image CASE_0000\.nii\.gz") as error:
        input_images([str(tmp_path)], ".nii.gz")
    assert str(tmp_path) in str(error.value)


def test_files_are_grouped_by_case_in_the_order_of_their_channels(images: Path) -> None:
    names = ["b_1_0001", "a_0000", "b_1_0000", "a_0001"]
    found = input_images([str(images / f"{name}.nii.gz") for name in names], ".nii.gz")
    assert [[Path(file).name for file in case] for case in found] == [
        ["b_1_0000.nii.gz", "b_1_0001.nii.gz"],
        ["a_0000.nii.gz", "a_0001.nii.gz"],
    ]


def test_a_colour_image_is_one_file(images: Path) -> None:
    (images / "c_0000.nii.gz").touch()
    assert input_images([str(images / "c_0000.nii.gz")], ".nii.gz") == [[str(images / "c_0000.nii.gz")]]


def test_cases_without_the_channels_of_the_model_are_all_named(tmp_path: Path) -> None:
    grey, colour = np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3), np.uint8)
    for name, pixels in {"a_0000": grey, "b_0000": colour, "c_0000": grey, "c_0001": grey, "d_0000": grey}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "e_0000.png").write_text("what cannot be read is named later")
    for name in ("f_0000", "f_0001", "f_0002"):  # as many files as channels: not looked into
        (tmp_path / f"{name}.png").touch()
    with pytest.raises(NnUNetKDError) as error:
        need_all_channels(str(tmp_path), ".png", ["red", "green", "blue"], NaturalImage2DIO)
    first, *lines = str(error.value).splitlines()
    assert "3 channel(s), in this order: red, green, blue" in first
    assert lines == ["  a has 1: a_0000.png", "  c has 2: c_0000.png, c_0001.png", "  d has 1: d_0000.png"]
    need_all_channels([[str(tmp_path / "b_0000.png")]], ".png", ["red", "green", "blue"], NaturalImage2DIO)


def test_everything_that_is_wrong_is_named_at_once(images: Path) -> None:
    (images / "a.nii.gz").touch()
    (images / "other").mkdir()
    (images / "other" / "a_0000.nii.gz").touch()
    given = [
        "a_0000.nii.gz",
        "b_1_0000.nii.gz",
        "b_1_0001.nii.gz",
        "nothing_0000.nii.gz",
        "a.nii.gz",
        "other",
        "other/a_0000.nii.gz",
    ]
    with pytest.raises(NnUNetKDError) as error:
        input_images([str(images / name) for name in given], ".nii.gz")
    message = str(error.value)
    assert "nothing_0000.nii.gz does not exist" in message
    assert "a.nii.gz is not named CASE_0000.nii.gz" in message
    assert "other is a folder" in message
    assert "a_0001.nii.gz" in message
    assert "several cases are called a" in message
