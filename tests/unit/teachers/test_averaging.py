"""Class-wise averaged images against sums over voxels one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnunet_kd.errors import LabelSpaceError
from nnunet_kd.spaces.labels import LabelSpace
from nnunet_kd.teachers.averaging import check_labels, class_indices, class_means, paint

LABELS = LabelSpace(("background", "a", "b"), ((0,), (1,), (2,)), False)
WITH_IGNORE = LabelSpace(("background", "a", "b"), ((0,), (1,), (2,)), False, 3)
REGIONS = LabelSpace(("whole", "core", "rim"), ((1, 2, 4), (2, 4), (4,)), True)
REGIONS_WITH_IGNORE = LabelSpace(REGIONS.names, REGIONS.values, True, 5)


def averaged(image: Tensor, target: Tensor, space: LabelSpace) -> Tensor:
    classes = class_indices(target, space)
    return paint(class_means(image, classes), classes, image)


def by_hand(image: Tensor, labels: Tensor, ignore: int | None = None) -> Tensor:
    """Voxel by voxel in float64; ``labels`` [B, *S]."""
    result = torch.zeros_like(image, dtype=torch.float64)
    for sample, channel in product(range(image.shape[0]), range(image.shape[1])):
        sums: dict[int, list[float]] = {}
        for place in product(*map(range, image.shape[2:])):
            sums.setdefault(int(labels[sample][place]), []).append(float(image[sample, channel][place]))
        for place in product(*map(range, image.shape[2:])):
            label = int(labels[sample][place])
            own = sums.get(0, [0.0]) if label == ignore else sums[label]
            result[sample, channel][place] = sum(own) / len(own)
    return result


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(5, 7), (3, 4, 5), (1, 16, 9)]),
    channels=st.integers(1, 3),
    ignored=st.booleans(),
)
def test_every_voxel_shows_the_mean_of_its_class(
    seed: int, shape: tuple[int, ...], channels: int, ignored: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, channels, *shape, generator=generator) * 3 + 1
    space = WITH_IGNORE if ignored else LABELS
    labels = torch.randint(0, 4 if ignored else 3, (2, 1, *shape), generator=generator)
    expected = by_hand(image, labels[:, 0], space.ignore)
    found = averaged(image, labels.to(torch.int16), space)
    assert found.dtype == image.dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_regions_are_averaged_by_the_labels_they_were_made_of() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 2, 4, 6, 5, generator=generator)
    values = torch.tensor([0, 1, 2, 4, 5])
    labels = values[torch.randint(0, 5, (2, 4, 6, 5), generator=generator)]
    regions = torch.stack([torch.isin(labels, torch.tensor(own)) for own in REGIONS.values], 1)
    target = torch.cat([regions, (labels == 5)[:, None]], 1)
    torch.testing.assert_close(
        averaged(image, target, REGIONS_WITH_IGNORE).double(), by_hand(image, labels, 5), rtol=1e-5, atol=1e-5
    )
    known = torch.where(labels == 5, 0, labels)
    found = averaged(image, regions.float(), REGIONS)
    torch.testing.assert_close(found.double(), by_hand(image, known), rtol=1e-5, atol=1e-5)


def test_labels_in_the_same_regions_cannot_be_told_apart() -> None:
    space = LabelSpace(("whole", "core"), ((1, 2, 3), (3,)), True)
    with pytest.raises(LabelSpaceError, match=r"Labels 1 and 2 belong to the same regions \(whole, core\)"):
        check_labels(space)
    check_labels(REGIONS)
    check_labels(LABELS)


def test_a_class_that_is_not_there_has_no_part_in_it() -> None:
    image = torch.randn(1, 1, 8, 8)
    target = torch.zeros(1, 1, 8, 8)
    target[..., :4] = 2
    means = class_means(image, class_indices(target, LABELS))
    assert means[0, 0, 1] == 0
    assert means[0, 0, 2] == pytest.approx(float(image[..., :4].mean()), abs=1e-6)
    nothing = class_indices(torch.full((1, 1, 8, 8), 3.0), WITH_IGNORE)
    assert not paint(class_means(image, nothing), nothing, image).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    image = torch.full((1, 1, 256, 256), 3.0, dtype=dtype)  # the sum, 196608, has no float16
    image[..., ::2] = 5.0
    found = averaged(image, torch.ones(1, 1, 256, 256), LABELS)
    assert found.dtype == dtype
    assert (found == 4).all()


def test_the_mean_is_exact_for_large_images() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(100, 1, (1, 1, 64, 128, 128)).astype(np.float32)
    means = class_means(torch.from_numpy(values), class_indices(torch.zeros(values.shape), LABELS))
    assert float(means[0, 0, 0]) == pytest.approx(values.astype(np.float64).mean(), rel=1e-6)
