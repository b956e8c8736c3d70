"""What keeps a weak teacher from hurting (our design; architecture.md section 1 has the facts that led here)."""

from __future__ import annotations

import torch
from torch import Tensor

COMPETENCE_MOMENTUM = 0.98  # about the last 50 steps
SMALL = 1e-8


class Competence:
    """Compares teacher and student by their Dice on the training batches of about the last 50 steps.

    All counts stay on the device; nothing is synchronised.
    """

    def __init__(self, num_channels: int) -> None:
        self.num_channels = num_channels
        self.counts: Tensor | None = None  # [2 (student, teacher), 3 (tp, fp, fn), channels]

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, target: Tensor, valid: Tensor | None, regions: bool) -> None:
        """Add a batch: logits [B, C, *S] of both, target and valid as in ``common_target``."""
        counts = torch.stack([_counts(logits, target, valid, regions) for logits in (student, teacher)])
        self.counts = counts if self.counts is None else self.counts.lerp(counts, 1 - COMPETENCE_MOMENTUM)

    def dice(self) -> tuple[Tensor, Tensor]:
        """Mean foreground Dice of student and teacher, each a scalar tensor."""
        assert self.counts is not None
        tp, fp, fn = self.counts.unbind(1)
        dice = 2 * tp / (2 * tp + fp + fn).clamp(min=SMALL)
        occurring = (tp + fn).sum(0) > 0
        weights = occurring / occurring.sum().clamp(min=1)
        student, teacher = (dice * weights).sum(1).unbind(0)
        return student, teacher

    def factor(self, margin: float | None, exponent: float = 0.0) -> Tensor | float:
        """Trust in [0, 1]: the teacher's Dice to the power of ``exponent``, less while it is behind the student.

        With a ``margin`` it falls linearly to 0 where the teacher is that much behind. The absolute part matters where
        both are equally poor: there a poor teacher would hold its student on its own level.
        """
        if self.counts is None:
            return 1.0
        student, teacher = self.dice()
        trust = teacher**exponent
        return trust if margin is None else trust * (1 - (student - teacher) / max(margin, SMALL)).clamp(0, 1)


def _counts(logits: Tensor, target: Tensor, valid: Tensor | None, regions: bool) -> Tensor:
    """True positives, false positives, false negatives per foreground channel: [3, C].

    Where two classes are equally probable both are predicted. Written for speed: on a CPU argmax over the channels and
    sums of booleans take ten times as long as the rest.
    """
    if regions:
        predicted, inside = logits > 0, target.bool()
    else:
        shape = (1, -1, *[1] * (logits.ndim - 2))
        logits, best = logits[:, 1:], logits.amax(1, keepdim=True)
        classes = torch.arange(1, logits.shape[1] + 1, device=logits.device).view(shape)
        predicted, inside = logits == best, target == classes
    if valid is not None:
        predicted, inside = predicted & valid, inside & valid
    tp, num_predicted, num_inside = (
        mask.flatten(2).count_nonzero((0, 2)) for mask in (predicted & inside, predicted, inside)
    )
    return torch.stack([tp, num_predicted - tp, num_inside - tp]).float()
