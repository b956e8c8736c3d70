"""The residual blocks of StarGAN v2: pre-activation, average pooling on the way down, nearest neighbours on the way up.

Source: Choi et al., CVPR 2020 (arXiv 1912.01865), which Oh and Ye (ECCV 2022, arXiv 2104.05892) build on. Kernels and
strides are those of the plans, so that the blocks fit 2D and 3D, also with anisotropic voxels (our design).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_kd.networks.adaptive_norm import AdaptiveInstanceNorm

SLOPE = 0.2  # of the leaky ReLU
AVERAGE_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}


class ResidualBlock(nn.Module):
    """(shortcut(x) + residual(x)) / sqrt(2); the spatial size is divided or multiplied by ``stride``.

    Shapes: [B, in_channels, *S], code [B, style_dim] or None -> [B, out_channels, *S / stride], going up *S * stride.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        conv_op: nn.Conv2d or nn.Conv3d.
        kernel_size: Of both convolutions, odd.
        stride: Per axis; ones keep the size.
        up: Whether the block upsamples.
        style_dim: Length of the codes that its norms take; None leaves normalisation out.
        affine: Whether its norms without a code have a scale and a shift that learn.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        conv_op: Any,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        *,
        up: bool = False,
        style_dim: int | None = None,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.up = tuple(stride), up
        hidden = out_channels if up else in_channels
        padding = [size // 2 for size in kernel_size]
        self.conv1 = conv_op(in_channels, hidden, kernel_size, padding=padding)
        self.conv2 = conv_op(hidden, out_channels, kernel_size, padding=padding)
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = conv_op(in_channels, out_channels, 1, bias=False)
        self.norm1 = self.norm2 = None
        if style_dim is not None:
            dimension = len(self.stride)
            self.norm1 = AdaptiveInstanceNorm(in_channels, style_dim, dimension, affine)
            self.norm2 = AdaptiveInstanceNorm(hidden, style_dim, dimension, affine)

    def forward(self, feature: Tensor, code: Tensor | None = None) -> Tensor:
        """Run the block; the norms take ``code``."""
        residual = _activate(self.norm1, feature, code)
        if self.up:
            residual, feature = self._resize(residual), self._resize(feature)
        residual = self.conv1(residual)
        shortcut = self.shortcut(feature)
        if not self.up:
            residual, shortcut = self._resize(residual), self._resize(shortcut)
        residual = self.conv2(_activate(self.norm2, residual, code))
        return (shortcut + residual) / math.sqrt(2)

    def _resize(self, feature: Tensor) -> Tensor:
        if max(self.stride) == 1:
            return feature
        if self.up:
            return F.interpolate(feature, scale_factor=[float(step) for step in self.stride], mode="nearest")
        return AVERAGE_POOL[len(self.stride)](feature, self.stride)


def _activate(norm: AdaptiveInstanceNorm | None, feature: Tensor, code: Tensor | None) -> Tensor:
    return F.leaky_relu(feature if norm is None else norm(feature, code), SLOPE)


def initialize_he(module: nn.Module) -> None:
    """He's normal initialisation of convolutions and linear layers, biases 0, as StarGAN v2 does; for ``apply``."""
    if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
