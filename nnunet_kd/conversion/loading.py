"""How the usual kinds of cases are read; ``functools.partial`` of these is what a converter gives a case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_kd.conversion.base import Box, Loaded
from nnunet_kd.conversion.images import read_grey, read_radiograph, read_volume, union, upright


def load_volumes(
    images: Sequence[Path],
    segmentation: Path | None = None,
    reorient: bool = False,
) -> Loaded:
    """Read one file per channel and the segmentation.

    Args:
        images: Files of the channels.
        segmentation: None where there is none.
        reorient: Bring the axes of all into one order and direction, for data sets where these vary.
    """
    read = [read_volume(file) for file in (*images, *([segmentation] if segmentation is not None else []))]
    volumes = [upright(volume) for volume in read] if reorient else read
    labels = volumes.pop() if segmentation is not None else None
    return Loaded(tuple(volumes), labels)


def load_grey(image: Path, masks: Sequence[Path] = (), boxes: Sequence[Box] = ()) -> Loaded:
    """Read a 2D image file and the union of its masks as label 1."""
    labels = union([read_grey(file) for file in masks]) if masks else None
    return Loaded((read_grey(image),), labels, tuple(boxes))


def load_radiograph(image: Path, boxes: Sequence[Box] = ()) -> Loaded:
    """Read a radiograph in DICOM format."""
    return Loaded((read_radiograph(image),), boxes=tuple(boxes))
