"""Losses between features, voxel by voxel: mse, cosine, attention."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from nnunet_kd.losses.base import FeatureLoss, require_flag, require_number
from nnunet_kd.losses.voxels import (
    SMALLEST_NORM,
    blank,
    cosine_over_channels,
    masked_mean,
    mean_of_samples,
    standardise,
)


class MeanSquaredErrorLoss(FeatureLoss):
    """Mean squared difference over valid voxels and channels.

    Args:
        standardise: First bring each sample and channel to mean 0 and variance 1 over its valid voxels, so that the
            student imitates patterns and not scale.

    Source: Romero et al. (FitNets), ICLR 2015 (arXiv 1412.6550). Standardising: our design.
    """

    def __init__(self, *, standardise: bool = True) -> None:
        super().__init__()
        self.standardise = require_flag("standardise", standardise)

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the mean squared difference, see :class:`MeanSquaredErrorLoss`."""
        del target
        if self.standardise:
            student, teacher = standardise(student, valid), standardise(teacher, valid)
        if valid is None:
            return mse_loss(student, teacher)  # the same without a difference and a square as large as the features
        return masked_mean((student - teacher).square().mean(dim=1, keepdim=True), valid)


class CosineLoss(FeatureLoss):
    """1 - cosine of the angle between the channel vectors, mean over valid voxels; between 0 and 2.

    Source: our design; the cosine is that of the usual feature regression without length.
    """

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the mean, see :class:`CosineLoss`."""
        del target
        return masked_mean(1 - cosine_over_channels(student, teacher), valid)


class AttentionLoss(FeatureLoss):
    """Squared distance of the attention maps, each scaled to length 1 per sample; between 0 and 2.

    The map is mean_c |F_c|^power over channels; the distance is summed over valid voxels and averaged over samples.

    Args:
        power: Exponent (>= 1).

    Source: Zagoruyko and Komodakis, ICLR 2017 (arXiv 1612.03928). Differs from it: the squared distance, as
    in the released code, which however divides it by the number of voxels too and so needs weights near 1000.
    """

    def __init__(self, *, power: float = 2.0) -> None:
        super().__init__()
        self.power = require_number("power", power, at_least=1.0)

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the squared distance, see :class:`AttentionLoss`."""
        del target
        student_map, teacher_map = self._attention(student, valid), self._attention(teacher, valid)
        return mean_of_samples((student_map - teacher_map).square().sum(dim=1), valid)

    def _attention(self, features: Tensor, valid: Tensor | None) -> Tensor:
        """The attention map of each sample, of length 1, as a vector [B, V]."""
        attention = features.abs().pow(self.power).mean(dim=1, keepdim=True)
        return normalize(blank(attention, valid).flatten(1), eps=SMALLEST_NORM)
