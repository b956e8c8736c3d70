"""Where the patches of a stock loader lie in their cases, whatever augmentation did to them (our design).

Host behaviour relied on (batchgeneratorsv2 0.3): a stock SpatialTransform computes the grid of its samples once, as the
parameter "grid" (None: it only crops), and samples everything with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor

from nnunet_kd.errors import SettingsError

POINTS_PER_AXIS = 8
INSIDE = 0.999  # of the channel of ones: below, a coordinate was mixed with padding
TOLERANCE = 0.1  # in voxels


class PatchPlaces:
    """Watches a stock loader and finds for every sample the affine map from its patch to its case.

    Coordinates of the case go through the loader's transforms as a regression target, beside a channel of ones that
    shows where padding came in. The images, and what is drawn at random, stay as they are.
    """

    def __init__(self, loader: nnUNetDataLoader) -> None:
        self._stock_bbox, self._watched_transforms = loader.get_bbox, _thinned(loader.transforms)
        self._is_2d = loader.patch_size_was_2d
        self._lower: Sequence[int] = ()
        self._found: list[Tensor] = []
        loader.get_bbox, loader.transforms = self._bbox, self._transforms

    def take(self) -> Tensor:
        """Of the samples since the last call: [B, 3, D + 1]; times (voxel of the patch, 1) it is the case's voxel.

        D is 3, or 2 for patches of slices, whose first coordinate in the case is the slice.
        """
        found, self._found = self._found, []
        return torch.stack(found)

    def _bbox(self, *args: Any, **kwargs: Any) -> Any:
        lower, upper = self._stock_bbox(*args, **kwargs)
        self._lower = lower
        return lower, upper

    def _transforms(self, **data: Any) -> Any:
        coordinates = _coordinates(tuple(data["image"].shape[1:]))
        result = self._watched_transforms(**data, regression_target=coordinates)
        patch = result["image"].shape[1:]
        matrix = affine_map(_thin(result.pop("regression_target"), patch), patch)
        if self._is_2d:
            matrix = torch.cat((matrix.new_zeros(1, 3), matrix))
        matrix[:, -1] += torch.tensor(self._lower)
        self._found.append(matrix)
        return result


class ThinnedSpatialTransform(BasicTransform):
    """A stock spatial transform that brings the regression target to few points of the patch, see :func:`points`."""

    def __init__(self, stock: SpatialTransform) -> None:
        super().__init__()
        self.stock = stock

    def get_parameters(self, **data: Any) -> dict[str, Any]:
        """The stock ones."""
        parameters: dict[str, Any] = self.stock.get_parameters(**data)
        return parameters

    def apply(self, data: dict[str, Any], **parameters: Any) -> dict[str, Any]:
        """Image and segmentation as stock does."""
        target, size = data.pop("regression_target"), self.stock.patch_size
        result: dict[str, Any] = self.stock.apply(data, **parameters)
        if parameters["grid"] is not None:
            parameters["grid"] = _thin(parameters["grid"][None], size)[0]
        result["regression_target"] = _thin(self.stock._apply_to_regr_target(target, **parameters), size)
        return result


def _thinned(transforms: ComposeTransforms) -> ComposeTransforms:
    """The same transforms; sampling coordinates in every voxel would cost as much as augmenting four images."""
    return ComposeTransforms(
        [ThinnedSpatialTransform(own) if isinstance(own, SpatialTransform) else own for own in transforms.transforms]
    )


@lru_cache(maxsize=1)
def _coordinates(shape: tuple[int, ...]) -> Tensor:
    """[D + 1, *S]: the coordinates of voxels, and ones."""
    axes = [torch.arange(length, dtype=torch.float32) for length in shape]
    return torch.stack([*torch.meshgrid(*axes, indexing="ij"), torch.ones(shape)])


def points(length: int) -> Tensor:
    """Voxels of an axis that stand for it; a mirrored axis has the same ones."""
    count = min(length, POINTS_PER_AXIS)
    lower = torch.linspace(0, length - 1, count)[: (count + 1) // 2].long()
    return torch.cat((lower, (length - 1 - lower).flip(0)[count % 2 :]))


def _thin(values: Tensor, shape: Sequence[int]) -> Tensor:
    """[C, *S, ...] at the points of the axes that still have all voxels of ``shape``."""
    for axis, length in enumerate(shape, 1):
        if values.shape[axis] == length:
            values = values.index_select(axis, points(length))
    return values


def affine_map(coordinates: Tensor, shape: Sequence[int]) -> Tensor:
    """The affine map that coordinates [D + 1, *N], the last channel ones, come from: [D, D + 1].

    Args:
        coordinates: At the :func:`points` of a patch.
        shape: Of the patch.

    Raises:
        SettingsError: They do not come from one, as after an elastic deformation, or too few of them to tell.
    """
    grid = torch.meshgrid(*(points(length) for length in shape), indexing="ij")
    values = coordinates.flatten(1).double()
    places = torch.stack([*grid, torch.ones_like(grid[0])]).flatten(1).double()
    inside = values[-1] > INSIDE
    values, places = values[:-1, inside].T, places[:, inside].T
    # the driver for matrices without full rank: an axis of the patch may have one voxel
    solution, _, rank, _ = torch.linalg.lstsq(places, values, driver="gelsd")
    is_determined = rank > sum(length > 1 for length in shape)
    if not is_determined or (places @ solution - values).abs().max() > TOLERANCE:
        raise SettingsError(
            "The augmentation of this trainer is not affine, so token maps of whole cases cannot be cut as its "
            "patches are. Switch 'foundation.cache' off."
        )
    return solution.T.float()
