"""The wavelet detail loss against a convolution-based transform, and its filters against their defining properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from nnunet_kd.losses import build_loss
from nnunet_kd.losses.wavelet import LOWPASS


@pytest.mark.parametrize(("wavelet", "num_vanishing_moments"), [("haar", 1), ("db4", 4)])
def test_filters_are_daubechies(wavelet: str, num_vanishing_moments: int) -> None:
    lowpass = np.array(LOWPASS[wavelet])
    assert lowpass.sum() == pytest.approx(math.sqrt(2), abs=1e-11)
    assert len(lowpass) == 2 * num_vanishing_moments  # the shortest filter with so many moments
    for shift in range(0, len(lowpass), 2):
        product = (lowpass[shift:] * lowpass[: len(lowpass) - shift]).sum()
        assert product == pytest.approx(1.0 if shift == 0 else 0.0, abs=1e-11)
    signs = (-1.0) ** np.arange(len(lowpass))
    for moment in range(num_vanishing_moments):
        assert (signs * lowpass * np.arange(len(lowpass)) ** moment).sum() == pytest.approx(0, abs=1e-8)


def split(signal: np.ndarray, axis: int, taps: np.ndarray) -> np.ndarray:
    """Full convolution with zeros outside, every second value from the second on."""
    convolved = np.apply_along_axis(lambda line: np.convolve(line, taps), axis, signal)
    return convolved.take(range(1, convolved.shape[axis], 2), axis)


def join(band: np.ndarray, axis: int, taps: np.ndarray, size: int) -> np.ndarray:
    """Zeros between the values, then convolution with the reversed filter, cut to ``size``."""

    def line_of(values: np.ndarray) -> np.ndarray:
        spread = np.zeros(2 * len(values))
        spread[1::2] = values
        return np.convolve(spread, taps[::-1])[len(taps) - 1 :][:size]

    return np.apply_along_axis(line_of, axis, band)


def detail_and_smooth(volume: np.ndarray, lowpass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All bands are computed; those that are neither lowpass nor highpass along all axes are joined again."""
    highpass = (-1.0) ** np.arange(len(lowpass)) * lowpass[::-1]
    detail, smooth = np.zeros_like(volume), volume
    for choice in itertools.product((0, 1), repeat=volume.ndim):
        band = volume
        for axis, is_high in enumerate(choice):
            band = split(band, axis, highpass if is_high else lowpass)
        if not any(choice):
            smooth = band
        elif not all(choice):
            for axis, is_high in enumerate(choice):
                band = join(band, axis, highpass if is_high else lowpass, volume.shape[axis])
            detail = detail + band
    return detail, smooth


@pytest.mark.parametrize("wavelet", ["haar", "db4"])
@pytest.mark.parametrize(("grid", "num_levels"), [((16, 19), 3), ((9, 10, 11), 2), ((5, 6, 3), 1)])
def test_against_all_bands(wavelet: str, grid: tuple[int, ...], num_levels: int) -> None:
    """Student and teacher are transformed each on their own, band by band."""
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 2, *grid, generator=random, dtype=torch.float64).unbind(0)
    lowpass, errors = np.array(LOWPASS[wavelet]), []
    for channel in range(2):
        pair = [features[0, channel].numpy() for features in (student, teacher)]
        for _ in range(num_levels):
            (student_detail, student_smooth), (teacher_detail, teacher_smooth) = (
                detail_and_smooth(values, lowpass) for values in pair
            )
            errors.append(np.mean((student_detail - teacher_detail) ** 2))
            pair = [student_smooth, teacher_smooth]
    value = build_loss("features", "wavelet", wavelet=wavelet, levels=num_levels)(student, teacher)
    assert value.item() == pytest.approx(np.mean(errors))


def test_haar_by_hand() -> None:
    """One level on 2 x 2: of the mean, the two edges and the chequerboard only the edges count."""
    zeros = torch.zeros(1, 1, 2, 2)
    loss = build_loss("features", "wavelet", wavelet="haar", levels=1)
    vertical_edge = torch.tensor([[1.0, -1.0], [1.0, -1.0]]).view(1, 1, 2, 2)
    horizontal_edge = vertical_edge.transpose(2, 3)
    chequerboard = vertical_edge * horizontal_edge
    assert loss(vertical_edge, zeros).item() == pytest.approx(1)
    assert loss(2 * horizontal_edge, zeros).item() == pytest.approx(4)
    assert loss(chequerboard, zeros).item() == pytest.approx(0, abs=1e-12)
    assert loss(torch.ones(1, 1, 2, 2), zeros).item() == pytest.approx(0, abs=1e-12)


def test_levels_are_reduced_on_a_small_grid() -> None:
    student, teacher = torch.randn(2, 1, 2, 4, 4, 4).unbind(0)
    one, three = (build_loss("features", "wavelet", levels=levels)(student, teacher) for levels in (1, 3))
    assert torch.equal(one, three)  # db4 has 8 coefficients


def test_mean_is_over_valid_voxels() -> None:
    """Half of the grid is not valid, and the other half is far from the border between: the mean does not change."""
    student, teacher = torch.zeros(2, 1, 1, 8, 8).unbind(0)
    student[..., :4] = torch.tensor([1.0, -1.0]).repeat(2)
    left = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    left[..., :4] = True
    loss = build_loss("features", "wavelet", wavelet="haar", levels=1)
    assert loss(student, teacher, valid=left).item() == pytest.approx(1)
    assert loss(student, teacher).item() == pytest.approx(0.5)


def test_matrices_made_in_inference_mode_can_be_trained_through() -> None:
    loss = build_loss("features", "wavelet")
    student = torch.randn(1, 1, 11, 13)
    with torch.inference_mode():
        loss(student, torch.zeros_like(student))
    student.requires_grad_()
    loss(student, torch.zeros_like(student)).backward()
    assert student.grad.abs().sum() > 0
