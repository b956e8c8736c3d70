"""Wavelet detail: the student imitates edges and texture of the teacher's features, not their smooth part."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from nnunet_kd.losses.base import FeatureLoss, require_choice, require_integer
from nnunet_kd.losses.voxels import blank

# Lowpass analysis filters of the orthonormal wavelets of Daubechies (Ten Lectures on Wavelets, 1992, table 6.1).
LOWPASS: dict[str, tuple[float, ...]] = {
    "haar": (math.sqrt(0.5), math.sqrt(0.5)),
    "db4": (
        -0.010597401785069032,
        0.0328830116668852,
        0.030841381835560764,
        -0.18703481171909309,
        -0.027983769416859854,
        0.6308807679298589,
        0.7148465705529157,
        0.2303778133088965,
    ),
}


class WaveletDetailLoss(FeatureLoss):
    """Mean squared difference of what remains of the features without their smoothest and their roughest band.

    Each level splits the features along every axis into a lowpass and a highpass band (2^d bands in d dimensions),
    drops the band that is lowpass along all axes and the one that is highpass along all axes, and goes back to voxels.
    The error is the mean over voxels, channels and levels; the next level splits the all-lowpass band.

    Args:
        levels: How often to split (>= 1). After the first level it ends as soon as the shortest axis is shorter than
            the filter.
        wavelet: "haar" (2 coefficients) or "db4" (8 coefficients, 4 vanishing moments).

    Voxels that are not valid have no difference, and the mean is over the others.

    Source: DCD (arXiv 2605.26382): its bands, db4, three levels, zeros outside the grid. The same in another form: the
    transform is linear, so it is applied once, to the difference; it is orthonormal, so the kept bands are the
    difference less the two dropped ones; and axes are transformed by matrices, exact for every size.
    """

    def __init__(self, *, levels: int = 3, wavelet: Literal["haar", "db4"] = "db4") -> None:
        super().__init__()
        self.levels = require_integer("levels", levels, at_least=1)
        self.wavelet = require_choice("wavelet", wavelet, tuple(LOWPASS))

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the mean squared difference of the detail, see :class:`WaveletDetailLoss`."""
        del target
        smooth = blank(student - teacher, valid)
        errors: list[Tensor] = []
        while not errors or (len(errors) < self.levels and min(smooth.shape[2:]) >= len(LOWPASS[self.wavelet])):
            lowpass, highpass = self._filters(smooth)
            rough = _along_axes(smooth, highpass)
            next_smooth = _along_axes(smooth, lowpass)
            detail = smooth - _along_axes(next_smooth, [matrix.T for matrix in lowpass])
            detail = detail - _along_axes(rough, [matrix.T for matrix in highpass])
            errors.append(detail.square().mean())
            smooth = next_smooth
        error = torch.stack(errors).mean()
        return error if valid is None else error * valid.numel() / valid.sum().clamp(min=1)

    def _filters(self, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The lowpass and the highpass matrix of each spatial axis."""
        pairs = [_analysis(self.wavelet, size, features.device, features.dtype) for size in features.shape[2:]]
        return [lowpass for lowpass, _ in pairs], [highpass for _, highpass in pairs]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached matrix made in inference mode could not be trained through later
def _analysis(wavelet: str, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrices [bands, size] that filter an axis and keep every second value, with zeros outside the axis.

    There is a row wherever the filter touches the axis; the transposed matrices therefore give back every signal.
    """
    lowpass = LOWPASS[wavelet]
    highpass = tuple((-1) ** tap * value for tap, value in enumerate(reversed(lowpass)))

    def matrix(taps: tuple[float, ...]) -> Tensor:
        rows = [[0.0] * size for _ in range((size + len(taps) - 1) // 2)]
        for position, row in enumerate(rows):
            for tap, value in enumerate(taps):
                column = 2 * position + 1 - tap
                if 0 <= column < size:
                    row[column] = value
        return torch.tensor(rows, device=device, dtype=dtype)

    return matrix(lowpass), matrix(highpass)


def _along_axes(features: Tensor, matrices: list[Tensor]) -> Tensor:
    """Multiply each spatial axis of ``features`` [B, C, *S] by its matrix."""
    for axis, matrix in enumerate(matrices, start=2):
        features = torch.tensordot(features, matrix, dims=([axis], [1])).movedim(-1, axis)
    return features
