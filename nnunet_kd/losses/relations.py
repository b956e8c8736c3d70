"""Losses between relations: how similar places of the image, or a voxel and its class, are in feature space."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from nnunet_kd.losses.base import FeatureLoss, require_integer
from nnunet_kd.losses.voxels import (
    SMALLEST_NORM,
    all_valid,
    blank,
    class_of_voxel,
    cosine_over_channels,
    count_classes,
    masked_mean,
)


class AffinityLoss(FeatureLoss):
    """Mean squared difference of the cosine between every two places.

    Features are averaged over blocks (adaptive pooling) to at most ``tokens_per_axis`` tokens per axis; the mean is
    over the batch's pairs of tokens that cover a valid voxel. Only valid voxels enter a token.

    Args:
        tokens_per_axis: 8 gives a matrix of 512 x 512 in 3-D (>= 1).

    Source: Liu et al. (structured knowledge distillation), CVPR 2019 (arXiv 1903.04197). Differs from
    it: average instead of max pooling, to a fixed number of tokens.
    """

    def __init__(self, *, tokens_per_axis: int = 8) -> None:
        super().__init__()
        self.tokens_per_axis = require_integer("tokens_per_axis", tokens_per_axis, at_least=1)

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the mean squared difference, see :class:`AffinityLoss`."""
        del target
        valid = all_valid(student) if valid is None else valid
        is_token = self._pool(valid.to(student.dtype)).flatten(1) > 0  # [B, N]
        student_affinity = self._affinity(blank(student, valid))
        teacher_affinity = self._affinity(blank(teacher, valid))
        is_pair = is_token.unsqueeze(1) & is_token.unsqueeze(2)
        return masked_mean((student_affinity - teacher_affinity).square(), is_pair)

    def _affinity(self, features: Tensor) -> Tensor:
        """Cosines [B, N, N]; they do not depend on how many valid voxels a token averages."""
        tokens = normalize(self._pool(features).flatten(2), dim=1, eps=SMALLEST_NORM)  # [B, C, N]
        return tokens.transpose(1, 2) @ tokens

    def _pool(self, features: Tensor) -> Tensor:
        grid = [min(size, self.tokens_per_axis) for size in features.shape[2:]]
        return interpolate(features, grid, mode="area")


class IntraClassLoss(FeatureLoss):
    """Mean squared difference of the cosine between each voxel and the mean feature of its class in its sample.

    Needs ``target``.

    Args:
        num_classes: At least the number of classes in ``target``; larger labels share the last class. A bound is
            needed because looking into ``target`` would make the device wait.

    Source: Wang et al. (IFVD), ECCV 2020.
    """

    def __init__(self, *, num_classes: int = 256) -> None:
        super().__init__()
        self.num_classes = require_integer("num_classes", num_classes, at_least=1)

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the mean squared difference, see :class:`IntraClassLoss`."""
        if target is None:
            raise ValueError("The loss 'intra_class' needs a target: the labels tell which voxels form a class.")
        classes = class_of_voxel(target, valid, self.num_classes)
        counts = count_classes(classes, valid, self.num_classes).clamp(min=1).unsqueeze(1)  # [B, 1, K]
        difference = self._variation(student, classes, counts, valid) - self._variation(teacher, classes, counts, valid)
        return masked_mean(difference.square(), valid)

    def _variation(self, features: Tensor, classes: Tensor, counts: Tensor, valid: Tensor | None) -> Tensor:
        """Cosine [B, 1, *S] between each voxel's feature and its class mean."""
        flat = blank(features, valid).flatten(2)  # [B, C, V]
        index = classes.flatten(2).expand_as(flat)
        sums = torch.zeros_like(flat[..., :1]).repeat(1, 1, self.num_classes).scatter_add(2, index, flat)
        mean_of_class = (sums / counts).gather(2, index).view_as(features)
        return cosine_over_channels(features, mean_of_class)
