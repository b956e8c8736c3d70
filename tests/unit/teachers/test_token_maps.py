from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from nnunet_kd.errors import TeacherError
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


def maps_of(folder: Path, axis: int | None, longest: int, patch: tuple[int, ...] = (8, 8, 8)) -> TokenMaps:
    patch = patch if axis is not None else patch[1:]
    return TokenMaps(folder / "maps", patch, axis, 3, partial(grid_size, size=longest // STEP, multiple=1))


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


def test_a_map_that_is_gone_is_computed_again(tmp_path: Path, source: Any) -> None:
    case, _ = source
    maps = maps_of(tmp_path, 0, 8)
    maps.fill({"a": source}, mean_tokens)
    (maps.folder / "a.npy").unlink()
    maps.fill({"a": source}, mean_tokens)
    assert case.loaded == 2
    assert (maps.folder / "a.npy").is_file()


def test_tokens_that_16_bits_cannot_hold_are_refused(tmp_path: Path, source: Any) -> None:
    maps = maps_of(tmp_path, 0, 8)
    with pytest.raises(TeacherError, match="tokens of a that are not finite"):
        maps.fill({"a": source}, lambda slices: mean_tokens(slices) * 1e6)
    assert not list(maps.folder.glob("*"))


def test_what_cannot_be_written_is_said(tmp_path: Path, source: Any) -> None:
    (tmp_path / "maps").touch()  # instead of a folder
    with pytest.raises(TeacherError, match=r"token map of a .* cannot be written to .*maps"):
        maps_of(tmp_path, 0, 8).fill({"a": source}, mean_tokens)


@pytest.mark.parametrize("axis", [0, None])
def test_a_case_smaller_than_a_patch_is_padded_as_its_patches_are(
    tmp_path: Path, source: Any, axis: int | None
) -> None:
    patch = (12, 20, 24)  # the case has 9, 16 and 24 voxels
    case, _ = source
    maps = maps_of(tmp_path, axis, 24, patch)
    maps.fill({"a": source}, mean_tokens)
    padded = torch.nn.functional.pad(torch.from_numpy(case.image), (0, 0, 2, 2, 2, 1) if axis == 0 else (0, 0, 2, 2))
    means = avg_pool2d(padded, STEP)[0]
    assert np.allclose(np.load(maps.folder / "a.npy")[..., 0], means, atol=0.1)
    place = torch.tensor([[1.0, 0, 0, -2], [0, 1, 0, -2], [0, 0, 1, 0]])
    if axis is None:
        place = torch.cat((torch.tensor([[0.0, 0, 4]]), place[1:, 1:]))
    found = maps(["a"], place[None], patch if axis == 0 else patch[1:])
    numbers = found[TOKEN_SLICES][0] if axis == 0 else torch.tensor([4])
    assert torch.allclose(found[TOKENS][0, 0].float(), means[numbers].squeeze(0), atol=0.1)


def test_a_place_outside_of_the_case_has_the_tokens_of_its_border(tmp_path: Path, source: Any) -> None:
    maps = maps_of(tmp_path, None, 8)
    maps.fill({"a": source}, mean_tokens)
    outside = torch.tensor([[0.0, 0, 2], [1, 0, -50], [0, 1, -50]])
    found = maps(["a"], outside[None], (8, 8))[TOKENS][0, 0]
    corner = value_at(np.array([2, 1.5, 1.5]))
    assert torch.allclose(found, torch.full_like(found, corner), atol=0.05)
