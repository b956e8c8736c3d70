"""Rates by stage, clipping, and steps that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nnunet_kd.networks.adaptive_norm import make_conditional
from nnunet_kd.training.adaptation_optimizers import AdversarialSteps, StageSchedule, adam


def test_rates_fall_twice_in_each_stage() -> None:
    optimizer = adam(nn.Linear(1, 1), 1e-3)
    schedule = StageSchedule([optimizer], [0, 20, 60])
    rates = []
    for epoch in range(60):
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    expected = [1e-3] * 11 + [1e-4] * 3 + [1e-5] * 6 + [1e-3] * 22 + [1e-4] * 6 + [1e-5] * 12
    assert rates == pytest.approx(expected)


def test_scales_of_codes_that_are_not_used_do_not_decay() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.InstanceNorm2d(2, affine=True))
    (norm,) = make_conditional(network, 3)
    optimizer = adam(network, 0.1)
    norm.code = 1
    before = norm.weight.detach().clone()
    for _ in range(20):
        optimizer.zero_grad()
        network(torch.randn(2, 1, 4, 4)).square().mean().backward()
        optimizer.step()
    assert torch.equal(norm.weight[[0, 2]], before[[0, 2]])
    assert not torch.equal(norm.weight[1], before[1])


def test_each_optimizer_is_clipped_by_itself_and_only_the_named_ones_step() -> None:
    first, second, third = (nn.Linear(1, 1, bias=False) for _ in range(3))
    for layer in (first, second, third):
        nn.init.zeros_(layer.weight)
    optimizers = {
        name: torch.optim.SGD(layer.parameters(), 1.0)
        for name, layer in (("first", first), ("second", second), ("third", third))
    }
    steps = AdversarialSteps(optimizers, None)
    image = torch.ones(1, 1)
    steps((100 * first(image) + 3 * second(image) + third(image)).sum(), "first", "second")
    assert first.weight.item() == pytest.approx(-12, rel=1e-4)  # clipped to nnU-Net's norm
    assert second.weight.item() == pytest.approx(-3)
    assert third.weight.item() == 0
    assert (steps.num_asked, steps.num_taken) == (2, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out_and_counted(value: float) -> None:
    layer = nn.Linear(1, 1)
    before = layer.weight.detach().clone()
    steps = AdversarialSteps({"only": adam(layer, 0.1)}, None)
    steps((layer(torch.ones(1, 1)) * value).sum(), "only")
    assert torch.equal(layer.weight, before)
    assert (steps.num_asked, steps.num_taken) == (1, 0)
    steps(layer(torch.ones(1, 1)).sum(), "only")
    assert not torch.equal(layer.weight, before)
    assert (steps.num_asked, steps.num_taken) == (2, 1)
    steps.start_counting()
    assert (steps.num_asked, steps.num_taken) == (0, 0)


def test_with_a_gradient_scaler() -> None:
    """Its scale is undone before clipping, and an overflow lowers it and leaves the step out."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    steps = AdversarialSteps({"only": torch.optim.SGD(layer.parameters(), 1.0)}, scaler)
    steps(3 * layer(torch.ones(1, 1)).sum(), "only")
    assert layer.weight.item() == pytest.approx(-3)
    steps(layer(torch.ones(1, 1)).sum() * math.inf, "only")
    assert layer.weight.item() == pytest.approx(-3)
    assert scaler.get_scale() == 512.0
    assert (steps.num_asked, steps.num_taken) == (2, 1)
