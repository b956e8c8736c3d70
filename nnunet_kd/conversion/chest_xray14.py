"""NIH ChestX-ray14: chest radiographs with 14 findings mined from reports, and boxes of 880 images.

Layout and columns by its readme and public code that reads them. Boxes exist for 880 images alone, and an image without
a box would count as one without a finding. So they are a dataset of their own, ``ChestX-ray14-boxes``; a box speaks of
one finding, and the image may have others. The table of boxes writes ``Infiltrate`` for Infiltration. The authors' list
of test images becomes the test set, where it is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nnunet_kd.conversion.base import Box, Case, Converter, LeftOut, findings, inside
from nnunet_kd.conversion.loading import load_grey
from nnunet_kd.conversion.tables import read_table

FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
)
BOXED = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
)
BOX_TABLE = "BBox_List_2017.csv"
BOX_COLUMNS = ("Bbox [x", "y", "w", "h]")


def find(folder: Path) -> Iterator[Case | LeftOut]:
    """All images of the table of findings."""
    root = inside(folder, "Data_Entry_2017*.csv", "**/*_[0-9][0-9][0-9].png")
    test_list = root / "test_list.txt"
    test = set(test_list.read_text(encoding="utf-8").split()) if test_list.is_file() else set()
    images = _images(root)
    for name, values in _findings(root).items():
        stem = name.removesuffix(".png")
        if name in images:
            yield Case(stem, partial(load_grey, images[name]), name not in test, values)
        else:
            yield LeftOut(stem, f"there is no {name}")


def find_boxes(folder: Path) -> Iterator[Case | LeftOut]:
    """The images of the table of boxes."""
    root = inside(folder, "Data_Entry_2017*.csv", BOX_TABLE, "**/*_[0-9][0-9][0-9].png")
    boxes: dict[str, list[Box]] = defaultdict(list)
    for row in read_table(root / BOX_TABLE, ("Image Index", "Finding Label", *BOX_COLUMNS)):
        x, y, width, height = (float(row[column]) for column in BOX_COLUMNS)
        label = row["Finding Label"].replace("Infiltrate", "Infiltration")
        boxes[row["Image Index"]].append(Box(label, (x, y, x + width, y + height)))
    images, values = _images(root), _findings(root)
    for name, own in boxes.items():
        stem = name.removesuffix(".png")
        if name in images and name in values:
            yield Case(stem, partial(load_grey, images[name], (), own), values=values[name])
        else:
            yield LeftOut(stem, f"there is no {name}" if name not in images else "it is not in the table of findings")


def _images(root: Path) -> dict[str, Path]:
    return {file.name: file for file in root.rglob("*_[0-9][0-9][0-9].png")}


def _findings(root: Path) -> dict[str, dict[str, str]]:
    """Image to its values in classification.csv."""
    table = sorted(root.glob("Data_Entry_2017*.csv"))[-1]  # the version of 2020 before the first
    values = {}
    for row in read_table(table, ("Image Index", "Finding Labels", "Patient ID")):
        present = row["Finding Labels"].split("|")
        own = {finding: str(int(finding in present)) for finding in FINDINGS}
        values[row["Image Index"]] = {**own, "patient": row["Patient ID"]}
    return values


CITATION = (
    "Wang X, Peng Y, Lu L, Lu Z, Bagheri M, Summers RM. ChestX-ray8: Hospital-scale chest X-ray database and "
    "benchmarks on weakly-supervised classification and localization of common thorax diseases. CVPR 2017."
)
LICENCE = "Free to use, by its page; cite the paper and name the NIH Clinical Center"
URL = "https://nihcc.app.box.com/v/ChestXray-NIHCC"

CHEST_XRAY14 = Converter(
    name="ChestX-ray14",
    title="NIH ChestX-ray14: 112120 chest X-rays; 14 findings",
    licence=LICENCE,
    citation=CITATION,
    url=URL,
    dataset_id=543,
    dataset_name="ChestXray14",
    layout="""  CXR8/
    Data_Entry_2017_v2020.csv            Image Index,Finding Labels,...,Patient ID,...
    images/00000001_000.png ...          or images_001/images/00000001_000.png ...
    test_list.txt                        optional: the official test set""",
    find=find,
    channels=("grayscale",),
    classification=(findings(*FINDINGS),),
    split_by="patient",
    file_ending=".png",
)

CHEST_XRAY14_BOXES = Converter(
    name="ChestX-ray14-boxes",
    title="NIH ChestX-ray14, the 880 images with boxes: 8 classes of boxes, 14 findings",
    licence=LICENCE,
    citation=CITATION,
    url=URL,
    dataset_id=544,
    dataset_name="ChestXray14Boxes",
    layout="""  CXR8/
    BBox_List_2017.csv                   Image Index,Finding Label,Bbox [x,y,w,h],,,
    Data_Entry_2017_v2020.csv            Image Index,Finding Labels,...,Patient ID,...
    images/00000032_037.png ...          or images_001/images/00000032_037.png ...""",
    find=find_boxes,
    channels=("grayscale",),
    classification=(findings(*FINDINGS),),
    box_classes=BOXED,
    split_by="patient",
    file_ending=".png",
)
