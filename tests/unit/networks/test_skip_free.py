"""Without skip connections the decoder knows the bottleneck alone, and everything else finds the network as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet, ResidualUNet
from torch import nn

from nnunet_kd.networks.skip_free import remove_skips
from nnunet_kd.networks.taps import find_stage, forward_unet

FEATURES = [4, 6, 8]


def make_unet(network_class: type[nn.Module] = PlainConvUNet, dimension: int = 3) -> nn.Module:
    torch.manual_seed(0)
    blocks = "n_conv_per_stage" if network_class is PlainConvUNet else "n_blocks_per_stage"
    network: nn.Module = network_class(
        input_channels=1,
        n_stages=3,
        features_per_stage=FEATURES,
        conv_op={2: nn.Conv2d, 3: nn.Conv3d}[dimension],
        kernel_sizes=3,
        strides=[1, 2, 2],
        num_classes=3,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dimension],
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=True,
        **{blocks: 1},
    )
    return network.apply(network.initialize)


@pytest.mark.parametrize("network_class", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize("dimension", [2, 3])
def test_it_is_the_stock_network_whose_skip_weights_are_zero(network_class: type[nn.Module], dimension: int) -> None:
    stock, ours = make_unet(network_class, dimension), remove_skips(make_unet(network_class, dimension))
    for own, other in zip(stock.decoder.stages, ours.decoder.stages, strict=True):
        conv, narrow = own.convs[0].conv, other.convs[0].conv
        assert 2 * narrow.in_channels == conv.in_channels
        with torch.no_grad():
            conv.weight[:, narrow.in_channels :] = 0  # the channels that come from the skip connection
            narrow.weight.copy_(conv.weight[:, : narrow.in_channels])
            narrow.bias.copy_(conv.bias)
    image = torch.randn(2, 1, *[16] * dimension)
    for deep in (True, False):
        stock.decoder.deep_supervision = ours.decoder.deep_supervision = deep
        expected, found = stock(image), ours(image)
        assert isinstance(found, list) is deep
        torch.testing.assert_close(found, expected)


def test_taps_see_the_same_decoder() -> None:
    network = remove_skips(make_unet())
    image = torch.randn(1, 1, 16, 16, 16)
    stage = find_stage(network, "decoder@1")
    outputs, (last,) = forward_unet(network, image, [stage])
    torch.testing.assert_close(outputs, network(image))
    torch.testing.assert_close(network.decoder.seg_layers[-1](last), outputs[0])


def test_encoder_stages_above_the_bottleneck_have_no_other_way() -> None:
    network = remove_skips(make_unet())
    skips = network.encoder(torch.randn(1, 1, 16, 16, 16))
    others = [torch.randn_like(skip) for skip in skips[:-1]]
    torch.testing.assert_close(network.decoder([*others, skips[-1]]), network.decoder(skips))


def test_weights_are_initialised_as_nnunet_does() -> None:
    narrow = remove_skips(make_unet()).decoder.stages[-1].convs[0].conv
    fan_in = narrow.weight[0].numel()
    assert float(narrow.weight.detach().std()) == pytest.approx(
        (2 / fan_in / (1 + 1e-4)) ** 0.5, rel=0.2
    )  # He, slope 0.01
    assert not narrow.bias.any()


def test_weights_survive_a_checkpoint(tmp_path: Path) -> None:
    network = remove_skips(make_unet())
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    other = remove_skips(make_unet())
    other.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    image = torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(other(image), network(image))


def test_other_decoders_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="ResidualUNet has no plain convolutional decoder"):
        remove_skips(make_unet(ResidualUNet))
    with pytest.raises(NotImplementedError, match="PlainConvUNet has no plain"):
        remove_skips(remove_skips(make_unet()))
