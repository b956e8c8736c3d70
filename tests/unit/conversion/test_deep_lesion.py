from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

HEADER = (
    "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,Bounding_boxes,"
    "Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,Possibly_noisy,Slice_range,Spacing_mm_px_,"
    "Image_size,DICOM_windows,Patient_gender,Patient_age,Train_Val_Test"
)


def _row(name: str, boxes: str, noisy: int, part: int) -> str:
    return (
        f'{name},{int(name[:6])},1,1,9,"1, 2, 3, 4, 5, 6, 7, 8","{boxes}","30.5, 20.1","0.3, 0.6, 0.4",-1,{noisy},'
        f'"3, 15","0.488281, 0.488281, 5","512, 512","-175, 275",F,62,{part}'
    )


def test_key_slices_are_in_hounsfield_units_with_their_boxes(run, tmp_path: Path, picture, table) -> None:
    table(
        tmp_path / "DL_info.csv",
        HEADER,
        _row("000001_01_01_109.png", "2.5, 3, 7, 7.25", 0, 1),
        _row("000001_01_01_109.png", "1, 1, 3, 3", 0, 1),
        _row("000001_01_01_109.png", "4, 4, 6, 6", 1, 1),
        _row("000001_01_01_110.png", "4, 4, 6, 6", 1, 1),
        _row("000001_03_01_014.png", "0, 0, 5, 5", 0, 2),
        _row("000002_01_01_007.png", "0, 0, 5, 5", 0, 3),
        _row("000003_01_01_001.png", "0, 0, 5, 5", 0, 1),
    )
    units = np.arange(80).reshape(8, 10) * 20 - 1000
    stored = (units + 32768).astype(np.uint16)
    for folder in ("000001_01_01/109", "000001_01_01/110", "000001_01_01/108", "000001_03_01/014"):
        picture(tmp_path / "Images_png" / f"{folder}.png", stored)
    picture(tmp_path / "Key_slices" / "000002_01_01_007.png", stored)
    result = run("DeepLesion", tmp_path)
    assert result.cases("imagesTr") == ["000001_01_01_109_0000", "000001_03_01_014_0000"]
    assert (result.image("000001_01_01_109") == units).all()
    image = sitk.ReadImage(str(result.folder / "imagesTr" / "000001_01_01_109_0000.nii.gz"))
    np.testing.assert_allclose(image.GetSpacing(), (0.488281, 0.488281), rtol=1e-5)
    assert result.boxes() == {
        "000001_01_01_109": [("lesion", [2.5, 3, 7, 7.25]), ("lesion", [1, 1, 3, 3])],
        "000001_03_01_014": [("lesion", [0, 0, 5, 5])],
    }
    assert {row["patient"] for row in result.table().values()} == {"1"}
    assert result.boxes("labelsTs") == {"000002_01_01_007": [("lesion", [0, 0, 5, 5])]}
    assert result.left_out == {
        "000001_01_01_110": "all its boxes are marked as possibly noisy",
        "000003_01_01_001": "there is no Images_png/000003_01_01/001.png",
    }
