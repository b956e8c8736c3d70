"""Features of nnU-Net's U-Nets by explicit calls of encoder and decoder.

Forward hooks are silently dropped by ``torch.compile`` in several situations, so features are returned by ``forward``
itself. Levels are named by what they are: ``bottleneck``, ``encoder@1/4``, ``decoder@1/2``; the number is the stride
along the last axis (in-plane). The stage whose stride is nearest (in octaves) is taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_kd.errors import SettingsError

UNet = Any  # nnU-Net's networks do not declare the types of encoder and decoder
_LEVEL = re.compile(r"^(encoder|decoder)@1(?:/([1-9]\d*))?$")


@dataclass(frozen=True)
class Stage:
    """One tapped stage. ``index`` counts encoder stages from the input, decoder stages from the bottleneck."""

    part: str
    index: int
    channels: int
    stride: tuple[int, ...]


def check_unet(network: UNet) -> None:
    """Raise NotImplementedError unless ``network`` has nnU-Net's encoder and convolutional decoder."""
    decoder = getattr(network, "decoder", None)
    needed = ("stages", "transpconvs", "seg_layers")
    if not hasattr(network, "encoder") or not all(hasattr(decoder, name) for name in needed):
        raise NotImplementedError(
            f"{type(network).__name__} is not a U-Net with nnU-Net's encoder and decoder (PlainConvUNet, "
            f"ResidualEncoderUNet). Feature terms and the joint teacher need one; use terms on logits only, or plans "
            f"of ExperimentPlanner or a ResEnc planner."
        )


def encoder_strides(network: UNet) -> list[tuple[int, ...]]:
    """Cumulative stride of each encoder stage, array order (z, y, x)."""
    dimension = {nn.Conv2d: 2, nn.Conv3d: 3}[network.encoder.conv_op]
    cumulative = [1] * dimension
    result = []
    for stride in network.encoder.strides:
        per_axis = [stride] * dimension if isinstance(stride, int) else list(stride)
        cumulative = [c * s for c, s in zip(cumulative, per_axis, strict=True)]
        result.append(tuple(cumulative))
    return result


def find_stage(network: UNet, level: str) -> Stage:
    """Find the stage of ``network`` that a level name means.

    Raises:
        SettingsError: The name is none of ``bottleneck``, ``encoder@1/N``, ``decoder@1/N``.
        NotImplementedError: The network is no nnU-Net U-Net.
    """
    check_unet(network)
    strides = encoder_strides(network)
    channels = list(network.encoder.output_channels)
    if level == "bottleneck":
        return Stage("encoder", len(strides) - 1, channels[-1], strides[-1])
    match = _LEVEL.match(level)
    if match is None:
        raise SettingsError(f"Unknown level '{level}'. Allowed: 'bottleneck', 'encoder@1/N', 'decoder@1/N'.")
    wanted = math.log2(int(match.group(2) or 1))
    part = match.group(1)
    candidates = range(len(strides) - 1) if part == "decoder" else range(len(strides))
    nearest = min(candidates, key=lambda stage: abs(math.log2(strides[stage][-1]) - wanted))
    index = len(strides) - 2 - nearest if part == "decoder" else nearest
    return Stage(part, index, channels[nearest], strides[nearest])


def forward_unet(
    network: UNet, image: Tensor, stages: Sequence[Stage] = (), head: slice | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Run a U-Net by hand.

    Args:
        network: A U-Net with nnU-Net's encoder and decoder.
        image: [B, C, *S].
        stages: Stages whose features are wanted.
        head: Slice of the output channels to compute; None computes all.

    Returns:
        Outputs, highest resolution first: all deep supervision levels if the decoder has deep supervision switched on,
        otherwise one. And the features of ``stages`` in their order, each [B, C_stage, *S / stride].
    """
    skips, decoded = encode_and_decode(network, image)
    return segment(network.decoder, decoded, head), select_features(stages, skips, decoded)


def encode_and_decode(network: UNet, image: Tensor, decoder_too: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """Features of all encoder stages, and of all decoder stages from the bottleneck on (or none of these)."""
    skips = network.encoder(image)
    return skips, decode(network.decoder, skips) if decoder_too else []


def decode(decoder: Any, skips: Sequence[Tensor]) -> list[Tensor]:
    """Features of all decoder stages, from the bottleneck on; a decoder may be made to do without skip connections."""
    features = [skips[-1]]
    for index, (upsample, stage) in enumerate(zip(decoder.transpconvs, decoder.stages, strict=True)):
        merged = upsample(features[-1])
        if getattr(decoder, "skips", True):
            merged = torch.cat((merged, skips[-(index + 2)]), 1)
        features.append(stage(merged))
    return features[1:]


def segment(decoder: Any, decoded: Sequence[Tensor], head: slice | None = None) -> list[Tensor]:
    """Outputs of the decoder's features, highest resolution first; one without deep supervision."""
    wanted = range(len(decoded)) if decoder.deep_supervision else (len(decoded) - 1,)
    return [apply_head(decoder.seg_layers[index], decoded[index], head) for index in reversed(wanted)]


def select_features(stages: Sequence[Stage], skips: Sequence[Tensor], decoded: Sequence[Tensor]) -> list[Tensor]:
    """The features of ``stages`` in their order, each [B, C_stage, *S / stride]."""
    return [skips[stage.index] if stage.part == "encoder" else decoded[stage.index] for stage in stages]


def apply_head(layer: Any, features: Tensor, head: slice | None) -> Tensor:
    """Apply a 1x1 output convolution, or only the slice ``head`` of its output channels."""
    if head is None:
        return layer(features)
    return layer._conv_forward(features, layer.weight[head], layer.bias[head])


class TapMixin:
    """Makes ``forward`` of a stock U-Net return ``(outputs, features)`` while it trains."""

    tapped_stages: tuple[Stage, ...] = ()

    def forward(self, image: Tensor) -> Tensor | list[Tensor] | tuple[list[Tensor], list[Tensor]]:
        """Stock output in eval mode; in train mode the outputs and the features of the tapped stages."""
        if not self.training:  # type: ignore[attr-defined]
            return super().forward(image)  # type: ignore[misc]
        return forward_unet(self, image, self.tapped_stages)


def tap(network: UNet, stages: Sequence[Stage]) -> None:
    """Tap ``network`` in place. Parameters and ``state_dict`` stay those of the stock class.

    The class of the instance changes instead of its module tree, because nnU-Net, DDP and ``torch.compile`` must go on
    seeing the same network with the same keys.
    """
    check_unet(network)
    if not hasattr(network, "tapped_stages"):
        network.__class__ = type(f"Tapped{type(network).__name__}", (TapMixin, type(network)), {})
    network.tapped_stages = tuple(stages)
