"""Slices of a 3D patch and the student's features at the same places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_kd.teachers.slices import Slices, coarsest_axis


def test_one_slice_is_drawn_from_each_equal_part() -> None:
    torch.manual_seed(0)
    drawn = Slices.draw(500, 22, 4, 0, torch.device("cpu")).indices
    assert drawn.shape == (500, 4)
    for part in range(4):
        found = set(drawn[:, part].tolist())
        assert found == set(range(int(part * 5.5), min(22, int(np.ceil((part + 1) * 5.5)))))
    assert Slices.draw(2, 3, 8, 0, torch.device("cpu")).indices.tolist() == [[0, 1, 2]] * 2  # not more than there are


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_of_an_image(axis: int) -> None:
    image = torch.randn(2, 3, 6, 7, 8)
    indices = torch.tensor([[0, 3], [2, 5]])
    found = Slices(axis, indices, image.shape[axis + 2]).of_image(image)
    for sample in range(2):
        for place in range(2):
            expected = image[sample].select(axis + 1, int(indices[sample, place]))
            assert torch.equal(found[sample, :, place], expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_features_are_interpolated_at_the_centres_of_the_slices(axis: int) -> None:
    shape = [6, 7, 8]
    shape[axis] = 5
    features = torch.randn(2, 3, *shape)
    indices = torch.tensor([[0, 4, 19], [7, 12, 13]])
    found = Slices(axis, indices, 20).of_features(features)
    centres = (np.arange(5) + 0.5) * 4  # of the features, in voxels of the image
    for sample in range(2):
        lines = features[sample].movedim(axis + 1, -1).numpy()
        for place in range(3):
            position = float(indices[sample, place]) + 0.5
            expected = np.apply_along_axis(lambda line, at=position: np.interp(at, centres, line), -1, lines)
            np.testing.assert_allclose(found[sample, :, place].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_features_on_the_grid_of_the_image_are_its_slices() -> None:
    features, slices = torch.randn(2, 3, 6, 5, 4), Slices(0, torch.tensor([[1, 4], [0, 5]]), 6)
    torch.testing.assert_close(slices.of_features(features), slices.of_image(features))
    torch.testing.assert_close(slices[1:].of_image(features[1:]), slices.of_image(features)[1:])


def test_coarsest_axis() -> None:
    assert coarsest_axis([1.0, 3.0, 2.0]) == 1
    assert coarsest_axis([1.0, 1.0, 1.0]) == 0
