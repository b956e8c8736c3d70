"""Segmentation metrics of one case: Dice, surface distances in millimetres, volume error.

Conventions, the same everywhere here:

* Arrays are label maps with one, two or three axes; axes and ``spacing_mm`` are in array order, (z, y, x) as nnU-Net's
  readers return them. Reference first, prediction second.
* A class is a label, or a tuple of labels that together make a region.
* Voxels that the reference marks with ``ignore_label`` count for nothing: there, both masks are treated as empty.
* A class that is absent in reference and prediction has no value (NaN), as in nnU-Net. ``table.py`` says what a
  comparison of methods makes of it.
* A class that is absent in only one of the two gets the worst value: Dice 0, NSD 0, and for the 95% Hausdorff distance
  the diagonal of the image in millimetres. That is finite, so that averages and rank tests stay defined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Label: TypeAlias = int | tuple[int, ...]
Mask: TypeAlias = NDArray[np.bool_]
Segmentation: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class SegmentationScores:
    """The metrics of one class in one case; see the functions of the same names."""

    dice: float
    hd95_mm: float
    nsd: float
    volume_error_ml: float


def class_masks(
    reference: Segmentation, prediction: Segmentation, label: Label, ignore_label: int | None = None
) -> tuple[Mask, Mask]:
    """Where ``label`` (or any label of a region) is present, in the reference and in the prediction.

    Raises:
        ValueError: The two label maps have different shapes.
    """
    if reference.shape != prediction.shape:
        msg = f"reference and prediction must have the same shape, got {reference.shape} and {prediction.shape}"
        raise ValueError(msg)
    masks = np.isin(reference, label), np.isin(prediction, label)
    if ignore_label is not None:
        valid = reference != ignore_label
        masks = masks[0] & valid, masks[1] & valid
    return masks


def dice(
    reference: Segmentation, prediction: Segmentation, labels: Sequence[Label], ignore_label: int | None = None
) -> NDArray[np.float64]:
    """Dice per class, in [0, 1]: 2 |A and B| / (|A| + |B|). Returns [classes]."""
    return np.array([_dice(*masks) for masks in _each_class(reference, prediction, labels, ignore_label)])


def hd95(
    reference: Segmentation,
    prediction: Segmentation,
    labels: Sequence[Label],
    spacing_mm: Sequence[float],
    ignore_label: int | None = None,
) -> NDArray[np.float64]:
    """95% Hausdorff distance per class in mm: the larger one of the two directed 95th percentiles. Returns [classes].

    Source: the robust Hausdorff distance of Huttenlocher et al., TPAMI 1993 (section 4), on surface voxels.
    """
    _check_spacing(reference, spacing_mm)
    worst = _diagonal_mm(reference.shape, spacing_mm)
    return np.array(
        [
            _hd95_mm(surface_distances(*masks, spacing_mm), worst)
            for masks in _each_class(reference, prediction, labels, ignore_label)
        ]
    )


def nsd(
    reference: Segmentation,
    prediction: Segmentation,
    labels: Sequence[Label],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
    ignore_label: int | None = None,
) -> NDArray[np.float64]:
    """Normalised surface Dice per class, in [0, 1]: the share of both surfaces within ``tolerance_mm`` of the other.

    Surfaces are counted in voxels, not in square millimetres as the original does. Returns [classes].

    Source: Nikolov et al., JMIR 2021 (surface DSC), with voxels for surface elements.
    """
    _check_spacing(reference, spacing_mm)
    _check_tolerance(tolerance_mm)
    return np.array(
        [
            _nsd(surface_distances(*masks, spacing_mm), tolerance_mm)
            for masks in _each_class(reference, prediction, labels, ignore_label)
        ]
    )


def volume_error(
    reference: Segmentation,
    prediction: Segmentation,
    labels: Sequence[Label],
    spacing_mm: Sequence[float],
    ignore_label: int | None = None,
) -> NDArray[np.float64]:
    """Volume of the prediction minus volume of the reference, per class, in ml. Returns [classes].

    Empty masks have volume 0, so this is never NaN. It is meaningful for volumes only: of a 2D image, nnU-Net's readers
    return an arbitrary spacing across the slice.
    """
    _check_spacing(reference, spacing_mm)
    masks = _each_class(reference, prediction, labels, ignore_label)
    return np.array([_volume_error_ml(*pair, spacing_mm) for pair in masks])


def evaluate_case(
    reference: Segmentation,
    prediction: Segmentation,
    labels: Sequence[Label],
    spacing_mm: Sequence[float],
    tolerance_mm: float,
    ignore_label: int | None = None,
) -> list[SegmentationScores]:
    """All metrics of every class of one case; surfaces are computed once."""
    _check_spacing(reference, spacing_mm)
    _check_tolerance(tolerance_mm)
    worst = _diagonal_mm(reference.shape, spacing_mm)
    scores = []
    for masks in _each_class(reference, prediction, labels, ignore_label):
        distances = surface_distances(*masks, spacing_mm)
        scores.append(
            SegmentationScores(
                dice=_dice(*masks),
                hd95_mm=_hd95_mm(distances, worst),
                nsd=_nsd(distances, tolerance_mm),
                volume_error_ml=_volume_error_ml(*masks, spacing_mm),
            )
        )
    return scores


def surface_distances(
    reference_mask: Mask, prediction_mask: Mask, spacing_mm: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance in mm from every surface voxel of one mask to the nearest surface voxel of the other.

    A surface voxel is a voxel of the mask with a face neighbour outside the mask, or at the border of the image. Axes
    of length 1 are left out: a single slice has no surface across it.

    Returns:
        From reference to prediction, and from prediction to reference; [surface voxels] each. A mask without voxels has
        no surface: its own array is empty, and the distances to it are infinite.
    """
    kept = [axis for axis, size in enumerate(reference_mask.shape) if size > 1]
    spacing = [float(spacing_mm[axis]) for axis in kept]
    shape = tuple(reference_mask.shape[axis] for axis in kept) or (1,)
    masks = reference_mask.reshape(shape), prediction_mask.reshape(shape)
    box = _bounding_box(masks[0] | masks[1])
    reference_surface, prediction_surface = (_surface(mask[box]) for mask in masks)
    return (
        _distances(reference_surface, prediction_surface, spacing or [1.0]),
        _distances(prediction_surface, reference_surface, spacing or [1.0]),
    )


