"""Masks, classes and means over voxels, shared by the losses; nothing here waits for the device (our design).

``valid`` [B, 1, *S] is boolean; None means all voxels, the usual case, and saves passes over the features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import instance_norm

STANDARDISATION_EPSILON = 1e-5  # as in nnU-Net's instance normalisation
SMALLEST_NORM = 1e-6  # shorter vectors have no direction


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


def all_valid(values: Tensor) -> Tensor:
    """A mask [B, 1, *S] of all voxels of ``values`` [B, C, *S]."""
    return torch.ones_like(values[:, :1], dtype=torch.bool)


def blank(values: Tensor, valid: Tensor | None) -> Tensor:
    """``values`` [B, C, *S] with 0 at the voxels that are not valid."""
    return values if valid is None else values.masked_fill(~valid, 0)


def class_of_voxel(target: Tensor, valid: Tensor | None, num_classes: int) -> Tensor:
    """Turn labels [B, 1, *S], or regions [B, R, *S], into classes [B, 1, *S] (int64) from 0 to ``num_classes`` - 1.

    A voxel of several regions belongs to the last one in channel order, one of none to class 0, as when nnU-Net turns
    regions into labels. Larger labels share the last class. Voxels that are not valid become class 0.
    """
    if target.shape[1] > 1:
        order = torch.arange(1, target.shape[1] + 1, device=target.device)
        order = order.view(1, -1, *[1] * (target.ndim - 2))
        target = (target.bool() * order).amax(dim=1, keepdim=True)
    return blank(target.long(), valid).clamp(min=0, max=num_classes - 1)


def count_classes(classes: Tensor, valid: Tensor | None, num_classes: int) -> Tensor:
    """Count the valid voxels of each class: [B, 1, *S] -> [B, ``num_classes``] (int64)."""
    # A row per line of voxels: if all voxels were added to one row, they would wait for each other on a GPU.
    lines = (*classes.shape[:-1], num_classes)
    ones = blank(torch.ones_like(classes), valid)
    counts = torch.zeros(lines, dtype=torch.long, device=classes.device).scatter_add_(-1, classes, ones)
    return counts.flatten(1, -2).sum(dim=1)


def balanced_weights(classes: Tensor, valid: Tensor | None, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Weights [B, 1, *S] that sum to 1, where all classes present in the batch have the same sum.

    A sum with these weights is the mean within each class, then over the classes. Without valid voxels all are 0.
    """
    counts = count_classes(classes, valid, num_classes).sum(dim=0)
    present = counts > 0
    weight_of_class = present.to(dtype) / (counts * present.sum()).clamp(min=1)
    return blank(weight_of_class[classes], valid)


def masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of ``values`` [B, 1, *S] over the valid voxels of the batch; 0 if there are none."""
    return values.mean() if valid is None else blank(values, valid).sum() / valid.sum().clamp(min=1)


def mean_of_samples(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of ``values`` [B] over the samples with a valid voxel; 0 if there are none."""
    if valid is None:
        return values.mean()
    has_voxels = valid.flatten(1).any(dim=1)
    return values.masked_fill(~has_voxels, 0).sum() / has_voxels.sum().clamp(min=1)


def standardise(features: Tensor, valid: Tensor | None) -> Tensor:
    """Bring each sample and channel of ``features`` [B, C, *S] to mean 0 and variance 1 over its valid voxels.

    Voxels that are not valid become 0.
    """
    if valid is None and features[0, 0].numel() > 1:  # instance_norm refuses a single voxel
        return instance_norm(features, eps=STANDARDISATION_EPSILON)
    valid = all_valid(features) if valid is None else valid
    axes = tuple(range(2, features.ndim))
    count = valid.sum(dim=axes, keepdim=True).clamp(min=1)
    mean = blank(features, valid).sum(dim=axes, keepdim=True) / count
    centred = blank(features - mean, valid)
    variance = centred.square().sum(dim=axes, keepdim=True) / count
    return centred * (variance + STANDARDISATION_EPSILON).rsqrt()


def cosine_over_channels(first: Tensor, second: Tensor) -> Tensor:
    """Cosine [B, 1, *S] of the angle between the channel vectors [B, C, *S] of each voxel; 0 for a vector of zeros.

    Several times faster on a CPU than torch's cosine_similarity over this axis.
    """
    dot = (first * second).sum(dim=1, keepdim=True)
    for vector in (first, second):
        dot = dot * vector.square().sum(dim=1, keepdim=True).clamp(min=SMALLEST_NORM**2).rsqrt()
    return dot
