"""The shared helpers on masks and classes against plain Python and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_kd.losses import voxels


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20))
def test_resize_takes_the_voxel_under_the_centre(length: int, size: int) -> None:
    mask = torch.arange(length).view(1, 1, length, 1)
    taken = voxels.resize_nearest(mask, (size, 1)).flatten().tolist()
    assert taken == [int(np.floor((index + 0.5) * length / size + 1e-9)) for index in range(size)]


def test_resize_keeps_the_type() -> None:
    for dtype in (torch.bool, torch.int16, torch.uint8, torch.float32):
        mask = torch.ones(1, 2, 4, 6, 8, dtype=dtype)
        resized = voxels.resize_nearest(mask, (2, 6, 3))
        assert resized.shape == (1, 2, 2, 6, 3)
        assert resized.dtype == dtype


def test_a_voxel_of_several_regions_is_of_the_last() -> None:
    regions = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]).view(1, 2, 1, 4)
    assert voxels.class_of_voxel(regions, None, 256).flatten().tolist() == [0, 1, 2, 2]


def test_labels_out_of_range_do_not_fail_where_they_do_not_matter() -> None:
    labels = torch.tensor([-1, 0, 2, 255]).view(1, 1, 1, 4)
    valid = torch.tensor([False, True, True, False]).view(1, 1, 1, 4)
    assert voxels.class_of_voxel(labels, valid, 3).flatten().tolist() == [0, 0, 2, 0]


def test_counts_and_balanced_weights() -> None:
    random = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 5, (2, 1, 3, 4, 6), generator=random)
    valid = torch.rand(2, 1, 3, 4, 6, generator=random) < 0.5
    counts = voxels.count_classes(classes, valid, 6)
    for sample in range(2):
        expected = np.bincount(classes[sample][valid[sample]].numpy(), minlength=6)
        assert counts[sample].tolist() == expected.tolist()
    weights = voxels.balanced_weights(classes, valid, 6, torch.float64)
    for label in range(5):
        assert weights[classes == label].sum().item() == pytest.approx(1 / 5)
    assert weights[~valid].count_nonzero() == 0


def test_standardise_with_and_without_mask() -> None:
    features = 5 + 3 * torch.randn(2, 3, 4, 5, dtype=torch.float64)
    everything = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    torch.testing.assert_close(voxels.standardise(features, None), voxels.standardise(features, everything))
    half = everything.clone()
    half[..., :2] = False
    result = voxels.standardise(features, half)[..., 2:].flatten(2)
    torch.testing.assert_close(result.mean(2), torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(result.var(2, correction=0), torch.ones(2, 3, dtype=torch.float64), rtol=1e-4, atol=0)
