"""Hard targets from a teacher that is sure: cross entropy and Dice on its pseudo labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from nnunet_kd.errors import SettingsError
from nnunet_kd.losses.base import LogitsLoss, Nonlinearity, require_flag, require_number
from nnunet_kd.losses.voxels import SMALLEST_NORM, all_valid, blank, masked_mean


class PseudoLabelLoss(LogitsLoss):
    """Cross entropy + soft Dice loss of the student against the teacher's most probable classes.

    Only voxels count where the teacher's probability is above ``confidence``; with "sigmoid" every region has voxels of
    its own. The cross entropy is the mean over them. Dice is computed over the whole batch, for each class but the
    background (channel 0, "softmax" only), then averaged over the classes that the pseudo labels or the student's
    decisions contain.

    Args:
        nonlinearity: See :class:`LogitsLoss`.
        confidence: In [0.5, 1).
        dice: Whether to add the Dice loss.
        temperature: Must be 1; pseudo labels have none.

    Source: Lee, ICML workshop 2013 (pseudo labels); Sohn et al. (FixMatch), NeurIPS 2020 (confidence). Dice: nnU-Net's
    loss, our choice.
    """

    def __init__(
        self,
        *,
        nonlinearity: Nonlinearity = "softmax",
        confidence: float = 0.8,
        dice: bool = True,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(nonlinearity=nonlinearity, temperature=temperature)
        if temperature != 1:
            raise SettingsError(f"Pseudo labels have no temperature, but it is {temperature}. Remove 'temperature'.")
        self.confidence = require_number("confidence", confidence, at_least=0.5)
        if confidence >= 1:
            raise SettingsError(f"Option 'confidence' of the loss is {confidence}; it must be less than 1.")
        self.dice = require_flag("dice", dice)

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the loss, see :class:`PseudoLabelLoss`."""
        del target
        valid = all_valid(student) if valid is None else valid
        if self.nonlinearity == "softmax":
            confidence, labels = teacher.softmax(dim=1).max(dim=1, keepdim=True)
            sure = valid & (confidence > self.confidence)
            entropy = cross_entropy(student, labels[:, 0], reduction="none")[:, None]
            classes = torch.arange(1, student.shape[1], device=labels.device)
            inside = (labels == classes.view(-1, *[1] * (labels.ndim - 2))).to(student.dtype)
            probability, decided = student.softmax(dim=1)[:, 1:], _decisions(student)[:, 1:]
        else:
            likely = teacher.sigmoid()
            sure = valid & (torch.maximum(likely, 1 - likely) > self.confidence)  # [B, R, *S]
            inside = (teacher > 0).to(student.dtype)
            entropy = binary_cross_entropy_with_logits(student, inside, reduction="none")
            probability, decided = student.sigmoid(), student > 0
        loss = masked_mean(entropy, sure)
        return loss + _dice_loss(probability, inside, decided, sure) if self.dice else loss


def _decisions(logits: Tensor) -> Tensor:
    """The most probable class of each voxel as [B, C, *S]."""
    return logits.detach() == logits.detach().amax(dim=1, keepdim=True)


def _dice_loss(probability: Tensor, inside: Tensor, decided: Tensor, sure: Tensor) -> Tensor:
    """1 - soft Dice over the batch, mean over the channels that occur; 0 if none does."""
    axes = (0, *range(2, probability.ndim))
    probability, inside = blank(probability, sure), blank(inside, sure)
    overlap, total = (probability * inside).sum(axes), (probability + inside).sum(axes)
    occurring = (inside.bool() | (decided & sure)).any(dim=0).flatten(1).any(dim=1)
    loss = 1 - 2 * overlap / total.clamp(min=SMALLEST_NORM)
    return loss.masked_fill(~occurring, 0).sum() / occurring.sum().clamp(min=1)
