"""Tapped features are those of the encoder and decoder run by hand; the stock network stays what it is."""

from __future__ import annotations

import copy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunet_kd.errors import SettingsError
from nnunet_kd.networks.taps import Stage, encoder_strides, find_stage, forward_unet, tap

STRIDES = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]
FEATURES = [4, 6, 8, 10]


def make_unet(residual: bool = False, deep_supervision: bool = True) -> nn.Module:
    torch.manual_seed(0)
    shared = {
        "input_channels": 1,
        "n_stages": 4,
        "features_per_stage": FEATURES,
        "conv_op": nn.Conv3d,
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": STRIDES,
        "num_classes": 3,
        "n_conv_per_stage_decoder": 1,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "deep_supervision": deep_supervision,
    }
    if residual:
        return ResidualEncoderUNet(n_blocks_per_stage=1, **shared)
    return PlainConvUNet(n_conv_per_stage=1, **shared)


def image() -> torch.Tensor:
    return torch.randn(1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("residual", [False, True])
def test_features_and_outputs_equal_a_hand_run(residual: bool) -> None:
    network = make_unet(residual)
    decoder = network.decoder
    skips = network.encoder(image())
    low = skips[-1]
    decoded = []
    for level in range(3):
        low = decoder.stages[level](torch.cat([decoder.transpconvs[level](low), skips[2 - level]], 1))
        decoded.append(low)
    levels = ["bottleneck", "encoder@1/1", "encoder@1/4", "decoder@1/4", "decoder@1/2", "decoder@1"]
    expected = [skips[3], skips[0], skips[2], decoded[0], decoded[1], decoded[2]]
    tap(network, [find_stage(network, level) for level in levels])
    outputs, features = network.train()(image())
    for level, feature, own in zip(levels, features, expected, strict=True):
        assert torch.equal(feature, own), level
    for output, own in zip(outputs, make_unet(residual).train()(image()), strict=True):
        torch.testing.assert_close(output, own)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_forward_by_hand_is_the_stock_forward(residual: bool, deep_supervision: bool) -> None:
    network = make_unet(residual, deep_supervision).eval()
    stock = network(image())
    outputs, features = forward_unet(network, image())
    assert features == []
    stock = stock if deep_supervision else [stock]
    assert len(outputs) == len(stock) == (3 if deep_supervision else 1)
    for output, own in zip(outputs, stock, strict=True):
        assert torch.equal(output, own)


def test_tapping_keeps_keys_parameters_and_the_stock_eval_forward() -> None:
    network, stock = make_unet(), make_unet()
    before = {name: id(parameter) for name, parameter in network.named_parameters()}
    tap(network, [find_stage(network, "bottleneck")])
    assert list(network.state_dict()) == list(stock.state_dict())
    assert {name: id(parameter) for name, parameter in network.named_parameters()} == before
    assert isinstance(network, PlainConvUNet)
    network.eval()
    for output, own in zip(network(image()), stock.eval()(image()), strict=True):
        assert torch.equal(output, own)


def test_tapping_again_replaces_the_stages() -> None:
    network = make_unet()
    tap(network, [find_stage(network, "bottleneck"), find_stage(network, "decoder@1/2")])
    tap(network, [find_stage(network, "decoder@1/1")])
    outputs, features = network.train()(image())
    assert len(outputs) == 3
    assert [feature.shape[1] for feature in features] == [FEATURES[0]]


def test_a_copied_network_keeps_its_taps() -> None:
    network = make_unet()
    tap(network, [find_stage(network, "bottleneck")])
    assert torch.equal(copy.deepcopy(network).train()(image())[1][0], network.train()(image())[1][0])


def test_tapping_one_network_leaves_others_alone() -> None:
    first, second = make_unet(), make_unet()
    tap(first, [find_stage(first, "bottleneck")])
    assert isinstance(second.train()(image()), list)
    assert not isinstance(second, type(first))


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_compiled_taps_keep_returning_features(deep_supervision: bool) -> None:
    torch._dynamo.reset()
    network = make_unet(deep_supervision=deep_supervision)
    fast = torch.compile(network, backend="eager")
    fast.eval()
    fast(image())  # a graph without taps must not be reused
    tap(network, [find_stage(network, "decoder@1/2")])
    fast.train()
    _, features = fast(image())
    assert torch.equal(features[0], network(image())[1][0])


def test_gradients_reach_the_tapped_stage_only_from_its_feature() -> None:
    network = make_unet()
    tap(network, [find_stage(network, "bottleneck")])
    _, (feature,) = network.train()(image())
    feature.square().mean().backward()
    assert network.decoder.seg_layers[0].weight.grad is None
    assert network.encoder.stages[0][0].convs[0].conv.weight.grad.abs().sum() > 0


def test_strides_are_cumulative() -> None:
    assert encoder_strides(make_unet()) == [(1, 1, 1), (1, 2, 2), (2, 4, 4), (2, 8, 8)]


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("bottleneck", Stage("encoder", 3, 10, (2, 8, 8))),
        ("encoder@1/1", Stage("encoder", 0, 4, (1, 1, 1))),
        ("encoder@1", Stage("encoder", 0, 4, (1, 1, 1))),
        ("encoder@1/8", Stage("encoder", 3, 10, (2, 8, 8))),
        ("encoder@1/64", Stage("encoder", 3, 10, (2, 8, 8))),
        ("decoder@1/1", Stage("decoder", 2, 4, (1, 1, 1))),
        ("decoder@1/2", Stage("decoder", 1, 6, (1, 2, 2))),
        ("decoder@1/4", Stage("decoder", 0, 8, (2, 4, 4))),
        ("decoder@1/8", Stage("decoder", 0, 8, (2, 4, 4))),  # the decoder has no stage at the bottleneck
        ("encoder@1/5", Stage("encoder", 2, 8, (2, 4, 4))),  # nearest in octaves
        ("encoder@1/6", Stage("encoder", 3, 10, (2, 8, 8))),
    ],
)
def test_level_names(level: str, expected: Stage) -> None:
    assert find_stage(make_unet(), level) == expected


@pytest.mark.parametrize("level", ["", "middle", "encoder", "encoder@2", "encoder@1/x", "Encoder@1/2", "encoder@1/2 "])
def test_unknown_level_is_named(level: str) -> None:
    with pytest.raises(SettingsError, match=r"Unknown level") as error:
        find_stage(make_unet(), level)
    assert repr(level) in str(error.value)
    assert "bottleneck" in str(error.value)


@pytest.mark.parametrize("level", ["encoder@1/0", "decoder@1/0", "decoder@1/00"])
def test_stride_zero_is_no_level(level: str) -> None:
    with pytest.raises(SettingsError, match="Unknown level"):
        find_stage(make_unet(), level)


def test_other_networks_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="Linear is not a U-Net"):
        find_stage(nn.Linear(1, 1), "bottleneck")
