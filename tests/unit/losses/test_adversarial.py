"""Adversarial losses and R1 against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nnunet_kd.losses import build_loss
from nnunet_kd.losses.adversarial import fake_loss, r1_penalty, real_loss


def test_real_and_fake_are_binary_cross_entropies() -> None:
    logits = torch.tensor([-2.0, 0.5])
    assert real_loss(logits).item() == pytest.approx((math.log(1 + math.e**2) + math.log(1 + math.e**-0.5)) / 2)
    assert fake_loss(logits).item() == pytest.approx((math.log(1 + math.e**-2) + math.log(1 + math.e**0.5)) / 2)
    huge = torch.tensor([6e4], dtype=torch.float16, requires_grad=True)
    fake_loss(huge).backward()
    assert huge.grad.item() == 1.0


def test_r1_of_a_linear_discriminator_is_the_square_of_its_weights() -> None:
    weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    images = torch.randn(3, 1, 2, 2, requires_grad=True)
    factors = torch.tensor([1.0, 2.0, -1.0])
    logits = factors * (images[:, 0] * weights).sum((1, 2))
    expected = 0.5 * sum(factor**2 * (1 + 4 + 0.25 + 9) for factor in (1.0, 2.0, -1.0)) / 3
    assert r1_penalty(logits, images).item() == pytest.approx(expected)


def test_r1_reaches_the_weights_of_the_discriminator() -> None:
    """Of a one-weight network w x^2 the penalty is 2 w^2 x^2, whose derivative is 4 w x^2."""
    weight = nn.Parameter(torch.tensor(3.0))
    images = torch.tensor([[[[2.0]]]], requires_grad=True)
    r1_penalty((weight * images**2).flatten(), images).backward()
    assert weight.grad.item() == pytest.approx(4 * 3 * 4)


def test_l1_of_logits_and_of_probabilities() -> None:
    student = torch.tensor([[0.0, 2.0], [0.0, 0.0]]).reshape(1, 2, 2, 1)
    teacher = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).reshape(1, 2, 2, 1)
    assert build_loss("logits", "l1")(student, teacher).item() == pytest.approx((1 + 2 + 1 + 0) / 4)
    first = abs(0.5 - 1 / (1 + math.e**-2))  # both classes of the first voxel differ by this
    second = abs(1 / (1 + math.e**-2) - 0.5)
    value = build_loss("logits", "l1", of="probabilities")(student, teacher)
    assert value.item() == pytest.approx((first + second) / 2)
    sigmoid = build_loss("logits", "l1", of="probabilities", nonlinearity="sigmoid")(student, teacher)
    by_hand = torch.sigmoid(student).sub(torch.sigmoid(teacher)).abs()
    assert sigmoid.item() == pytest.approx(by_hand.mean().item())
    valid = torch.tensor([True, False]).reshape(1, 1, 2, 1)
    assert build_loss("logits", "l1")(student, teacher, valid=valid).item() == pytest.approx(1.0)
