"""Channel-wise distillation: where in the image each channel looks, for logits and features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from nnunet_kd.losses.base import FeatureLoss, LogitsLoss, require_number
from nnunet_kd.losses.voxels import all_valid, blank, mean_of_samples


class ChannelWiseLogitsLoss(LogitsLoss):
    """KL divergence between softmax over the voxels of each class channel.

    temperature^2 / C * sum_c KL(softmax over voxels of teacher_c / temperature, the same of the student), mean over
    samples. A small structure counts as much as a large one. It compares raw logits, so ``nonlinearity`` changes
    nothing, and a shift of one voxel's logits, which softmax ignores, is not ignored here.

    Numerics: log_softmax in float32; probabilities of more than 10^5 voxels vanish in float16.

    Source: Shu et al., ICCV 2021 (arXiv 2011.13256).
    """

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the divergence, see :class:`ChannelWiseLogitsLoss`."""
        del target
        return channel_wise_divergence(student, teacher, valid, self.temperature)


class ChannelWiseFeatureLoss(FeatureLoss):
    """KL divergence between softmax over the voxels of each feature channel, see :class:`ChannelWiseLogitsLoss`.

    Args:
        temperature: Divides both features (> 0).

    Source: Shu et al., ICCV 2021 (arXiv 2011.13256).
    """

    def __init__(self, *, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = require_number("temperature", temperature, above=0.0)

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the divergence, see :class:`ChannelWiseFeatureLoss`."""
        del target
        return channel_wise_divergence(student, teacher, valid, self.temperature)


def channel_wise_divergence(student: Tensor, teacher: Tensor, valid: Tensor | None, temperature: float) -> Tensor:
    """Divergence of [B, C, *S] over valid voxels: temperature^2 times the mean over samples and channels."""
    valid = all_valid(student) if valid is None else valid
    # Finite, so that a sample without valid voxels gives 0 and not NaN.
    lowest = torch.finfo(student.dtype).min / 4
    student, teacher = (
        log_softmax((values / temperature).masked_fill(~valid, lowest).flatten(2), dim=2)
        for values in (student, teacher)
    )
    divergence = blank(teacher.exp() * (teacher - student), valid.flatten(2)).sum(dim=2)  # [B, C]
    return temperature**2 * mean_of_samples(divergence.mean(dim=1), valid)
