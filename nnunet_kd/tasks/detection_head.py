"""The network part of detection: one small convolutional head shared by several decoder levels (torch only)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

PRIOR_PROBABILITY = 0.01  # of each class at each anchor before training, so that negatives do not swamp the start


class BoxMaps(NamedTuple):
    """What the head says of a batch of patches; one map per level, finest first."""

    class_logits: tuple[Tensor, ...]
    """[B, anchors * classes, *S], anchors slowest."""
    box_regression: tuple[Tensor, ...]
    """[B, anchors * 2 * dim, *S], anchors slowest; codes of MONAI's BoxCoder."""


class DetectionHead(nn.Module):
    """A lateral 1x1 convolution per level to a common width, a shared tower of two 3x3 ones, two 1x1 outputs.

    The width is half that of the finest level, from 16 to 64, because a decoder halves its width where it doubles its
    grid: so the head costs a few percent of the U-Net's operations on whichever level it starts.

    Args:
        level_channels: Width of each decoder level, finest first.
        dimension: 2 or 3 spatial axes.
        num_classes: Classes, without background.
        num_anchors: Anchors per position.

    Source: RetinaNet (Lin et al., ICCV 2017) for the shared head and the prior of its class bias; one narrow tower on
    a U-Net's decoder: our design, after Retina U-Net (Jaeger et al., ML4H 2019).
    """

    def __init__(self, level_channels: Sequence[int], dimension: int, num_classes: int, num_anchors: int) -> None:
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[dimension]
        self.width = head_width(level_channels)
        self.num_outputs = num_anchors * (num_classes + 2 * dimension)
        self.laterals = nn.ModuleList(convolution(channels, self.width, 1) for channels in level_channels)
        self.tower = nn.Sequential()
        for _ in range(2):
            self.tower.append(convolution(self.width, self.width, 3, padding=1, bias=False))
            self.tower.append(nn.GroupNorm(8, self.width))
            self.tower.append(nn.LeakyReLU(inplace=True))
        self.classify: Any = convolution(self.width, num_anchors * num_classes, 1)
        self.regress: Any = convolution(self.width, num_anchors * 2 * dimension, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let both outputs start almost constant: the prior for all classes, the anchors themselves for all boxes."""
        for layer in (self.classify, self.regress):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.classify.bias, math.log(PRIOR_PROBABILITY / (1 - PRIOR_PROBABILITY)))

    def forward(self, features: Sequence[Tensor]) -> BoxMaps:
        """Return the maps of the decoder's ``features``, each [B, C_level, *S_level], finest first."""
        towers = [self.tower(lateral(level)) for lateral, level in zip(self.laterals, features, strict=True)]
        return BoxMaps(tuple(self.classify(tower) for tower in towers), tuple(self.regress(tower) for tower in towers))

    def feature_map_size(self, grids: Sequence[Sequence[int]]) -> int:
        """Values in all maps of one patch whose levels have these grids, for nnU-Net's estimate of memory."""
        return sum(math.prod(grid) for grid in grids) * (3 * self.width + self.num_outputs)


def head_width(level_channels: Sequence[int]) -> int:
    """Half of the finest level's width, in steps of 8 (groups of the normalisation), from 16 to 64."""
    return max(16, min(64, level_channels[0] // 2 // 8 * 8))
