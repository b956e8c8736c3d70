"""Channel-wise distillation on logits and features against a loop over samples and channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from nnunet_kd.losses import build_loss

both = pytest.mark.parametrize("on", ["logits", "features"])


@both
def test_against_a_loop(on: str) -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 3, 5, 2, generator=random, dtype=torch.float64).unbind(0)
    valid = torch.rand(3, 1, 3, 5, 2, generator=random) < 0.6
    valid[1] = False  # this sample does not count
    temperature = 2.5
    divergences = []
    for sample in (0, 2):
        mask = valid[sample, 0].numpy()
        for channel in range(4):
            teacher_map = softmax(teacher[sample, channel].numpy()[mask] / temperature)
            student_map = softmax(student[sample, channel].numpy()[mask] / temperature)
            divergences.append(rel_entr(teacher_map, student_map).sum())
    value = build_loss(on, "cwd", temperature=temperature)(student, teacher, valid=valid)
    assert value.item() == pytest.approx(temperature**2 * np.mean(divergences))


@both
def test_offset_of_a_channel_is_ignored(on: str) -> None:
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    shifted = features + torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1)
    assert build_loss(on, "cwd")(shifted, features).item() == pytest.approx(0, abs=1e-12)


@both
def test_many_voxels_do_not_vanish_in_half_precision(on: str) -> None:
    """Over 2^18 voxels a probability is about 4e-6, below what float16 resolves."""
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 1, 64, 64, 64, generator=random).unbind(0)
    loss = build_loss(on, "cwd", temperature=1.0)
    exact = loss(student.double(), teacher.double())
    assert loss(student.half(), teacher.half()).item() == pytest.approx(exact.item(), rel=1e-3)
