from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_kd.conversion.base import inside, is_test_folder, without_ending
from nnunet_kd.errors import ConversionError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Testing", True),
        ("test1", True),
        ("mets_stanford_releaseMask_test", True),
        ("LITS-Challenge-Test-Data", True),
        ("latest", False),
        ("contests_2020", False),
        ("train", False),
    ],
)
def test_a_test_folder_has_a_word_that_begins_with_test(name: str, expected: bool) -> None:
    assert is_test_folder(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("volume-0.nii", "volume-0"), ("img0001.nii.gz", "img0001"), ("a.b_I45108.nii.gz", "a.b_I45108"), ("x.mhd", "x")],
)
def test_endings_of_nifti_have_two_parts(name: str, expected: str) -> None:
    assert without_ending(Path("folder") / name) == expected


def test_the_folder_is_found_as_given_or_one_level_down(tmp_path: Path) -> None:
    for folder in ("one/images", "two/images", "one/labels"):
        (tmp_path / folder).mkdir(parents=True)
    assert inside(tmp_path / "one", "images") == tmp_path / "one"
    assert inside(tmp_path, "images", "labels") == tmp_path / "one"
    (tmp_path / "images").mkdir()
    assert inside(tmp_path, "images") == tmp_path
    (tmp_path / "images").rmdir()
    with pytest.raises(ConversionError, match="several folders with images: one, two"):
        inside(tmp_path, "images")
    with pytest.raises(ConversionError, match="nor a folder directly inside it holds images and masks"):
        inside(tmp_path, "images", "masks")
