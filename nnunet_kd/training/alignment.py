"""Domain-adversarial alignment of the members' representations at the bottleneck.

Source: Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016, sections 4.1 and 5.2.2 (gradient
reversal and its schedule). The domain is the member's identity; the classifier sees the averaged bottleneck (our
choice).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nnunet_kd.networks.multitask import TaskOutputs


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return feature.view_as(feature)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


def reverse_gradient(feature: Tensor, factor: float) -> Tensor:
    """Identity forward; the gradient is multiplied by ``-factor`` backward."""
    return _ReverseGradient.apply(feature, factor)


class MemberClassifier(nn.Module):
    """Tells the member from the bottleneck [B, C, *s], behind gradient reversal -> logits [B, members]."""

    def __init__(self, channels: int, num_members: int, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, num_members))

    def forward(self, bottleneck: Tensor, factor: float) -> Tensor:
        """Classify the spatial mean of the bottleneck; ``factor`` in [0, 1] scales the reversed gradient."""
        return self.layers(reverse_gradient(bottleneck.float().flatten(2).mean(2), factor))


def reversal_factor(progress: float) -> float:
    """2 / (1 + exp(-10 p)) - 1 for progress p in [0, 1]: adversarial pressure grows as the features get stable."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


class AlignedLoss(nn.Module):
    """A member's supervised loss plus the adversarial one while the network returns its bottleneck.

    Args:
        supervised: Stock loss of the member.
        classifier: :class:`MemberClassifier`, possibly wrapped by DDP.
        member_index: Class of this member.
        weight: Weight of the cross-entropy.
    """

    def __init__(self, supervised: nn.Module, classifier: nn.Module, member_index: int, weight: float) -> None:
        super().__init__()
        self.supervised = supervised
        self._classifier = [classifier]  # in a list: the trainer owns its parameters
        self.member_index = member_index
        self.weight = weight
        self.progress = 0.0

    def forward(self, output: Any, target: Any) -> Tensor:
        """``output`` is the network's: with [bottleneck] (training), or without (validation)."""
        outputs, features = output, []
        if isinstance(output, TaskOutputs):
            features = output.features
        elif isinstance(output, tuple) and isinstance(output[1], list):
            outputs, features = output
        if not features:
            return self.supervised(outputs, target)
        (bottleneck,) = features
        logits = self._classifier[0](bottleneck, reversal_factor(self.progress))
        labels = torch.full((len(bottleneck),), self.member_index, device=logits.device)
        return self.supervised(outputs, target) + self.weight * cross_entropy(logits, labels)
