"""Class-wise averaged images: every voxel shows the mean intensity of its class.

Source: SIKD (Dong, Du and Xu, Front. Comput. Sci. 2025, arXiv 2409.17503): per sample and channel, on the crop that the
network is trained on, background included. Regions, the ignore label and means of whole cases are our design.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nnunet_kd.errors import LabelSpaceError
from nnunet_kd.spaces.labels import LabelSpace

MAX_REGIONS = 24  # regions that contain a voxel are counted as the bits of a float32
LANES = 64  # sums per class that are added up at the end, so that a GPU's threads do not wait for each other


@dataclass(frozen=True)
class ClassIndices:
    """The class of each voxel, [B, *S] int64 from 0, the background. ``valid``: where it is known; None: everywhere."""

    indices: Tensor
    valid: Tensor | None
    num_classes: int


def class_indices(target: Tensor, space: LabelSpace) -> ClassIndices:
    """Recover the integer labels, before regions were made of them.

    Args:
        target: nnU-Net's target in full resolution: [B, 1, *S] labels, or [B, regions (+ ignore), *S] of 0 and 1.
        space: Its label space.

    Returns:
        For each voxel the position of its label among ``space.label_values``.

    Raises:
        LabelSpaceError: Two labels belong to the same regions, so that they cannot be told apart.
    """
    num_classes = len(space.label_values)
    if not space.regions:
        labels = target[:, 0].long()
        if space.ignore is None:
            return ClassIndices(labels, None, num_classes)
        valid = labels != space.ignore
        return ClassIndices(torch.where(valid, labels, 0), valid, num_classes)
    regions = len(space.names)
    bits, known, order = _region_tables(space, target.device)
    codes = torch.tensordot(bits, target[:, :regions].float(), dims=([0], [1])).long()
    position = torch.searchsorted(known, codes).clamp(max=num_classes - 1)
    ignored = None if space.ignore is None else target[:, regions].bool()
    return ClassIndices(order[position], None if ignored is None else ~ignored, num_classes)


def check_labels(space: LabelSpace) -> None:
    """Raise LabelSpaceError unless every label can be recovered from a target, see :func:`class_indices`."""
    if space.regions:
        _region_codes(space)


@cache
def _region_codes(space: LabelSpace) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each set of regions that a label belongs to, sorted: its bits as a number, and the label's position."""
    if len(space.names) > MAX_REGIONS:
        raise LabelSpaceError(f"Classes can be averaged for up to {MAX_REGIONS} regions, not {len(space.names)}.")
    label_of: dict[int, int] = {}
    for position, label in enumerate(space.label_values):
        code = sum(1 << region for region, values in enumerate(space.values) if label in values)
        if code in label_of:
            twin = space.label_values[label_of[code]]
            raise LabelSpaceError(
                f"Labels {twin} and {label} belong to the same regions ({', '.join(space.names)}), so their voxels "
                f"cannot be averaged apart. Declare a region in dataset.json that has only one of them, or merge them."
            )
        label_of[code] = position
    codes = tuple(sorted(label_of))
    return codes, tuple(label_of[code] for code in codes)


@cache
def _region_tables(space: LabelSpace, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The bit of each region, and the codes and positions of :func:`_region_codes`, copied to the device once."""
    codes, positions = _region_codes(space)
    bits = 2.0 ** torch.arange(len(space.names))
    return bits.to(device), torch.tensor(codes, device=device), torch.tensor(positions, device=device)


def class_means(image: Tensor, classes: ClassIndices) -> Tensor:
    """Mean intensity of each class, in one pass.

    Args:
        image: [B, C, *S] of any floating type; sums are taken in float32.
        classes: Of the same grid. Voxels that are not valid do not count.

    Returns:
        [B, C, num_classes] float32; 0 for a class that does not occur.
    """
    batch_size, channels = image.shape[:2]
    values = image.reshape(batch_size, channels, -1).float()
    num_voxels, bins = values.shape[2], classes.num_classes + 1  # the last one takes what does not count
    indices = classes.indices
    if classes.valid is not None:
        indices = torch.where(classes.valid, indices, classes.num_classes)
    lanes = torch.arange(num_voxels, device=image.device) % LANES
    places = (indices.reshape(batch_size, 1, -1) * LANES + lanes).expand(-1, channels, -1)
    sums = values.new_zeros(batch_size, channels, bins * LANES).scatter_add_(2, places, values)
    ones = values.new_ones(1).expand(batch_size, 1, num_voxels)
    counts = values.new_zeros(batch_size, 1, bins * LANES).scatter_add_(2, places[:, :1], ones)
    sums, counts = (part.reshape(*part.shape[:2], bins, LANES).sum(3) for part in (sums, counts))
    return (sums / counts.clamp(min=1))[:, :, : classes.num_classes]


def paint(means: Tensor, classes: ClassIndices, like: Tensor) -> Tensor:
    """The image that shows in every voxel the mean of its class; where the class is not known, the background's.

    Args:
        means: [B, C, num_classes].
        classes: Of the image's grid.
        like: [B, C, *S], gives shape and type.
    """
    indices = classes.indices if classes.valid is None else torch.where(classes.valid, classes.indices, 0)
    places = indices.reshape(len(indices), 1, -1).expand(-1, like.shape[1], -1)
    return means.gather(2, places).reshape(like.shape).to(like.dtype)
