"""Where the patches of a stock loader lie in their cases, whatever augmentation did to them (our design)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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
        self._stock_bbox, self._stock_transforms = loader.get_bbox, loader.transforms
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
        shape, lower = data["image"].shape[1:], list(self._lower)
        own = lower[1:] if self._is_2d else lower
        axes = [torch.arange(low, low + length, dtype=torch.float32) for low, length in zip(own, shape, strict=True)]
        coordinates = torch.stack([*torch.meshgrid(*axes, indexing="ij"), torch.ones(shape)])
        result = self._stock_transforms(**data, regression_target=coordinates)
        matrix = affine_map(result.pop("regression_target"))
        if self._is_2d:
            slice_number = torch.tensor([[0.0, 0.0, lower[0]]])
            matrix = torch.cat((slice_number, matrix))
        self._found.append(matrix)
        return result


def affine_map(coordinates: Tensor) -> Tensor:
    """The affine map that coordinates [D + 1, *S], the last channel ones, come from: [D, D + 1].

    Raises:
        SettingsError: They do not come from one, as after an elastic deformation.
    """
    shape = coordinates.shape[1:]
    chosen = [torch.linspace(0, length - 1, min(length, POINTS_PER_AXIS)).round().long() for length in shape]
    grid = tuple(torch.meshgrid(*chosen, indexing="ij"))
    values = torch.stack([channel[grid] for channel in coordinates]).flatten(1).double()
    places = torch.stack([*grid, torch.ones_like(grid[0])]).flatten(1).double()
    inside = values[-1] > INSIDE
    values, places = values[:-1, inside].T, places[:, inside].T
    # the driver for matrices without full rank: an axis of the patch may have one voxel
    solution = torch.linalg.lstsq(places, values, driver="gelsd").solution
    if not inside.any() or (places @ solution - values).abs().max() > TOLERANCE:
        raise SettingsError(
            "The augmentation of this trainer is not affine, so token maps of whole cases cannot be cut as its "
            "patches are. Switch 'foundation.cache' off."
        )
    return solution.T.float()
