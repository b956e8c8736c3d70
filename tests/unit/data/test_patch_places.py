from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from torch import Tensor

from nnunet_kd.data.patch_places import POINTS_PER_AXIS, PatchPlaces, affine_map, points
from nnunet_kd.errors import SettingsError

SLOPES = torch.tensor([10.0, 0.5, -2.0])


def spatial(patch: tuple[int, ...], elastic: float = 0.0) -> Any:
    turning = SpatialTransform(
        patch,
        patch_center_dist_from_border=0,
        random_crop=False,
        p_elastic_deform=elastic,
        elastic_deform_magnitude=(0.5, 0.5),
        p_rotation=1.0,
        rotation=(-0.5, 0.5),
        p_scaling=1.0,
        scaling=(0.8, 1.2),
    )
    return ComposeTransforms([turning, MirrorTransform(tuple(range(len(patch))))])


def linear_image(lower: tuple[int, ...], shape: tuple[int, ...], slopes: Tensor) -> Tensor:
    axes = [torch.arange(low, low + length).float() for low, length in zip(lower, shape, strict=True)]
    return (torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) @ slopes)[None]


def loader_of(transforms: Any, lower: tuple[int, ...], is_2d: bool) -> Any:
    upper = [low + 30 for low in lower]
    return SimpleNamespace(transforms=transforms, get_bbox=lambda *_: (list(lower), upper), patch_size_was_2d=is_2d)


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 (the transforms draw from the global generator)


@pytest.mark.parametrize("number", range(4))
def test_places_are_those_that_the_image_comes_from(number: int) -> None:
    lower, shape, patch = (-3, 4, 100), (20, 30, 28), (8, 12, 10)
    image = linear_image(lower, shape, SLOPES)
    segmentation = torch.zeros((1, *shape), dtype=torch.int16)
    seed(number)
    expected = spatial(patch)(image=image, segmentation=segmentation)["image"]

    loader = loader_of(spatial(patch), lower, is_2d=False)
    places = PatchPlaces(loader)
    seed(number)
    loader.get_bbox(None, False, None)
    result = loader.transforms(image=image, segmentation=segmentation)
    assert torch.equal(result["image"], expected)
    assert set(result) == {"image", "segmentation"}
    (matrix,) = places.take()
    voxels = torch.stack(torch.meshgrid(*(torch.arange(length).float() for length in patch), indexing="ij"), -1)
    assert torch.allclose((voxels @ matrix[:, :3].T + matrix[:, 3]) @ SLOPES, expected[0], atol=0.05)
    with pytest.raises(RuntimeError):
        places.take()  # every place is taken once


def test_a_patch_of_a_slice_has_the_slice_as_its_first_coordinate() -> None:
    lower, shape, patch = (7, 2, -5), (30, 34), (12, 16)
    image = linear_image(lower[1:], shape, SLOPES[1:])
    loader = loader_of(spatial(patch), lower, is_2d=True)
    places = PatchPlaces(loader)
    loader.get_bbox(None, False, None)
    result = loader.transforms(image=image, segmentation=torch.zeros((1, *shape), dtype=torch.int16))
    (matrix,) = places.take()
    assert matrix.shape == (3, 3)
    assert matrix[0].tolist() == [0, 0, 7]
    voxels = torch.stack(torch.meshgrid(*(torch.arange(length).float() for length in patch), indexing="ij"), -1)
    assert torch.allclose((voxels @ matrix[1:, :2].T + matrix[1:, 2]) @ SLOPES[1:], result["image"][0], atol=0.05)


def test_an_axis_with_one_voxel() -> None:
    coordinates = torch.stack(
        [*torch.meshgrid(torch.tensor([5.0]), torch.arange(6.0), indexing="ij"), torch.ones(1, 6)]
    )
    matrix = affine_map(coordinates, (1, 6))
    assert torch.allclose(matrix @ torch.tensor([0.0, 4.0, 1.0]), torch.tensor([5.0, 4.0]), atol=1e-5)


def test_a_patch_that_lies_in_padding_but_for_a_line_is_refused() -> None:
    inside = torch.zeros(4, 6)
    inside[2] = 1
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    with pytest.raises(SettingsError, match="cannot be cut"):
        affine_map(torch.stack([rows, columns, torch.ones(4, 6)]) * inside, (4, 6))


@pytest.mark.parametrize("length", [1, 5, 8, 9, 20, 23])
def test_points_of_an_axis_are_its_ends_and_lie_mirrored(length: int) -> None:
    found = points(length)
    assert len(found) == min(length, POINTS_PER_AXIS)
    assert (found[0], found[-1]) == (0, length - 1)
    assert (length - 1 - found).flip(0).tolist() == found.tolist()
    assert found.tolist() == sorted(set(found.tolist()))


def test_a_patch_of_any_number_of_voxels_in_dummy_2d() -> None:
    lower, shape, patch = (3, -4, 6), (5, 30, 28), (5, 11, 20)
    image = linear_image(lower, shape, SLOPES)
    transforms = ComposeTransforms(
        [
            Convert3DTo2DTransform(),
            *spatial(patch[1:]).transforms[:1],
            Convert2DTo3DTransform(),
            MirrorTransform((0, 1)),
        ]
    )
    for number in range(4):
        loader = loader_of(transforms, lower, is_2d=False)
        places = PatchPlaces(loader)
        seed(number)
        loader.get_bbox(None, False, None)
        result = loader.transforms(image=image, segmentation=torch.zeros((1, *shape), dtype=torch.int16))
        (matrix,) = places.take()
        voxels = torch.stack(torch.meshgrid(*(torch.arange(length).float() for length in patch), indexing="ij"), -1)
        assert torch.allclose((voxels @ matrix[:, :3].T + matrix[:, 3]) @ SLOPES, result["image"][0], atol=0.05)


def test_coordinates_are_sampled_at_few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = []

    def grid_sample(values: Tensor, grid: Tensor, **options: Any) -> Tensor:
        sampled.append((values.shape[1], grid[0, ..., 0].numel()))
        return torch.nn.functional.grid_sample(values, grid, **options)

    monkeypatch.setattr("batchgeneratorsv2.transforms.spatial.spatial.grid_sample", grid_sample)
    loader = loader_of(spatial((30, 32)), (0, 0, 0), is_2d=True)
    PatchPlaces(loader)
    loader.get_bbox(None, False, None)
    loader.transforms(image=torch.zeros((1, 40, 40)), segmentation=torch.zeros((1, 40, 40), dtype=torch.int16))
    assert (1, 30 * 32) in sampled
    assert (3, POINTS_PER_AXIS**2) in sampled
    assert (3, 30 * 32) not in sampled


def test_elastic_deformation_is_refused() -> None:
    shape, patch = (30, 34), (20, 24)
    loader = loader_of(spatial(patch, elastic=1.0), (0, 0, 0), is_2d=True)
    PatchPlaces(loader)
    loader.get_bbox(None, False, None)
    image = torch.zeros((1, *shape))
    with pytest.raises(SettingsError, match="not affine"):
        loader.transforms(image=image, segmentation=image.to(torch.int16))
