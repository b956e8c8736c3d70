"""mse, cosine and attention against numpy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunet_kd.losses import build_loss


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher [3, 4, 3, 5, 2] and valid; the sample in the middle has no valid voxel."""
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 3, 5, 2, generator=random, dtype=torch.float64).unbind(0)
    valid = torch.rand(3, 1, 3, 5, 2, generator=random) < 0.6
    valid[1] = False
    return student, teacher, valid


def voxels(features: Tensor, valid: Tensor, sample: int) -> np.ndarray:
    """[channels, valid voxels of one sample]."""
    return features[sample].numpy()[:, valid[sample, 0].numpy()]


def test_mse_by_hand() -> None:
    student, teacher = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), torch.tensor([4.0, 0.0]).view(1, 1, 1, 2)
    assert build_loss("features", "mse", standardise=False)(student, teacher).item() == pytest.approx((9 + 4) / 2)
    # standardised: (-1, 1) and (1, -1)
    assert build_loss("features", "mse")(student, teacher).item() == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize("standardise", [True, False])
def test_mse_against_numpy(batch: tuple[Tensor, Tensor, Tensor], standardise: bool) -> None:
    student, teacher, valid = batch
    errors = []
    for sample in (0, 2):
        pair = [voxels(features, valid, sample) for features in (student, teacher)]
        if standardise:
            pair = [(v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-5) for v in pair]
        errors.append((pair[0] - pair[1]) ** 2)
    value = build_loss("features", "mse", standardise=standardise)(student, teacher, valid=valid)
    assert value.item() == pytest.approx(np.concatenate(errors, axis=1).mean())


def test_mse_ignores_scale_and_offset_of_channels(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, _, valid = batch
    scale = torch.tensor([2.0, 5.0, 10.0, 3.0], dtype=torch.float64).view(1, 4, 1, 1, 1)
    assert build_loss("features", "mse")(scale * student - 7, student, valid=valid).item() < 1e-9


def test_cosine_by_hand() -> None:
    student = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 2.0]]).T.reshape(1, 2, 1, 3)
    teacher = torch.tensor([[6.0, 8.0], [0.0, 5.0], [-1.0, -1.0]]).T.reshape(1, 2, 1, 3)
    assert build_loss("features", "cosine")(student, teacher).item() == pytest.approx((0 + 1 + 2) / 3)
    zeros = torch.zeros_like(student)
    assert build_loss("features", "cosine")(zeros, teacher).item() == pytest.approx(1)


def test_cosine_against_numpy(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, valid = batch
    pair = [np.concatenate([voxels(v, valid, sample) for sample in (0, 2)], axis=1) for v in (student, teacher)]
    cosine = (pair[0] * pair[1]).sum(0) / np.linalg.norm(pair[0], axis=0) / np.linalg.norm(pair[1], axis=0)
    value = build_loss("features", "cosine")(student, teacher, valid=valid)
    assert value.item() == pytest.approx(np.mean(1 - cosine))


def test_attention_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).reshape(1, 2, 1, 2)  # attends to the first voxel
    teacher = torch.tensor([[0.0, 0.0], [0.0, 3.0]]).reshape(1, 2, 1, 2)  # to the second
    assert build_loss("features", "attention")(student, teacher).item() == pytest.approx(2)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_attention_against_numpy(batch: tuple[Tensor, Tensor, Tensor], power: float) -> None:
    student, teacher, valid = batch
    distances = []
    for sample in (0, 2):
        maps = [(np.abs(voxels(v, valid, sample)) ** power).mean(0) for v in (student, teacher)]
        maps = [attention / np.linalg.norm(attention) for attention in maps]
        distances.append(((maps[0] - maps[1]) ** 2).sum())
    value = build_loss("features", "attention", power=power)(student, teacher, valid=valid)
    assert value.item() == pytest.approx(np.mean(distances))
