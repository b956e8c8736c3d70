"""Instances travel through nnU-Net's augmentation as further segmentation channels; boxes are read off at the end.

So each box is the bounding box of its transformed instance by construction, whatever the transforms do. The idea is
nnDetection's (Baumgartner et al., MICCAI 2021); channels for overlapping instances and the visible fraction are ours.

Host behaviour relied on (batchgeneratorsv2 0.3): transforms hand on keys that they do not know; spatial transforms
treat each segmentation channel alone and draw no random number for it; with ``mode_seg='bilinear'`` an output voxel
gets the label with the largest interpolated indicator, so instance numbers are never blended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from nnunet_kd.data.box_geometry import rasterise

MINIMUM_VISIBLE = 0.3  # of an instance's voxels; less is too little to tell what it is (our choice)


class InstanceMap:
    """A case's segmentation followed by channels of instance numbers, drawn for just the crop that is read.

    It stands where nnU-Net's loader expects an array [C, Z, Y, X]: it has ``shape`` and ``dtype`` and is read by one
    slice per axis. An instance is the mask of its class inside its box, or the filled box where the class has no mask
    or the box holds none of it. Instance k is written as k + 1; instances that overlap or touch are in different
    channels, so that none hides another and interpolation never sees two at once.

    Args:
        segmentation: [C, Z, Y, X], in memory or on disk (numpy or blosc2); read only where needed.
        boxes: [N, 2 * dim] voxel edges in the array, 2D boxes where Z is 1. Those outside the array are left out.
        labels: [N] index of the class.
        mask_values: Per class the values of its mask in channel 0, empty where it has none.
    """

    dtype = np.dtype(np.int16)

    def __init__(
        self,
        segmentation: Any,
        boxes: NDArray[np.float64],
        labels: NDArray[np.int64],
        mask_values: Sequence[Sequence[int]],
    ) -> None:
        dimension = boxes.shape[1] // 2
        voxels, is_inside = rasterise(boxes, segmentation.shape[-dimension:])
        self.segmentation = segmentation
        self.labels = labels[is_inside]
        self.mask_values = mask_values
        self.first, self.end = np.split(voxels[is_inside], 2, axis=1)
        if dimension == 2:  # the slice of a 2D image
            self.first, self.end = np.insert(self.first, 0, 0, axis=1), np.insert(self.end, 0, 1, axis=1)
        self.channels = _separate(self.first, self.end)
        self.num_segmentation_channels = int(segmentation.shape[0])
        self.num_channels = int(self.channels.max(initial=-1)) + 1
        self.shape = (self.num_segmentation_channels + self.num_channels, *segmentation.shape[1:])
        self._masks: dict[int, NDArray[np.bool_]] = {}

    def __len__(self) -> int:
        """Number of instances."""
        return len(self.labels)

    def mask(self, index: int) -> NDArray[np.bool_]:
        """The voxels of an instance within its box, [Z, Y, X] of the box."""
        if index not in self._masks:
            self._masks[index] = self._read_mask(index)
        return self._masks[index]

    def __getitem__(self, slices: tuple[slice, ...]) -> NDArray[np.int16]:
        """Read a crop: one slice per axis, all channels.

        Raises:
            TypeError: The first slice selects channels, or an axis is not a plain slice.
        """
        is_plain = isinstance(slices, tuple) and all(isinstance(axis, slice) and axis.step is None for axis in slices)
        if not is_plain or len(slices) != len(self.shape) or slices[0] != slice(None):
            raise TypeError(f"An InstanceMap is read by (:, z0:z1, y0:y1, x0:x1), not by {slices!r}.")
        bounds = [axis.indices(size) for axis, size in zip(slices[1:], self.shape[1:], strict=True)]
        low, high = np.array([bound[0] for bound in bounds]), np.array([bound[1] for bound in bounds])
        crop = np.zeros((self.shape[0], *np.maximum(high - low, 0)), dtype=self.dtype)
        crop[: self.num_segmentation_channels] = self.segmentation[slices]
        first, end = np.maximum(self.first, low), np.minimum(self.end, high)
        for index in np.flatnonzero((end > first).all(axis=1)).tolist():
            channel = crop[self.num_segmentation_channels + self.channels[index]]
            part = self.mask(index)[_region(first[index] - self.first[index], end[index] - self.first[index])]
            channel[_region(first[index] - low, end[index] - low)][part] = index + 1
        return crop

    def _read_mask(self, index: int) -> NDArray[np.bool_]:
        values = self.mask_values[self.labels[index]]
        if len(values) > 0:
            mask = np.isin(self.segmentation[(slice(0, 1), *_region(self.first[index], self.end[index]))][0], values)
            if mask.any():
                return mask
        return np.ones(self.end[index] - self.first[index], dtype=bool)


class RecordScale(BasicTransform):
    """Apply a SpatialTransform unchanged and note the volume it gives to a unit of volume as ``volume_scale``.

    nnU-Net's affine maps output to input coordinates, so volumes grow by 1 / abs(det). An elastic deformation (stock
    nnU-Net uses none) is not counted.
    """

    def __init__(self, transform: SpatialTransform) -> None:
        super().__init__()
        self.transform = transform

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        """Transform a sample."""
        params = self.transform.get_parameters(**data_dict)
        transformed: dict[str, Any] = self.transform.apply(data_dict, **params)
        affine = params["affine"]
        transformed["volume_scale"] = 1.0 if affine is None else 1 / abs(float(np.linalg.det(affine)))
        return transformed


class BoxesFromInstances(BasicTransform):
    """Take the instance channels out of ``segmentation`` and turn them into ``boxes`` and ``box_labels``.

    Needs ``instances``, the sample's :class:`InstanceMap`. ``boxes`` is float32 [N, 2 * dim] in the patch, voxel edges
    in array order, in the order of the case's boxes; ``box_labels`` is int64 [N].

    Args:
        minimum_visible: Drop an instance when its voxels in the patch are fewer than this fraction of those that the
            whole instance would have there, that is its voxels in the case times ``volume_scale``. 0 keeps every
            instance with a voxel in the patch.
    """

    def __init__(self, minimum_visible: float = MINIMUM_VISIBLE) -> None:
        super().__init__()
        self.minimum_visible = minimum_visible

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Replace the keys of one sample."""
        del params
        instances: InstanceMap = data_dict.pop("instances")
        scale = data_dict.pop("volume_scale", 1.0)
        segmentation = data_dict["segmentation"]
        start = instances.num_segmentation_channels
        stop = start + instances.num_channels
        # a cascade's previous segmentation comes after the instances
        data_dict["segmentation"] = torch.cat((segmentation[:start], segmentation[stop:]))
        boxes: dict[int, list[int]] = {}
        for channel in segmentation[start:stop].numpy():
            num_voxels = np.bincount(channel[channel > 0])
            for number, region in enumerate(find_objects(channel), start=1):
                if region is None:
                    continue
                whole = instances.mask(number - 1).sum() * scale
                if num_voxels[number] >= self.minimum_visible * whole:
                    boxes[number - 1] = [axis.start for axis in region] + [axis.stop for axis in region]
        visible = sorted(boxes)
        data_dict["boxes"] = torch.tensor([boxes[index] for index in visible], dtype=torch.float32).reshape(
            len(visible), 2 * (segmentation.ndim - 1)
        )
        data_dict["box_labels"] = torch.from_numpy(instances.labels[visible])
        return data_dict


