"""Masks, classes and means over voxels, shared by the losses; nothing here waits for the device (our design)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STANDARDISATION_EPSILON = 1e-5  # as in nnU-Net's instance normalisation


def resize_nearest(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """Take from ``mask`` [B, C, *S], of any type, the voxel under the centre of each voxel of ``grid``.

    Between two equally near voxels the later one is taken.
    """
    for axis, size in enumerate(grid, start=2):
        length = mask.shape[axis]
        if length != size:
            centre = (2 * torch.arange(size, device=mask.device) + 1) * length // (2 * size)
            mask = mask.index_select(axis, centre)
    return mask


def class_of_voxel(target: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    """Turn labels [B, 1, *S], or regions [B, R, *S], into classes [B, 1, *S] (int64) from 0 to ``num_classes`` - 1.

    A voxel of several regions belongs to the last one in channel order, one of none to class 0, as when nnU-Net turns
    regions into labels. Larger labels share the last class. Voxels that are not valid become class 0.
    """
    if target.shape[1] > 1:
        order = torch.arange(1, target.shape[1] + 1, device=target.device)
        order = order.view(1, -1, *[1] * (target.ndim - 2))
        target = (target.bool() * order).amax(dim=1, keepdim=True)
    return target.long().masked_fill(~valid, 0).clamp(min=0, max=num_classes - 1)


def count_classes(classes: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    """Count the valid voxels of each class: [B, 1, *S] -> [B, ``num_classes``] (int64)."""
    # A row per line of voxels: if all voxels were added to one row, they would wait for each other on a GPU.
    lines = (*classes.shape[:-1], num_classes)
    counts = torch.zeros(lines, dtype=torch.long, device=classes.device).scatter_add_(-1, classes, valid.long())
    return counts.flatten(1, -2).sum(dim=1)


def balanced_weights(classes: Tensor, valid: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Weights [B, 1, *S] that sum to 1, where all classes present in the batch have the same sum.

    A sum with these weights is the mean within each class, then over the classes. Without valid voxels all are 0.
    """
    counts = count_classes(classes, valid, num_classes).sum(dim=0)
    present = counts > 0
    weight_of_class = present.to(dtype) / (counts * present.sum()).clamp(min=1)
    return weight_of_class[classes].masked_fill(~valid, 0)


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``values`` [B, 1, *S] over the valid voxels of the batch; 0 if there are none."""
    return values.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)


def mean_of_samples(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``values`` [B] over the samples with a valid voxel; 0 if there are none."""
    has_voxels = valid.flatten(1).any(dim=1)
    return values.masked_fill(~has_voxels, 0).sum() / has_voxels.sum().clamp(min=1)


def standardise(features: Tensor, valid: Tensor) -> Tensor:
    """Bring each sample and channel of ``features`` [B, C, *S] to mean 0 and variance 1 over its valid voxels.

    Voxels that are not valid become 0.
    """
    axes = tuple(range(2, features.ndim))
    count = valid.sum(dim=axes, keepdim=True).clamp(min=1)
    mean = features.masked_fill(~valid, 0).sum(dim=axes, keepdim=True) / count
    centred = (features - mean).masked_fill(~valid, 0)
    variance = centred.square().sum(dim=axes, keepdim=True) / count
    return centred * (variance + STANDARDISATION_EPSILON).rsqrt()
