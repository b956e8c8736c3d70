"""Domain-adversarial alignment: the classifier learns the member, the network unlearns it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nnunet_kd.training.alignment import AlignedLoss, MemberClassifier, reversal_factor, reverse_gradient


def test_reversal_is_the_identity_forward_and_negates_backward() -> None:
    feature = torch.randn(2, 3, requires_grad=True)
    weight = torch.randn(2, 3)
    reversed_feature = reverse_gradient(feature, 0.7)
    assert torch.equal(reversed_feature, feature)
    (weight * reversed_feature).sum().backward()
    torch.testing.assert_close(feature.grad, -0.7 * weight)


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.5, 1.0])
def test_factor_follows_the_papers_schedule(progress: float) -> None:
    assert reversal_factor(progress) == pytest.approx(math.tanh(5 * progress))


def test_classifier_and_network_pull_in_opposite_directions() -> None:
    torch.manual_seed(0)
    classifier = MemberClassifier(4, 3)
    bottleneck = torch.randn(2, 4, 2, 2, 2, requires_grad=True)

    class NoSupervision(nn.Module):
        def forward(self, outputs: torch.Tensor, target: None) -> torch.Tensor:
            return outputs.sum() * 0

    loss = AlignedLoss(NoSupervision(), classifier, 1, 0.1)
    loss.progress = 1.0
    loss((torch.zeros(1), [bottleneck]), None).backward()
    assert bottleneck.grad is not None

    plain = bottleneck.detach().clone().requires_grad_()
    logits = classifier.layers(plain.mean((2, 3, 4)))
    gradients = torch.autograd.grad(
        0.1 * nn.functional.cross_entropy(logits, torch.tensor([1, 1])), [plain, *classifier.parameters()]
    )
    torch.testing.assert_close(bottleneck.grad, -math.tanh(5) * gradients[0])
    for parameter, expected in zip(classifier.parameters(), gradients[1:], strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_validation_sees_only_the_supervised_loss() -> None:
    class Supervised(nn.Module):
        def forward(self, outputs: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
            return (outputs[0] - target[0]).abs().mean()

    loss = AlignedLoss(Supervised(), MemberClassifier(4, 3), 0, 1.0)
    assert loss([torch.ones(1)], [torch.zeros(1)]) == 1


def test_the_trainer_alone_owns_the_classifier() -> None:
    assert list(AlignedLoss(nn.Identity(), MemberClassifier(4, 3), 0, 1.0).parameters()) == []
