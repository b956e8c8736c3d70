"""What keeps a weak teacher from hurting (our design; architecture.md section 1 has the facts that led here)."""

from __future__ import annotations

import torch
from torch import Tensor

COMPETENCE_MOMENTUM = 0.98  # about the last 50 steps
SMALL = 1e-8


def gradient_share(supervised: Tensor, term: Tensor, output: Tensor, share: float) -> Tensor:
    """Factor in (0, 1] that holds a term's gradient to a share of the supervised one.

    Both gradients are taken with respect to the student's full-resolution output [B, C, *S], so that only the two
    losses and not the network are differentiated.
    """
    (of_supervised,) = torch.autograd.grad(supervised, output, retain_graph=True)
    (of_term,) = torch.autograd.grad(term, output, retain_graph=True)
    allowed = share * of_supervised.float().norm()
    return (allowed / of_term.float().norm().clamp(min=SMALL)).clamp(max=1.0).detach()


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
    """True positives, false positives, false negatives per foreground channel: [3, C]."""
    num_channels = logits.shape[1]
    if regions:
        predicted = logits > 0
        inside = target.bool()
        counted = torch.ones_like(inside[:, :1]) if valid is None else valid
        axes = [0, *range(2, logits.ndim)]
        tp = (predicted & inside & counted).sum(axes)
        fp = (predicted & ~inside & counted).sum(axes)
        fn = (~predicted & inside & counted).sum(axes)
        return torch.stack([tp, fp, fn]).float()
    pairs = target[:, 0] * num_channels + logits.argmax(1)
    ones = torch.ones_like(pairs, dtype=torch.float32) if valid is None else valid[:, 0].float()
    confusion = torch.zeros(num_channels**2, device=logits.device)
    confusion.scatter_add_(0, pairs.flatten(), ones.flatten())
    confusion = confusion.view(num_channels, num_channels)
    tp = confusion.diagonal()
    return torch.stack([tp, confusion.sum(0) - tp, confusion.sum(1) - tp])[:, 1:]
