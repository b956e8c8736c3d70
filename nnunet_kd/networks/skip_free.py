"""nnU-Net's U-Nets without skip connections: what the decoder knows must pass the bottleneck."""

from __future__ import annotations

from typing import Any

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import Tensor, nn

from nnunet_kd.networks.taps import UNet, check_unet, decode, segment


class SkipFreeDecoder(UNetDecoder):
    """nnU-Net's decoder whose stages see the upsampled features alone.

    Source: SIKD (Dong, Du and Xu, Front. Comput. Sci. 2025, arXiv 2409.17503), the teacher of its U-Net baseline.
    """

    skips = False

    def forward(self, skips: list[Tensor]) -> Tensor | list[Tensor]:
        """Outputs as those of the stock decoder; of ``skips`` only the last one, the bottleneck, is used."""
        outputs = segment(self, decode(self, skips))
        return outputs if self.deep_supervision else outputs[0]


def remove_skips(network: UNet) -> UNet:
    """Take the skip connections out of ``network`` in place: the first convolution of each stage loses their channels.

    The class of the decoder changes instead of the network's, so that everything that asks for encoder and decoder
    finds them. The new convolutions are initialised as nnU-Net initialises the old ones.

    Args:
        network: A U-Net of a stock class with nnU-Net's convolutional decoder.

    Raises:
        NotImplementedError: The network is no such U-Net.
    """
    check_unet(network)
    decoder = network.decoder
    if type(decoder) is not UNetDecoder or not all(type(stage) is StackedConvBlocks for stage in decoder.stages):
        raise NotImplementedError(
            f"{type(network).__name__} has no plain convolutional decoder, so its skip connections cannot be removed. "
            f"Use plans of ExperimentPlanner or a ResEnc planner (PlainConvUNet, ResidualEncoderUNet)."
        )
    for upsample, stage in zip(decoder.transpconvs, decoder.stages, strict=True):
        block = stage.convs[0]
        narrow = _with_inputs(block.conv, upsample.out_channels)
        network.initialize(narrow)
        block.conv = block.all_modules[0] = narrow
        block.input_channels = upsample.out_channels
    decoder.__class__ = SkipFreeDecoder
    return network


def _with_inputs(convolution: Any, in_channels: int) -> nn.Module:
    """A new convolution as ``convolution``, for another number of input channels."""
    with torch.device(convolution.weight.device):
        narrow: nn.Module = type(convolution)(
            in_channels,
            convolution.out_channels,
            convolution.kernel_size,
            convolution.stride,
            convolution.padding,
            convolution.dilation,
            bias=convolution.bias is not None,
        )
    return narrow
