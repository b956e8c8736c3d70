"""Boxes between a stored image and nnU-Net's preprocessed array, and between boxes and voxels (our design).

Boxes are [N, 2 * dim] voxel-edge coordinates in array order, [z0, y0, x0, z1, y1, x1] or [y0, x0, y1, x1], end
exclusive. nnU-Net stores a 2D image as an array of shape (1, height, width); its boxes have no z, shapes and properties
do.

nnU-Net transposes, crops to the bounding box of the nonzero voxels and resamples. All its resampling functions place
output voxel i at (i + 0.5) * size_before / size_after - 0.5 and repeat the border voxels, so image edges map to image
edges and a coordinate is multiplied by size_after / size_before, exactly, at the border too. The sizes are the real,
rounded ones and not the spacings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_preprocessed(
    boxes: NDArray[np.float64],
    properties: Mapping[str, Any],
    transpose_forward: Sequence[int],
    preprocessed_shape: Sequence[int],
) -> NDArray[np.float64]:
    """Map boxes of the stored image into the preprocessed array; what lies outside the nonzero region is not clipped.

    Args:
        boxes: [N, 2 * dim] in the array that nnU-Net's reader returns.
        properties: The case's properties as nnU-Net's preprocessing wrote them.
        transpose_forward: From the plans.
        preprocessed_shape: Spatial shape (z, y, x) of the preprocessed array, 2D too.

    Returns:
        [N, 2 * dim] in the preprocessed array.
    """
    offset, scale = _crop_and_scale(properties, preprocessed_shape)
    axes = _transposed_axes(boxes, transpose_forward)
    corners = boxes.reshape(len(boxes), 2, len(axes))[:, :, axes]
    return ((corners - offset[-len(axes) :]) * scale[-len(axes) :]).reshape(boxes.shape)


def to_original(
    boxes: NDArray[np.float64],
    properties: Mapping[str, Any],
    transpose_forward: Sequence[int],
    preprocessed_shape: Sequence[int],
) -> NDArray[np.float64]:
    """Map boxes of the preprocessed array into the stored image: the inverse of :func:`to_preprocessed`."""
    offset, scale = _crop_and_scale(properties, preprocessed_shape)
    axes = _transposed_axes(boxes, transpose_forward)
    corners = boxes.reshape(len(boxes), 2, len(axes)) / scale[-len(axes) :] + offset[-len(axes) :]
    return corners[:, :, np.argsort(axes)].reshape(boxes.shape)


def clip(boxes: NDArray[np.float64], shape: Sequence[int]) -> NDArray[np.float64]:
    """Cut boxes [N, 2 * dim] off at the edges of an array of this spatial shape; one outside gets no extent."""
    return np.clip(boxes, 0, np.tile(np.asarray(shape, dtype=np.float64), 2))


def rasterise(boxes: NDArray[np.float64], shape: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The voxels of boxes: those whose centre lies in the box, and at least one per axis.

    Args:
        boxes: [N, 2 * dim] voxel-edge coordinates.
        shape: Spatial shape of the array, ``dim`` sizes; boxes are clipped to it.

    Returns:
        [N, 2 * dim] first voxel and last voxel + 1 per axis, and [N] whether the box overlaps the array at all (where
        it does not, its voxels mean nothing).
    """
    lower, upper = np.split(clip(boxes, shape), 2, axis=1)
    first = np.ceil(lower - 0.5).astype(np.int64)
    end = np.ceil(upper - 0.5).astype(np.int64)
    center = np.floor((lower + upper) / 2).astype(np.int64)
    is_thin = end <= first
    voxels = np.concatenate([np.where(is_thin, center, first), np.where(is_thin, center + 1, end)], axis=1)
    is_inside: NDArray[np.bool_] = np.all(upper > lower, axis=1)
    return voxels, is_inside


def _crop_and_scale(
    properties: Mapping[str, Any], preprocessed_shape: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """First voxel of the nonzero region and size after / size before resampling, both (z, y, x) after transposing."""
    region = np.asarray(properties["bbox_used_for_cropping"], dtype=np.float64)
    return region[:, 0], np.asarray(preprocessed_shape, dtype=np.float64) / (region[:, 1] - region[:, 0])


def _transposed_axes(boxes: NDArray[np.float64], transpose_forward: Sequence[int]) -> list[int]:
    """The order of the axes that boxes have; nnU-Net keeps the single slice of a 2D image first."""
    if boxes.shape[1] == 2 * len(transpose_forward):
        return list(transpose_forward)
    return [axis - 1 for axis in transpose_forward if axis != 0]
