"""affinity and intra_class against loops over pairs of tokens and over voxels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nnunet_kd.losses import build_loss


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_affinity_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)  # two places at right angles
    teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).view(1, 2, 1, 2)  # two parallel places
    # the matrices differ by 1 off the diagonal, in 2 of 4 entries
    assert build_loss("features", "affinity")(student, teacher).item() == pytest.approx(0.5)


def test_affinity_against_a_loop_over_pairs_of_blocks() -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 6, 2, generator=random, dtype=torch.float64).unbind(0)
    valid = torch.rand(2, 1, 4, 6, 2, generator=random) < 0.6
    valid[0, 0, :2, :3, 1] = False  # a block without valid voxels
    differences = []
    for sample in range(2):
        tokens = []
        for x, y, z in itertools.product((slice(0, 2), slice(2, 4)), (slice(0, 3), slice(3, 6)), (0, 1)):
            mask = valid[sample, 0, x, y, z].numpy()
            if mask.any():
                blocks = [features[sample, :, x, y, z].numpy() for features in (student, teacher)]
                tokens.append([block[:, mask].mean(axis=1) for block in blocks])
        for first, second in itertools.product(tokens, repeat=2):
            differences.append((cosine(first[0], second[0]) - cosine(first[1], second[1])) ** 2)
    value = build_loss("features", "affinity", tokens_per_axis=2)(student, teacher, valid=valid)
    assert value.item() == pytest.approx(np.mean(differences))


@pytest.mark.parametrize("grid", [(8, 12), (4, 8, 8)])
def test_affinity_pools_to_tokens_inside(grid: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(1)
    coarse = torch.randn(2, 1, 3, *[4] * len(grid), generator=random, dtype=torch.float64)
    fine = coarse
    for axis, size in enumerate(grid, start=3):
        fine = fine.repeat_interleave(size // 4, dim=axis)
    loss = build_loss("features", "affinity", tokens_per_axis=4)
    torch.testing.assert_close(loss(fine[0], fine[1]), loss(coarse[0], coarse[1]))


def test_affinity_has_at_most_eight_tokens_per_axis() -> None:
    student, teacher = torch.randn(2, 1, 2, 16, 24, dtype=torch.float64).unbind(0)
    tokens = [features.unfold(2, 2, 2).unfold(3, 3, 3).mean((-1, -2)) for features in (student, teacher)]
    loss = build_loss("features", "affinity")
    torch.testing.assert_close(loss(student, teacher), loss(*tokens))


@pytest.mark.parametrize("num_classes", [4, 256])
def test_intra_class_against_a_loop(num_classes: int) -> None:
    random = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 2, 3, 4, 5, 2, generator=random, dtype=torch.float64).unbind(0)
    target = torch.randint(0, 4, (2, 1, 4, 5, 2), generator=random)
    valid = torch.rand(2, 1, 4, 5, 2, generator=random) < 0.7
    differences = []
    for sample in range(2):
        mask = valid[sample, 0].numpy()
        labels = target[sample, 0].numpy()[mask]
        pair = [features[sample].numpy()[:, mask].T for features in (student, teacher)]
        for voxel, label in enumerate(labels):
            similarity = [cosine(rows[voxel], rows[labels == label].mean(axis=0)) for rows in pair]
            differences.append((similarity[0] - similarity[1]) ** 2)
    value = build_loss("features", "intra_class", num_classes=num_classes)(student, teacher, target=target, valid=valid)
    assert value.item() == pytest.approx(np.mean(differences))


def test_intra_class_does_not_see_a_rotation_of_the_features() -> None:
    random = torch.Generator().manual_seed(3)
    features = torch.randn(1, 3, 4, 5, generator=random, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=random, dtype=torch.float64)).Q
    rotated = torch.einsum("cd,bdxy->bcxy", rotation, features)
    target = torch.randint(0, 2, (1, 1, 4, 5), generator=random)
    assert build_loss("features", "intra_class")(rotated, features, target=target).item() < 1e-20


def test_intra_class_needs_a_target() -> None:
    features = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="needs a target"):
        build_loss("features", "intra_class")(features, features)
