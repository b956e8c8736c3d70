"""What an image file says about itself, read without its voxels where its format allows that (our design)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Header:
    """What an image file says about itself.

    Attributes:
        num_axes: 2 or 3 as stored; None from readers that know one number only.
        num_channels: In this one file.
        size: Voxels per axis of the array, ``(z, y, x)`` or ``(y, x)``.
        spacing: Three voxel sides as nnU-Net reads them (of 2D, the first is a made-up large one), usually in mm.
        origin: Of the first voxel; empty where the format has none.
        direction: Cosines; empty where the format has none.
    """

    num_axes: int | None
    num_channels: int
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: NDArray[np.float64]
    direction: NDArray[np.float64]


def read_header(file: Path, reader: type[BaseReaderWriter]) -> Header:
    """Read what a dataset's ``reader`` would see."""
    if reader is SimpleITKIO:
        return _read_itk_header(file)
    with contextlib.redirect_stdout(io.StringIO()):  # of tif, a warning about the spacing that preprocessing repeats
        image, properties = reader().read_images((str(file),))
    itk = properties.get("sitk_stuff", {"origin": (), "direction": ()})
    origin, direction = np.array(itk["origin"], dtype=float), np.array(itk["direction"], dtype=float)
    if "nibabel_stuff" in properties:
        stored = properties["nibabel_stuff"]
        affine = stored.get("reoriented_affine", stored["original_affine"])
        origin, direction = affine[:3, 3], affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    spacing = tuple(float(side) for side in properties["spacing"])
    return Header(num_axes_of(properties), image.shape[0], image.shape[1:], spacing, origin, direction)


def _read_itk_header(file: Path) -> Header:
    header = sitk.ImageFileReader()
    header.SetFileName(str(file))
    header.ReadImageInformation()
    stored_axes = header.GetDimension()
    num_axes = min(stored_axes, 3)  # nnU-Net takes the fourth axis for channels
    channels_of_axis = header.GetSize()[3] if stored_axes > 3 else 1
    sides = [abs(side) for side in reversed(header.GetSpacing()[:num_axes])]
    spacing = sides if num_axes == 3 else [999 * max(sides), *sides]
    direction = np.array(header.GetDirection()).reshape(stored_axes, stored_axes)[:num_axes, :num_axes]
    return Header(
        num_axes,
        int(channels_of_axis * header.GetNumberOfComponents()),
        tuple(reversed(header.GetSize()[:num_axes])),
        tuple(spacing),
        np.array(header.GetOrigin()[:num_axes]),
        direction,
    )


def num_channels_of(file: Path, reader: type[BaseReaderWriter]) -> int:
    """Channels in one file as a dataset's ``reader`` would see them; colour images are not decoded for that."""
    if issubclass(reader, NaturalImage2DIO):
        with Image.open(file) as image:
            if image.mode in ("L", "RGB", "RGBA"):  # what others are decoded to, their mode does not tell
                return len(image.getbands())
    return read_header(file, reader).num_channels


def num_axes_of(properties: Mapping[str, Any]) -> int | None:
    """2 or 3 as stored, from nnU-Net's properties of an image; None from readers that know one number only."""
    itk = properties.get("sitk_stuff")
    return None if itk is None else min(len(itk["spacing"]), 3)
