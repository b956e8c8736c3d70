from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from nnunet_kd.teachers.foundation import grid_size
from nnunet_kd.teachers.slices import Slices
from nnunet_kd.teachers.token_maps import TOKEN_SLICES, TOKENS, TokenMaps

STEP = 4  # voxels per token
SHAPE = (9, 16, 24)


class Case:
    """A dataset of one volume whose value is a linear function of the place."""

    def __init__(self) -> None:
        axes = np.meshgrid(*(np.arange(length) for length in SHAPE), indexing="ij")
        self.image = (value_at(np.stack(axes, -1)))[None].astype(np.float32)
        self.loaded = 0

    def load_case(self, case: str) -> tuple[Any, ...]:
        assert case == "a"
        self.loaded += 1
        return self.image, None, None, {}


def value_at(place: np.ndarray) -> np.ndarray:
    return place @ np.array([3.0, 0.25, -0.5])


def pixels(slices: Tensor) -> Tensor:
    return torch.cat((slices, -slices), 1)


def mean_tokens(slices: Tensor) -> Tensor:
    """Two channels: the mean of each token's pixels, and its negative."""
    means = avg_pool2d(slices, STEP)
    return torch.cat((means, -means), 1)


@pytest.fixture
def source(tmp_path: Path) -> tuple[Case, list[Path]]:
    file = tmp_path / "a.b2nd"
    file.write_bytes(b"1")
    return Case(), [file]


def maps_of(folder: Path, axis: int | None, longest: int) -> TokenMaps:
    return TokenMaps(folder / "maps", axis, 3, partial(grid_size, size=longest // STEP, multiple=1))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tokens_of_a_patch_are_those_at_its_place(tmp_path: Path, source: Any, axis: int) -> None:
    patch = (5, 8, 8)
    plane = [length for number, length in enumerate(patch) if number != axis]
    maps = maps_of(tmp_path, axis, max(plane))
    maps.fill({"a": source}, mean_tokens if axis == 0 else pixels)  # the first axis of the case cannot be pooled
    mirrored = torch.tensor([[1.0, 0, 0, 2], [0, -1, 0, 11], [0, 0, 1, 6]])  # of the second axis
    torch.manual_seed(0)
    found = maps(["a"], mirrored[None], patch)
    torch.manual_seed(0)
    drawn = Slices.draw(1, patch[axis], 3, axis, torch.device("cpu"))
    assert torch.equal(found[TOKEN_SLICES], drawn.indices)
    grid = grid_size(plane, max(plane) // STEP, 1)
    assert found[TOKENS].shape == (1, 2, 3, *grid)
    for number, index in enumerate(drawn.indices[0].tolist()):
        for row in range(grid[0]):
            for column in range(grid[1]):
                centre = [(row + 0.5) * plane[0] / grid[0] - 0.5, (column + 0.5) * plane[1] / grid[1] - 0.5]
                centre.insert(axis, index)
                place = mirrored.double().numpy() @ np.array([*centre, 1])
                assert found[TOKENS][0, 0, number, row, column].item() == pytest.approx(value_at(place), abs=0.05)
    assert torch.equal(found[TOKENS][:, 0], -found[TOKENS][:, 1])


def test_patches_of_slices(tmp_path: Path, source: Any) -> None:
    maps = maps_of(tmp_path, None, 8)
    maps.fill({"a": source}, mean_tokens)
    turned = torch.tensor([[0.0, 0, 6], [0, 1, 3], [1, 0, 8]])  # the axes of the patch are those of the case, exchanged
    found = maps(["a", "a"], torch.stack((turned, turned)), (8, 8))
    assert set(found) == {TOKENS}
    assert found[TOKENS].shape == (2, 2, 2, 2)
    place = turned.double().numpy() @ np.array([1.5, 5.5, 1])
    assert found[TOKENS][1, 0, 0, 1].item() == pytest.approx(value_at(place), abs=0.05)


def test_maps_are_computed_once_and_again_when_the_case_changes(tmp_path: Path, source: Any) -> None:
    case, (file,) = source
    for loads in (1, 1):
        maps_of(tmp_path, 0, 8).fill({"a": source}, mean_tokens)
        assert case.loaded == loads
    file.write_bytes(b"22")
    maps_of(tmp_path, 0, 8).fill({"a": source}, mean_tokens)
    assert case.loaded == 2


def test_a_place_outside_of_the_case_has_the_tokens_of_its_border(tmp_path: Path, source: Any) -> None:
    maps = maps_of(tmp_path, None, 8)
    maps.fill({"a": source}, mean_tokens)
    outside = torch.tensor([[0.0, 0, 2], [1, 0, -50], [0, 1, -50]])
    found = maps(["a"], outside[None], (8, 8))[TOKENS][0, 0]
    corner = value_at(np.array([2, 1.5, 1.5]))
    assert torch.allclose(found, torch.full_like(found, corner), atol=0.05)
