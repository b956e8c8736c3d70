"""Class-masked feature imitation against a loop over voxels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax

from nnunet_kd.losses import build_loss


def test_against_a_loop() -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5, generator=random, dtype=torch.float64).unbind(0)
    target = torch.randint(0, 4, (2, 1, 4, 5), generator=random)
    valid = torch.rand(2, 1, 4, 5, generator=random) < 0.7
    temperature, per_sample = 0.8, []
    for sample in range(2):
        mask = valid[sample, 0].numpy()
        labels = target[sample, 0].numpy()[mask]
        pair = [features[sample].numpy()[:, mask] for features in (student, teacher)]
        pair = [(v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-5) for v in pair]
        num_channels, num_voxels = pair[0].shape
        scale = np.array([1 / np.sum(labels == label) for label in labels])
        scale *= num_voxels / scale.sum()
        spatial = num_voxels * softmax(np.abs(pair[1]).mean(axis=0) / temperature)
        channel = num_channels * softmax(np.abs(pair[1]).mean(axis=1) / temperature)
        total = 0.0
        for voxel in range(num_voxels):
            for c in range(num_channels):
                error = (pair[0][c, voxel] - pair[1][c, voxel]) ** 2
                total += scale[voxel] * spatial[voxel] * channel[c] * error
        per_sample.append(total / num_voxels / num_channels)
    value = build_loss("features", "class_masked", temperature=temperature)(
        student, teacher, target=target, valid=valid
    )
    assert value.item() == pytest.approx(np.mean(per_sample))


def test_classes_weigh_the_same_whatever_their_size() -> None:
    """The same error at one voxel costs as many times more as its class is smaller."""
    teacher = torch.zeros(1, 2, 10, 10, dtype=torch.float64)
    teacher[0, 0] = torch.tensor([1.0, -1.0]).repeat(50).view(10, 10)
    teacher[0, 1] = torch.tensor([1.0, -1.0]).repeat(50).view(10, 10)  # all voxels have one attention
    target = torch.zeros(1, 1, 10, 10, dtype=torch.long)
    target[0, 0, :2, :2] = 1  # 4 voxels of class 1, 96 of class 0
    loss = build_loss("features", "class_masked")

    def error_at(row: int, column: int) -> float:
        student = teacher.clone()
        student[0, :, row, column] += 0.01 * student[0, :, row, column]
        return loss(student, teacher, target=target).item()

    # standardising spreads the error over all voxels a little, hence not exactly 24
    assert error_at(0, 0) / error_at(5, 0) == pytest.approx(24, rel=0.1)


def test_nested_regions_are_taken_as_their_labels() -> None:
    random = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 1, 3, 6, 6, generator=random).unbind(0)
    labels = torch.randint(0, 3, (1, 1, 6, 6), generator=random)
    regions = torch.cat([labels > 0, labels > 1], dim=1)
    loss = build_loss("features", "class_masked")
    assert torch.equal(loss(student, teacher, target=regions), loss(student, teacher, target=labels))


def test_needs_a_target() -> None:
    features = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="needs a target"):
        build_loss("features", "class_masked")(features, features)


def test_labels_beyond_the_bound_share_the_last_class() -> None:
    random = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 1, 3, 6, 6, generator=random).unbind(0)
    labels = torch.randint(0, 5, (1, 1, 6, 6), generator=random)
    bounded = build_loss("features", "class_masked", num_classes=3)(student, teacher, target=labels)
    merged = build_loss("features", "class_masked")(student, teacher, target=labels.clamp(max=2))
    assert math.isclose(bounded.item(), merged.item(), rel_tol=1e-6)
