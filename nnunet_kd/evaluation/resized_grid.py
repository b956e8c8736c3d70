"""Dice and average surface distance on a small common grid: the protocol of the DHC and GenericSSL tables.

Volumes are resized to one grid of voxels, whatever their spacing, so that the distances are in voxels of that grid and
the numbers compare with those tables alone, not with nnU-Net's at original spacing.

Source: the evaluation of DHC (Wang and Li, MICCAI 2023) and GenericSSL (Wang and Li, NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nnunet_kd.evaluation.metrics import Mask, Segmentation

GRIDS = {"genericssl": (80, 160, 160), "dhc_amos": (72, 144, 144)}
MISSED_DISTANCE = 128.0  # average surface distance of a class that is missed, in voxels


def resize_labels(labels: Segmentation, grid: Sequence[int]) -> Segmentation:
    """The nearest voxel of [Z, Y, X] at the centre of each voxel of ``grid``."""
    for axis, size in enumerate(grid):
        length = labels.shape[axis]
        labels = labels.take(((2 * np.arange(size) + 1) * length) // (2 * size), axis)
    return labels


def dice_and_distance(
    reference: Segmentation, prediction: Segmentation, labels: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Dice in percent and average surface distance in voxels, per class.

    A class that is absent in both has Dice 1 (on the scale to 100, as their code has it) and distance 0; one that is
    absent in one of the two has Dice 0 and distance 128.

    Args:
        reference: [Z, Y, X].
        prediction: [Z, Y, X].
        labels: Of the classes.
    """
    pairs = [_compare(reference == label, prediction == label) for label in labels]
    scores, distances = zip(*pairs, strict=True)
    return np.array(scores), np.array(distances)


def _compare(reference: Mask, prediction: Mask) -> tuple[float, float]:
    if not reference.any() and not prediction.any():
        return 1.0, 0.0
    if not reference.any() or not prediction.any():
        return 0.0, MISSED_DISTANCE
    overlap = 2 * np.count_nonzero(reference & prediction)
    return 100 * overlap / (reference.sum() + prediction.sum()), _surface_distance(reference, prediction)


def _surface_distance(reference: Mask, prediction: Mask) -> float:
    """Mean distance of the prediction's surface to the reference's, as medpy's ``asd`` (one direction)."""
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (reference, prediction)]
    to_reference = ndimage.distance_transform_edt(~surfaces[0])
    return float(to_reference[surfaces[1]].mean())
