"""Dice and average surface distance on a small common grid: the protocol of the DHC and GenericSSL tables.

Volumes are resized to one grid of voxels, whatever their spacing, so that the distances are in voxels of that grid and
the numbers compare with those tables alone, not with nnU-Net's at original spacing.

Source: the evaluation of DHC (Wang and Li, MICCAI 2023) and GenericSSL (Wang and Li, NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.folder import read_pairs
from nnunet_kd.evaluation.metrics import Label, Mask, Segmentation

GRIDS = {"genericssl": (80, 160, 160), "dhc_amos": (72, 144, 144)}
MISSED_DISTANCE = 128.0  # average surface distance of a class that is missed, in voxels


def evaluate_on_grid(
    reference_folder: Path,
    prediction_folder: Path,
    dataset_json: Mapping[str, Any],
    grid: Sequence[int],
    *,
    cases: Sequence[str],
    classes: Mapping[str, Label],
) -> pd.DataFrame:
    """Compare every case on the grid.

    Args:
        reference_folder: Label files, ``<case><file ending>``.
        prediction_folder: Predicted label files of the same names.
        dataset_json: Content of the dataset.json that names the file ending.
        grid: [Z, Y, X] in voxels.
        cases: Cases to compare.
        classes: Class names and labels; the protocol has no regions.

    Returns:
        One row per case and class with columns ``case``, ``class``, ``dice_percent`` and
        ``average_surface_distance_voxels``.

    Raises:
        NnUNetKDError: A class is a region, a file is missing, or a pair differs in shape.
    """
    labels = [value for value in classes.values() if not isinstance(value, tuple)]
    if len(labels) < len(classes):
        raise NnUNetKDError("The metrics on the resized grid are for plain labels, not for regions.")
    rows = []
    for case, reference, prediction, *_ in read_pairs(reference_folder, prediction_folder, dataset_json, cases):
        scores = dice_and_distance(resize_labels(reference, grid), resize_labels(prediction, grid), labels)
        for name, dice, distance in zip(classes, *scores, strict=True):
            row = {"dice_percent": dice, "average_surface_distance_voxels": distance}
            rows.append({"case": case, "class": name, **row})
    return pd.DataFrame(rows)


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
