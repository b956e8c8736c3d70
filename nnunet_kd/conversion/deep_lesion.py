"""DeepLesion: key slices of CT with boxes of lesions.

Columns, layouts and the offset of 32768 by public code that reads them. A case is a key slice, stored as a 2D NIfTI
file in Hounsfield units with its pixel size. Boxes that the authors mark as possibly noisy are dropped. Not every
lesion of a slice is marked, by the authors' paper. The type of a lesion is known for validation and test alone, so
that there is one class. Train and validation become training cases, test the test set.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_kd.conversion.base import Box, Case, Converter, LeftOut, Loaded, inside
from nnunet_kd.conversion.images import array_of, read_grey
from nnunet_kd.conversion.tables import read_table

OFFSET = 32768
TEST = "3"
COLUMNS = ("File_name", "Patient_index", "Bounding_boxes", "Possibly_noisy", "Spacing_mm_px_", "Train_Val_Test")


def find(folder: Path) -> Iterator[Case | LeftOut]:
    """Key slices in the order of the table."""
    root = inside(folder, "DL_info.csv")
    slices: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in read_table(root / "DL_info.csv", COLUMNS):
        slices[row["File_name"]].append(row)
    for file_name, rows in slices.items():
        name = file_name.removesuffix(".png")
        series, _, number = file_name.rpartition("_")
        candidates = [*root.glob(f"Images_png/{series}/{number}"), *root.glob(f"Key_slices/{file_name}")]
        if not candidates:
            yield LeftOut(name, f"there is no Images_png/{series}/{number}")
            continue
        sides = [float(side) for side in rows[0]["Spacing_mm_px_"].split(",")[:2]]
        boxes = [
            Box("lesion", tuple(float(edge) for edge in row["Bounding_boxes"].split(",")))
            for row in rows
            if row["Possibly_noisy"] != "1"
        ]
        if not boxes:
            yield LeftOut(name, "all its boxes are marked as possibly noisy")
            continue
        training = rows[0]["Train_Val_Test"] != TEST
        values = {"patient": rows[0]["Patient_index"]}
        yield Case(name, partial(_load, candidates[0], sides, boxes), training, values)


def _load(file: Path, spacing_mm: Sequence[float], boxes: Sequence[Box]) -> Loaded:
    units = (array_of(read_grey(file)).astype(np.int32) - OFFSET).astype(np.int16)
    image = sitk.GetImageFromArray(units)
    image.SetSpacing(list(spacing_mm))
    return Loaded((image,), boxes=tuple(boxes))


DEEP_LESION = Converter(
    name="DeepLesion",
    title="DeepLesion: key slices of 10594 CT studies; 32735 boxes of lesions",
    licence="Free to use, by its page; cite the paper and name the NIH Clinical Center",
    citation="Yan K, Wang X, Lu L, Summers RM. DeepLesion: automated mining of large-scale lesion annotations and "
    "universal lesion detection with deep learning. J Med Imaging 2018;5(3):036501.",
    url="https://nihcc.app.box.com/v/DeepLesion",
    dataset_id=562,
    dataset_name="DeepLesion",
    layout="""  DeepLesion/
    DL_info.csv
    Images_png/000001_01_01/109.png ...  or the key slices alone: Key_slices/000001_01_01_109.png ...""",
    find=find,
    channels=("CT",),
    box_classes=("lesion",),
    split_by="patient",
)
