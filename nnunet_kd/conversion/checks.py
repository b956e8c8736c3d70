"""What must hold of a case before it is written: one grid, declared labels, boxes inside the image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

from nnunet_kd.conversion.base import Box, Converter, Loaded
from nnunet_kd.conversion.images import array_of, like
from nnunet_kd.errors import ConversionError

SPACING_TOLERANCE = 1e-3  # of the spacing
ORIGIN_TOLERANCE = 0.05  # of the smallest spacing
DIRECTION_TOLERANCE = 1e-3  # of cosines


def checked(loaded: Loaded, converter: Converter, labelled: bool) -> Loaded:
    """The case with all parts on exactly the grid of the first channel, labels as uint8, and boxes clipped to it.

    Args:
        loaded: What was read.
        converter: What the dataset declares.
        labelled: False for test cases without labels.

    Raises:
        ConversionError: Something does not hold; the message is the reason for leaving the case out.
    """
    if len(loaded.images) != len(converter.channels):
        raise ConversionError(f"{len(loaded.images)} channels instead of {len(converter.channels)}")
    first = loaded.images[0]
    for name, image in zip(converter.channels, loaded.images, strict=True):
        _check_grid(first, image, f"channel {name}")
    images = (first, *(like(array_of(image), first) for image in loaded.images[1:]))
    segmentation = loaded.segmentation if labelled else None
    if labelled and converter.labels is not None and segmentation is None:
        raise ConversionError("there is no segmentation")
    if segmentation is not None:
        _check_grid(first, segmentation, "the segmentation")
        segmentation = like(_label_array(segmentation, converter), first)
    boxes = [clipped for box in loaded.boxes if (clipped := _clipped(box, first.GetSize(), converter)) is not None]
    return Loaded(images, segmentation, tuple(boxes))


def _check_grid(reference: sitk.Image, image: sitk.Image, what: str) -> None:
    if image.GetSize() != reference.GetSize():
        raise ConversionError(f"{what} has the size {image.GetSize()}, the first channel {reference.GetSize()}")
    spacing = np.array(reference.GetSpacing())
    differences = (
        ("spacing", image.GetSpacing(), spacing, SPACING_TOLERANCE * spacing.min()),
        ("origin", image.GetOrigin(), np.array(reference.GetOrigin()), ORIGIN_TOLERANCE * spacing.min()),
        ("direction", image.GetDirection(), np.array(reference.GetDirection()), DIRECTION_TOLERANCE),
    )
    for name, own, expected, tolerance in differences:
        if np.abs(np.array(own) - expected).max() > tolerance:
            theirs = _rounded(expected.tolist())
            raise ConversionError(f"{what} has the {name} {_rounded(own)}, the first channel {theirs}")


def _label_array(segmentation: sitk.Image, converter: Converter) -> np.ndarray:
    array = array_of(segmentation)
    unknown = sorted(set(np.unique(array).tolist()) - set(converter.label_values))
    if unknown:
        declared = ", ".join(map(str, sorted(converter.label_values)))
        raise ConversionError(f"the segmentation holds {', '.join(map(str, unknown[:5]))}; declared are {declared}")
    return array.astype(np.uint8)


def _clipped(box: Box, size: Sequence[int], converter: Converter) -> Box | None:
    """The part of a box inside the image; None if there is none."""
    if box.label not in converter.box_classes:
        raise ConversionError(f"a box has the class '{box.label}', which is not declared")
    dimension = len(size)
    if len(box.edges) != 2 * dimension or not np.isfinite(box.edges).all():
        raise ConversionError(f"a box has the edges {box.edges}, which are not {2 * dimension} numbers")
    edges = np.clip(np.array(box.edges, dtype=np.float64).reshape(2, dimension), 0, size)
    if not (edges[0] < edges[1]).all():
        return None
    return Box(box.label, tuple(edges.ravel().tolist()))


def _rounded(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.5g}' for value in values)})"
