"""Adaptive and conditional instance normalisation against their formulas."""

from __future__ import annotations

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_kd.networks.adaptive_norm import (
    AdaptiveInstanceNorm,
    ConditionalInstanceNorm,
    make_conditional,
    select_code,
)

GRIDS = {2: (6, 5), 3: (4, 3, 5)}


def normalised(feature: torch.Tensor) -> torch.Tensor:
    """By a loop over samples and channels."""
    result = torch.empty_like(feature)
    for sample in range(feature.shape[0]):
        for channel in range(feature.shape[1]):
            values = feature[sample, channel]
            result[sample, channel] = (values - values.mean()) / (values.var(unbiased=False) + 1e-5).sqrt()
    return result


@pytest.mark.parametrize("dimension", [2, 3])
def test_adain_is_its_formula(dimension: int) -> None:
    torch.manual_seed(0)
    norm = AdaptiveInstanceNorm(3, 5, dimension, affine=True)
    feature, code = 4 + 3 * torch.randn(2, 3, *GRIDS[dimension]), torch.randn(2, 5)
    linear = norm.scale_and_shift.requires_grad_(False)
    expected = torch.empty_like(feature)
    for sample in range(2):
        parameters = [float(linear.weight[row] @ code[sample] + linear.bias[row]) for row in range(6)]
        for channel in range(3):
            scale, shift = parameters[channel], parameters[3 + channel]
            expected[sample, channel] = (1 + scale) * normalised(feature)[sample, channel] + shift
    torch.testing.assert_close(norm(feature, code), expected)
    with torch.no_grad():
        norm.norm.weight.fill_(2.0)
        norm.norm.bias.fill_(-1.0)
    torch.testing.assert_close(norm(feature), 2 * normalised(feature) - 1)
    assert not list(AdaptiveInstanceNorm(3, 5, dimension, affine=False).norm.parameters())


@pytest.mark.parametrize("dimension", [2, 3])
def test_conditional_norm_uses_the_scale_and_shift_of_its_code(dimension: int) -> None:
    torch.manual_seed(0)
    stock = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dimension](3, affine=True)
    with torch.no_grad():
        stock.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        stock.bias.copy_(torch.tensor([0.5, 0.0, -0.5]))
    norm = ConditionalInstanceNorm(stock, 4)
    feature = torch.randn(3, 3, *GRIDS[dimension])
    for code in range(4):
        norm.code = code
        assert torch.equal(norm(feature), stock(feature))  # they start as the norm that they replace
    with torch.no_grad():
        norm.weight.copy_(torch.randn(4, 3))
        norm.bias.copy_(torch.randn(4, 3))
    norm.code = torch.tensor([2, 0, 3])
    for sample, code in enumerate((2, 0, 3)):
        for channel in range(3):
            expected = normalised(feature)[sample, channel] * norm.weight[code, channel] + norm.bias[code, channel]
            torch.testing.assert_close(norm(feature)[sample, channel], expected)


def unet(**options: object) -> PlainConvUNet:
    arguments = {
        "input_channels": 1,
        "n_stages": 3,
        "features_per_stage": [4, 6, 8],
        "conv_op": nn.Conv2d,
        "kernel_sizes": 3,
        "strides": [1, 2, 2],
        "n_conv_per_stage": 2,
        "num_classes": 2,
        "n_conv_per_stage_decoder": 2,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
    }
    return PlainConvUNet(**(arguments | options))


def test_every_norm_of_a_planned_network_is_replaced() -> None:
    torch.manual_seed(0)
    network = unet()
    image = torch.randn(2, 1, 16, 16)
    before = network(image)
    norms = make_conditional(network, 3)
    assert len(norms) == 10  # two per stage of encoder and decoder
    assert not any(isinstance(module, nn.InstanceNorm2d) for module in network.modules())
    assert torch.equal(network(image), before)
    with torch.no_grad():
        for norm in norms:
            norm.weight[1] += 0.5
    assert torch.equal(network(image), before)
    select_code(norms, 1)
    assert not torch.allclose(network(image), before)


@pytest.mark.parametrize(
    "options", [{"norm_op": nn.BatchNorm2d}, {"norm_op_kwargs": {"affine": False}}], ids=["batch norm", "not affine"]
)
def test_other_norms_are_refused(options: dict) -> None:
    with pytest.raises(NotImplementedError, match="codes need nnU-Net's instance normalisation"):
        make_conditional(unet(**options), 2)
