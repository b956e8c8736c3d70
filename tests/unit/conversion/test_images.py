from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from nnunet_kd.conversion.images import array_of, like, read_grey, read_radiograph, union, unsigned
from nnunet_kd.errors import ConversionError


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_keep_their_bits(tmp_path: Path, dtype: type) -> None:
    stored = np.arange(20, dtype=dtype).reshape(4, 5) * (13 if dtype is np.uint8 else 3000)
    Image.fromarray(stored).save(tmp_path / "picture.png")
    read = array_of(read_grey(tmp_path / "picture.png"))
    assert read.dtype == dtype
    assert (read == stored).all()


def test_palettes_and_bits_become_grey(tmp_path: Path) -> None:
    mask = np.zeros((4, 5), dtype=bool)
    mask[1, 2] = True
    Image.fromarray(mask).save(tmp_path / "bits.png")
    Image.fromarray(mask.astype(np.uint8) * 255).convert("P").save(tmp_path / "palette.gif")
    for name in ("bits.png", "palette.gif"):
        assert (array_of(read_grey(tmp_path / name)) == mask * 255).all()


def test_a_radiograph_is_one_grey_image_of_up_to_16_bits(tmp_path: Path, radiograph) -> None:
    stored = radiograph(tmp_path / "a.dcm", np.arange(20, dtype=np.uint16).reshape(4, 5) * 200)
    assert (array_of(read_radiograph(tmp_path / "a.dcm")) == stored).all()
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5), dtype=np.uint16)), str(tmp_path / "several.dcm"))
    with pytest.raises(ConversionError, match=r"several\.dcm is not one grey image"):
        read_radiograph(tmp_path / "several.dcm")
    colour = sitk.GetImageFromArray(np.zeros((1, 4, 5, 3), dtype=np.uint8), isVector=True)
    sitk.WriteImage(colour, str(tmp_path / "colour.dcm"))
    with pytest.raises(ConversionError, match=r"colour\.dcm is not one grey image"):
        read_radiograph(tmp_path / "colour.dcm")


def test_values_that_png_does_not_hold_are_refused() -> None:
    assert unsigned(np.array([[0, 255]]), "x").GetPixelID() == sitk.sitkUInt8
    assert unsigned(np.array([[0, 256]]), "x").GetPixelID() == sitk.sitkUInt16
    for array in ([[-1, 5]], [[0, 65536]]):
        with pytest.raises(ConversionError, match="png holds 0 to 65535"):
            unsigned(np.array(array), "x")


def test_masks_are_joined_into_one_label() -> None:
    first, second = (sitk.GetImageFromArray(np.array([row], dtype=np.uint8)) for row in ([1, 255, 0, 0], [0, 7, 7, 0]))
    assert array_of(union([first, second])).tolist() == [[1, 1, 1, 0]]
    with pytest.raises(ConversionError, match=r"sizes \(4, 1\) and \(2, 1\)"):
        union([first, sitk.GetImageFromArray(np.zeros((1, 2), dtype=np.uint8))])
    with pytest.raises(ConversionError, match="sizes differ"):
        like(np.zeros((2, 2)), first)
