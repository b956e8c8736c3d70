"""The synthetic organs of unequal size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_kd.demo.organs import DATASET, INTENSITY, LABELS, SHAPE, make_organs, write_organs


def test_voxels_are_about_as_100_to_10_to_1() -> None:
    counts = np.zeros(4)
    for index in range(20):
        own = np.bincount(make_organs(np.random.default_rng(index))[1].ravel(), minlength=4)
        assert own.min() > 0
        counts += own
    large, middle, small = counts[1:]
    assert 80 < large / small < 140
    assert 8 < middle / small < 14


def test_a_voxel_of_the_small_organ_is_not_told_by_its_intensity_but_the_organ_is() -> None:
    cases = [make_organs(np.random.default_rng(index)) for index in range(20)]
    image, labels = (np.stack(parts) for parts in zip(*cases, strict=True))
    means = {name: image[labels == value].mean() for name, value in LABELS.items()}
    assert 35 < means["small"] - means["middle"] < 45
    assert abs(means["large"] - INTENSITY["large"]) < 3
    small = labels == LABELS["small"]
    alike = (image > np.median(image[small]) - 20) & ~small
    assert alike.sum() > small.sum()


def test_written_datasets_are_nnunets_and_are_kept(tmp_path: Path) -> None:
    write_organs(tmp_path, num_cases=3)
    folder = tmp_path / DATASET
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 3
    image = sitk.ReadImage(str(folder / "imagesTr" / "organs_001_0000.nii.gz"))
    labels = sitk.ReadImage(str(folder / "labelsTr" / "organs_001.nii.gz"))
    expected = make_organs(np.random.default_rng([0, 1]))
    assert sitk.GetArrayFromImage(image).shape == SHAPE
    assert np.array_equal(sitk.GetArrayFromImage(image), expected[0])
    assert np.array_equal(sitk.GetArrayFromImage(labels), expected[1])
    write_organs(tmp_path, num_cases=5)
    assert len(list((folder / "labelsTr").iterdir())) == 3
