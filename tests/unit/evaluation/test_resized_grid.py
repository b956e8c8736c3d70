"""Dice and surface distance on a common grid, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.resized_grid import dice_and_distance, evaluate_on_grid, resize_labels


def cube(start: int, stop: int) -> np.ndarray:
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[start:stop, start:stop, start:stop] = 1
    return labels


def test_a_cube_inside_another() -> None:
    dice, distance = dice_and_distance(cube(1, 11), cube(3, 9), [1])
    assert dice[0] == pytest.approx(100 * 2 * 216 / (1000 + 216))
    assert distance[0] == pytest.approx(2)  # every surface voxel of the smaller one is two voxels inside
    _, other_way = dice_and_distance(cube(3, 9), cube(1, 11), [1])
    assert other_way[0] > 2  # corners and edges are farther; the distance has a direction


def test_absent_classes() -> None:
    nothing = np.zeros((4, 4, 4), np.uint8)
    dice, distance = dice_and_distance(nothing, nothing, [1])
    assert (dice[0], distance[0]) == (1, 0)
    for reference, prediction in ((cube(2, 5), cube(0, 0)), (cube(0, 0), cube(2, 5))):
        dice, distance = dice_and_distance(reference, prediction, [1, 2])
        assert (dice.tolist(), distance.tolist()) == ([0, 1], [128, 0])


def test_resizing_takes_the_nearest_voxel() -> None:
    labels = np.arange(4 * 3 * 2).reshape(4, 3, 2)
    assert np.array_equal(resize_labels(labels, (4, 3, 2)), labels)
    assert np.array_equal(resize_labels(labels, (8, 6, 4)), labels.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    assert np.array_equal(resize_labels(labels.repeat(3, 0), (4, 3, 2)), labels)
    assert resize_labels(labels, (2, 5, 7)).shape == (2, 5, 7)


def test_a_folder_has_a_row_per_case_and_class(tmp_path: Path) -> None:
    for folder, label_maps in (
        ("truth", {"x": cube(1, 11), "y": cube(2, 8)}),
        ("found", {"x": cube(3, 9), "y": cube(2, 8)}),
    ):
        (tmp_path / folder).mkdir()
        for case, labels in label_maps.items():
            sitk.WriteImage(sitk.GetImageFromArray(labels), str(tmp_path / folder / f"{case}.nii.gz"))
    dataset_json = {"labels": {"background": 0, "organ": 1, "other": 2}, "file_ending": ".nii.gz"}
    folders = (tmp_path / "truth", tmp_path / "found", dataset_json, (24, 24, 24))
    table = evaluate_on_grid(*folders, cases=["x", "y"], classes={"organ": 1, "other": 2})
    assert table[["case", "class"]].to_numpy().tolist() == [
        [case, name] for case in "xy" for name in ("organ", "other")
    ]
    assert table["dice_percent"].tolist() == pytest.approx([100 * 2 * 216 / (1000 + 216), 1, 100, 1])
    # twice the grid, twice the distance in voxels
    assert table["average_surface_distance_voxels"].tolist() == pytest.approx([4, 0, 0, 0])
    with pytest.raises(NnUNetKDError, match="not for regions"):
        evaluate_on_grid(*folders, cases=["x"], classes={"both": (1, 2)})
    (tmp_path / "found/y.nii.gz").unlink()
    with pytest.raises(NnUNetKDError, match="1 of 1 cases have no prediction"):
        evaluate_on_grid(*folders, cases=["y"], classes={"organ": 1})