def with_boxes(transforms: ComposeTransforms, minimum_visible: float = MINIMUM_VISIBLE) -> ComposeTransforms:
    """nnU-Net's transforms of a sample, such that they also give its boxes.

    Instances are taken away right before nnU-Net turns -1 into background, after which the segmentation is no longer a
    label map.

    Args:
        transforms: What a trainer's ``get_training_transforms`` or ``get_validation_transforms`` returned; it is left
            as it is.
        minimum_visible: See :class:`BoxesFromInstances`.

    Raises:
        ValueError: There is no RemoveLabelTansform, so it cannot be told where the labels still are a map.
    """
    steps = [RecordScale(step) if isinstance(step, SpatialTransform) else step for step in transforms.transforms]
    position = next((i for i, step in enumerate(steps) if isinstance(step, RemoveLabelTansform)), None)
    if position is None:
        raise ValueError(
            "The trainer's transforms have no RemoveLabelTansform, before which boxes are read off. Start from "
            "nnUNetTrainer.get_training_transforms."
        )
    return ComposeTransforms([*steps[:position], BoxesFromInstances(minimum_visible), *steps[position:]])


def _separate(first: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """Channel of each box such that boxes of a channel are at least one voxel apart (greedy colouring).

    A bilinear kernel reaches two neighbouring voxels per axis; with a voxel between them it never sees two instances.
    """
    channels = np.zeros(len(first), dtype=np.int64)
    for index in range(len(first)):
        touches = ((first[:index] <= end[index]) & (end[:index] >= first[index])).all(axis=1)
        taken = set(channels[:index][touches].tolist())
        channels[index] = next(channel for channel in range(index + 1) if channel not in taken)
    return channels


def _region(first: NDArray[np.int64], end: NDArray[np.int64]) -> tuple[slice, ...]:
    return tuple(slice(int(start), int(stop)) for start, stop in zip(first, end, strict=True))
