"""Slices of a 3D patch for a teacher that sees images in two dimensions (our design)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slices:
    """K slices of each sample of a batch.

    ``axis``: of the spatial axes 0 to 2, the one across the slices. ``indices``: [B, K] int64, in voxels of the image.
    ``length``: of the image along the axis, in voxels.
    """

    axis: int
    indices: Tensor
    length: int

    @classmethod
    def draw(cls, batch_size: int, length: int, count: int, axis: int, device: torch.device) -> Slices:
        """Equally spaced slices with jitter: one at random from each of ``count`` equal parts of the axis."""
        count = min(count, length)
        edges = torch.arange(count, device=device) * (length / count)
        jitter = torch.rand(batch_size, count, device=device) * (length / count)
        return cls(axis, (edges + jitter).long().clamp(max=length - 1), length)

    def __getitem__(self, rows: slice) -> Slices:
        """The slices of some samples."""
        return Slices(self.axis, self.indices[rows], self.length)

    def of_image(self, image: Tensor) -> Tensor:
        """The slices themselves: [B, C, *S] -> [B, C, K, h, w], the other two axes in their order."""
        across = image.movedim(self.axis + 2, 2)
        return _take(across, self.indices)

    def of_features(self, features: Tensor) -> Tensor:
        """Features at the centres of the slices, interpolated linearly: [B, C, *s] -> [B, C, K, h, w]."""
        across = features.movedim(self.axis + 2, 2)
        length = across.shape[2]
        place = ((self.indices + 0.5) * (length / self.length) - 0.5).clamp(0, length - 1)
        below = place.floor().long()
        above = (below + 1).clamp(max=length - 1)
        part = (place - below).to(features.dtype).view(len(features), 1, -1, 1, 1)
        return torch.lerp(_take(across, below), _take(across, above), part)


def coarsest_axis(spacing: Sequence[float]) -> int:
    """The axis with the largest spacing, the first one of several."""
    return max(range(len(spacing)), key=lambda axis: (spacing[axis], -axis))


def _take(across: Tensor, indices: Tensor) -> Tensor:
    """From [B, C, D, h, w] the slices [B, K] of the third axis."""
    index = indices.view(len(across), 1, -1, 1, 1).expand(-1, across.shape[1], -1, *across.shape[3:])
    return across.gather(2, index)
