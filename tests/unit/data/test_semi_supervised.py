"""Images without labels as a dataset of nnU-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

from nnunet_kd.data import semi_supervised
from nnunet_kd.data.semi_supervised import UnlabeledImages

SHAPE = (6, 10, 12)


def write(folder: Path, case: str, kind: Any = nnUNetDatasetBlosc2) -> tuple[np.ndarray, np.ndarray]:
    """Noise, and a segmentation with two labels that ends at a mask."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(len(case))
    image = random.standard_normal((1, *SHAPE)).astype(np.float32)
    segmentation = random.integers(-1, 3, (1, *SHAPE)).astype(np.int16)
    kind.save_case(image, segmentation, {"class_locations": {1: [[0, 0, 0, 0]]}}, str(folder / case))
    return image, segmentation


@pytest.mark.parametrize("box", [[[0, 6], [0, 10], [0, 12]], [[2, 4], [3, 9], [5, 6]], [[-2, 5], [4, 13], [-1, 14]]])
def test_of_a_segmentation_only_where_the_image_ends_is_left(tmp_path: Path, box: list[list[int]]) -> None:
    image, segmentation = write(tmp_path, "a")
    found, outside, previous, properties = UnlabeledImages({tmp_path: ["a"]}).load_case("a")
    assert previous is None
    assert properties == {"class_locations": {}}
    np.testing.assert_array_equal(found[:], image)
    expected = crop_and_pad_nd(np.where(segmentation < 0, -1, 0), box, -1)
    cut = crop_and_pad_nd(outside, box, -1, cast_cropped_to=np.int16)  # as nnU-Net's loader does
    np.testing.assert_array_equal(cut, expected)
    assert cut.dtype == np.int16


def test_no_more_of_a_segmentation_is_read_than_a_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a")
    read = []

    class Counted:
        shape = (1, *SHAPE)

        def __getitem__(self, place: Any) -> np.ndarray:
            read.append(place)
            return np.zeros(self.shape, np.int16)[place]

    class Dataset(nnUNetDatasetBlosc2):
        def load_case(self, identifier: str) -> tuple[Any, ...]:
            image, _, previous, properties = super().load_case(identifier)
            return image, Counted(), previous, properties

    monkeypatch.setattr(semi_supervised, "infer_dataset_class", lambda folder: Dataset)
    outside = UnlabeledImages({tmp_path: ["a"]}).load_case("a")[1]
    assert read == []
    crop_and_pad_nd(outside, [[1, 3], [2, 4], [0, 5]], -1, cast_cropped_to=np.int16)
    assert read == [(slice(None), slice(1, 3), slice(2, 4), slice(0, 5))]


def test_folders_may_have_files_of_other_kinds(tmp_path: Path) -> None:
    """An older nnU-Net preprocessed the labelled cases, this one the added images."""
    expected = {"old": write(tmp_path / "old", "old", nnUNetDatasetNumpy)[0], "new": write(tmp_path / "new", "new")[0]}
    images = UnlabeledImages({tmp_path / "old": ["old"], tmp_path / "new": ["new"], tmp_path / "not there": []})
    assert images.identifiers == ["old", "new"]
    for case, image in expected.items():
        np.testing.assert_array_equal(images.load_case(case)[0][:], image)
