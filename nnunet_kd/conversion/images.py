"""Reading what public datasets are stored in, as SimpleITK images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nibabel.nifti1 import Nifti1Image
from numpy.typing import NDArray
from PIL import Image

from nnunet_kd.errors import ConversionError

SKEW_TOLERANCE = 0.02  # of direction cosines, what is rounded away from axes that are not quite at right angles


def read_volume(file: Path) -> sitk.Image:
    """Read a volume; NIfTI axes not quite at right angles, which ITK refuses, become the nearest that are.

    Values of a NIfTI file that are not finite become 0, which is what ITK does with them.

    Raises:
        ConversionError: The axes are too far from right angles to be rounded.
        RuntimeError: The file is missing or broken.
    """
    try:
        return sitk.ReadImage(str(file))
    except RuntimeError as error:
        if "orthonormal" not in str(error):
            raise
    stored = Nifti1Image.from_filename(file)
    to_lps = np.diag([-1.0, -1.0, 1.0]) @ stored.affine[:3]
    spacing = np.linalg.norm(to_lps[:, :3], axis=0)
    cosines = to_lps[:, :3] / spacing
    left, _, right = np.linalg.svd(cosines)
    direction = left @ right
    if np.abs(direction - cosines).max() > SKEW_TOLERANCE:
        raise ConversionError(f"the axes of {file.name} are not at right angles")
    array = np.nan_to_num(np.asanyarray(stored.dataobj), posinf=0, neginf=0)
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(to_lps[:, 3].tolist())
    image.SetDirection(direction.ravel().tolist())
    return image


def read_grey(file: Path) -> sitk.Image:
    """Read a 2D image file (png, jpg, gif, tif) as one grey channel: 16 bit where the file has them, else 8 bit."""
    with Image.open(file) as image:
        sixteen = image.mode.startswith("I")
        array = np.array(image if sixteen else image.convert("L"))
    return sitk.GetImageFromArray(array.astype(np.uint16) if sixteen else array)


def read_radiograph(file: Path) -> sitk.Image:
    """Read a DICOM file of one grey image as unsigned 2D; ITK inverts MONOCHROME1, so that air is always dark.

    Raises:
        ConversionError: It is not one grey image, or has values that 16 bits do not hold.
        RuntimeError: The file is missing or broken.
    """
    image = sitk.ReadImage(str(file))
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1 or (array.ndim == 3 and len(array) != 1):
        raise ConversionError(f"{file.name} is not one grey image")
    return unsigned(array.reshape(array.shape[-2:]), file.name)


def unsigned(array: NDArray[np.number], name: str) -> sitk.Image:
    """A 2D array of whole numbers as 8 or 16 bit image, the smaller one that holds it.

    Raises:
        ConversionError: There are values below 0 or above 65535.
    """
    if array.min() < 0 or array.max() > np.iinfo(np.uint16).max:
        raise ConversionError(f"{name} has values from {array.min()} to {array.max()}, and png holds 0 to 65535")
    return sitk.GetImageFromArray(array.astype(np.uint8 if array.max() <= np.iinfo(np.uint8).max else np.uint16))


def upright(image: sitk.Image) -> sitk.Image:
    """The same volume with its axes permuted and flipped to LPS, so that x, y and z mean the same in all cases."""
    return sitk.DICOMOrient(image, "LPS")


def array_of(image: sitk.Image) -> NDArray[np.number]:
    """Voxels in array order, (z, y, x) or (y, x)."""
    return sitk.GetArrayFromImage(image)


def like(array: NDArray[np.number], image: sitk.Image) -> sitk.Image:
    """An array on the grid of an image.

    Raises:
        ConversionError: The sizes differ.
    """
    if array.shape != tuple(reversed(image.GetSize())):
        raise ConversionError(f"the sizes differ: {array.shape[::-1]} and {image.GetSize()} (x, y, z)")
    result = sitk.GetImageFromArray(array)
    result.CopyInformation(image)
    return result


def union(masks: Sequence[sitk.Image]) -> sitk.Image:
    """What belongs to any of several masks (values above 0), as label 1.

    Raises:
        ConversionError: The sizes differ.
    """
    result = np.zeros(array_of(masks[0]).shape, dtype=np.uint8)
    for mask in masks:
        array = array_of(mask)
        if array.shape != result.shape:
            raise ConversionError(f"masks of one image have the sizes {result.shape[::-1]} and {array.shape[::-1]}")
        result[array > 0] = 1
    return like(result, masks[0])
