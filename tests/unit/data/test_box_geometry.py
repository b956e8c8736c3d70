"""Boxes against nnU-Net's own preprocessing, and against their inverse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_kd.data.box_geometry import clip, rasterise, to_original, to_preprocessed


def bounding_box(mask: np.ndarray) -> list[int]:
    where = np.argwhere(mask)
    return [*where.min(axis=0).tolist(), *(where.max(axis=0) + 1).tolist()]


def random_box(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """At least 4 voxels along each axis that has them, so that interpolation does not swallow a corner."""
    first = np.array([random.integers(0, max(1, size - 4)) for size in shape])
    end = np.array([random.integers(low + min(4, size), size + 1) for low, size in zip(first, shape, strict=True)])
    return np.concatenate([first, end])


def preprocess(
    masks: np.ndarray, spacing: list[float], target: list[float], transpose: list[int]
) -> tuple[np.ndarray, dict[str, Any]]:
    """nnU-Net's preprocessing of an image with a black margin and one segmentation per mask [N, Z, Y, X]."""
    kwargs = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "architecture": {},  # plans without it are taken for old ones
        "spacing": target,
        "normalization_schemes": ["NoNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": kwargs,
        "resampling_fn_seg_kwargs": {**kwargs, "is_seg": True, "order": 1},
    }
    plans = PlansManager(
        {
            "transpose_forward": transpose,
            "foreground_intensity_properties_per_channel": {"0": {}},
            "label_manager": "LabelManager",
            "configurations": {"used": configuration},
        }
    )
    image = np.zeros((1, *masks.shape[1:]), dtype=np.float32)
    image[(0, *(slice(2, -1) if size > 1 else slice(None) for size in image.shape[1:]))] = 1
    labels = {"background": 0, "box": 1}
    results = []
    for mask in masks:
        properties: dict[str, Any] = {"spacing": spacing}
        _, segmentation, properties = DefaultPreprocessor(verbose=False).run_case_npy(
            image, mask[None].astype(np.int16), properties, plans, plans.get_configuration("used"), {"labels": labels}
        )
        results.append(segmentation[0] == 1)
    return np.stack(results), properties


CASES = {
    "same spacing": ((17, 22, 19), [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0, 1, 2]),
    "coarser": ((30, 34, 29), [1.0, 1.0, 1.0], [1.7, 1.4, 1.3], [0, 1, 2]),
    "finer": ((15, 17, 14), [1.0, 1.2, 1.1], [0.83, 0.9, 0.71], [0, 1, 2]),
    "anisotropic": ((12, 33, 31), [5.0, 1.0, 1.1], [4.1, 1.3, 0.9], [0, 1, 2]),
    "transposed": ((30, 12, 26), [1.0, 5.0, 1.1], [4.1, 0.87, 1.31], [1, 0, 2]),
    "rotated axes": ((26, 30, 12), [1.1, 1.0, 5.0], [5.0, 0.9, 1.23], [2, 0, 1]),
    "2D": ((1, 41, 37), [999.0, 1.0, 1.0], [0.77, 1.29], [0, 1, 2]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_box_is_where_preprocessing_puts_its_voxels(case: tuple[Any, ...]) -> None:
    shape, spacing, target, transpose = case
    random = np.random.default_rng(1)
    dimension = len(target)
    boxes = np.stack([random_box(random, shape) for _ in range(12)])
    masks = np.zeros((len(boxes), *shape), dtype=bool)
    for mask, box in zip(masks, boxes, strict=True):
        mask[tuple(slice(*edges) for edges in box.reshape(2, 3).T)] = True
    preprocessed, properties = preprocess(masks, spacing, target, transpose)
    if dimension == 2:
        boxes = boxes[:, [1, 2, 4, 5]]

    moved = to_preprocessed(boxes.astype(float), properties, transpose, preprocessed.shape[1:])
    voxels, is_inside = rasterise(moved, preprocessed.shape[-dimension:])
    assert is_inside.all()
    assert (moved != clip(moved, preprocessed.shape[-dimension:])).any()  # the black margin cut at least one box
    for box, mask in zip(voxels.tolist(), preprocessed, strict=True):
        assert box == bounding_box(mask if dimension == 3 else mask[0])
    np.testing.assert_allclose(to_original(moved, properties, transpose, preprocessed.shape[1:]), boxes, atol=1e-9)


def test_crop_transpose_and_scale_by_hand() -> None:
    properties = {"bbox_used_for_cropping": [[4, 24], [0, 10], [1, 31]]}
    boxes = np.array([[2.0, 6.0, 1.0, 4.0, 10.0, 7.0]])  # (z, y, x); the plans' order is (y, z, x)
    moved = to_preprocessed(boxes, properties, [1, 0, 2], (10, 20, 45))
    np.testing.assert_allclose(moved, [[1.0, 4.0, 0.0, 3.0, 8.0, 9.0]])
    np.testing.assert_allclose(to_original(moved, properties, [1, 0, 2], (10, 20, 45)), boxes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_there_and_back(data: st.DataObject) -> None:
    dimension = data.draw(st.sampled_from([2, 3]))
    size, coordinate = st.integers(1, 300), st.floats(-50, 400)
    transpose = data.draw(st.permutations([0, 1, 2])) if dimension == 3 else [0, 1, 2]
    region = [[first, first + data.draw(size)] for first in data.draw(st.lists(size, min_size=3, max_size=3))]
    shape = [data.draw(size) for _ in range(3)]
    boxes = np.array(data.draw(st.lists(st.lists(coordinate, min_size=2 * dimension, max_size=2 * dimension))))
    boxes = boxes.reshape(-1, 2 * dimension)
    properties = {"bbox_used_for_cropping": region}
    there = to_preprocessed(boxes, properties, transpose, shape)
    np.testing.assert_allclose(to_original(there, properties, transpose, shape), boxes, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-6, 16), st.floats(0.01, 20)), min_size=2, max_size=2))
def test_voxels_are_those_with_their_centre_in_the_box(edges: list[tuple[float, float]]) -> None:
    shape = (9, 7)
    box = np.array([[start for start, _ in edges] + [start + length for start, length in edges]])
    (voxels,), (is_inside,) = rasterise(box, shape)
    overlaps = all(start + length > 0 and start < size for (start, length), size in zip(edges, shape, strict=True))
    assert is_inside == overlaps
    if not is_inside:
        return
    for axis, ((start, length), size) in enumerate(zip(edges, shape, strict=True)):
        covered = [voxel for voxel in range(size) if start <= voxel + 0.5 < start + length]
        got = list(range(voxels[axis], voxels[axis + 2]))
        if covered:
            assert got == covered
        else:  # thinner than a voxel: the one that holds its middle
            (voxel,) = got
            middle = (max(start, 0) + min(start + length, size)) / 2
            assert voxel <= middle <= voxel + 1
            assert 0 <= voxel < size


def test_no_boxes() -> None:
    voxels, is_inside = rasterise(np.zeros((0, 6)), (4, 5, 6))
    assert voxels.shape == (0, 6)
    assert is_inside.shape == (0,)