def _each_class(
    reference: Segmentation, prediction: Segmentation, labels: Sequence[Label], ignore_label: int | None
) -> Iterator[tuple[Mask, Mask]]:
    for label in labels:
        yield class_masks(reference, prediction, label, ignore_label)


def _dice(reference_mask: Mask, prediction_mask: Mask) -> float:
    total = np.count_nonzero(reference_mask) + np.count_nonzero(prediction_mask)
    if total == 0:
        return float("nan")
    return 2.0 * np.count_nonzero(reference_mask & prediction_mask) / total


def _hd95_mm(distances: tuple[NDArray[np.float64], NDArray[np.float64]], worst_mm: float) -> float:
    sizes = [direction.size for direction in distances]
    if not any(sizes):
        return float("nan")
    if not all(sizes):
        return worst_mm
    return float(max(np.percentile(direction, 95) for direction in distances))


def _nsd(distances: tuple[NDArray[np.float64], NDArray[np.float64]], tolerance_mm: float) -> float:
    every = np.concatenate(distances)
    # spacings such as 0.1 mm are not exact in binary, and a distance equal to the tolerance is within it
    return float(np.mean(every <= tolerance_mm + 1e-9)) if every.size else float("nan")


def _volume_error_ml(reference_mask: Mask, prediction_mask: Mask, spacing_mm: Sequence[float]) -> float:
    difference = int(np.count_nonzero(prediction_mask)) - int(np.count_nonzero(reference_mask))
    return difference * float(np.prod(spacing_mm)) / 1000.0


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    """The smallest box around ``mask``. Surfaces and distances inside it are those of the whole image."""
    boxes = ndimage.find_objects(mask.astype(np.uint8), max_label=1)
    return boxes[0] if boxes[0] is not None else (slice(0, 0),) * mask.ndim


def _surface(mask: Mask) -> Mask:
    return mask & ~ndimage.binary_erosion(mask) if mask.any() else mask


def _distances(source: Mask, target: Mask, spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    if not source.any():
        return np.zeros(0)
    if not target.any():
        return np.full(np.count_nonzero(source), np.inf)
    return ndimage.distance_transform_edt(~target, sampling=spacing_mm)[source]


def _diagonal_mm(shape: Sequence[int], spacing_mm: Sequence[float]) -> float:
    return float(np.linalg.norm([size * step for size, step in zip(shape, spacing_mm, strict=True) if size > 1]))


def _check_spacing(array: Segmentation, spacing_mm: Sequence[float]) -> None:
    if len(spacing_mm) != array.ndim or not all(step > 0 for step in spacing_mm):
        msg = f"spacing_mm must be {array.ndim} positive numbers in array order (z, y, x), got {tuple(spacing_mm)}"
        raise ValueError(msg)


def _check_tolerance(tolerance_mm: float) -> None:
    if not tolerance_mm >= 0:
        msg = f"tolerance_mm must not be negative, got {tolerance_mm}"
        raise ValueError(msg)
