"""RSNA Pneumonia Detection Challenge: chest radiographs with boxes of lung opacities and one of three classes.

Layout and columns by the challenge's data page. A patientId has one image and one row per box. DICOM files become png
with their values as stored; MONOCHROME1 is inverted by ITK. Which images are of one NIH patient cannot be told from
the files alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nnunet_kd.conversion.base import Box, Case, Converter, LeftOut, inside, one_of
from nnunet_kd.conversion.loading import load_radiograph
from nnunet_kd.conversion.tables import read_table

CLASSES = {"Normal": "normal", "No Lung Opacity / Not Normal": "not_normal", "Lung Opacity": "lung_opacity"}
BOX_CLASS = "lung_opacity"


def find(folder: Path) -> Iterator[Case | LeftOut]:
    """Images of both tables; those of stage_2_test_images become test cases without labels."""
    root = inside(folder, "stage_2_train_images", "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv")
    boxes: dict[str, list[Box]] = defaultdict(list)
    edges = ("x", "y", "width", "height")
    for row in read_table(root / "stage_2_train_labels.csv", ("patientId", *edges, "Target")):
        own = boxes[row["patientId"]]
        if row["Target"] == "1":
            x, y, width, height = (float(row[edge]) for edge in edges)
            own.append(Box(BOX_CLASS, (x, y, x + width, y + height)))
    table = read_table(root / "stage_2_detailed_class_info.csv", ("patientId", "class"))
    classes = {row["patientId"]: CLASSES[row["class"]] for row in table}
    for name in sorted(boxes):
        image = root / "stage_2_train_images" / f"{name}.dcm"
        if image.is_file():
            yield Case(name, partial(load_radiograph, image, boxes[name]), values={"label": classes.get(name, "")})
        else:
            yield LeftOut(name, f"there is no stage_2_train_images/{image.name}")
    for image in sorted((root / "stage_2_test_images").glob("[!.]*.dcm")):
        yield Case(image.stem, partial(load_radiograph, image), training=False, labelled=False)


RSNA = Converter(
    name="RSNA",
    title="RSNA Pneumonia Detection Challenge 2018: 26684 chest X-rays; boxes of opacities, three classes",
    licence="Terms of the challenge (research; images of the NIH, cite ChestX-ray14)",
    citation="Shih G et al. Augmenting the National Institutes of Health chest radiograph dataset with expert "
    "annotations of possible pneumonia. Radiol Artif Intell 2019;1(1):e180041. Wang X et al. ChestX-ray8. CVPR 2017.",
    url="https://www.kaggle.com/c/rsna-pneumonia-detection-challenge/data",
    dataset_id=541,
    dataset_name="RSNAPneumonia",
    layout="""  rsna-pneumonia-detection-challenge/
    stage_2_train_labels.csv             patientId,x,y,width,height,Target
    stage_2_detailed_class_info.csv      patientId,class
    stage_2_train_images/*.dcm
    stage_2_test_images/*.dcm            optional""",
    find=find,
    channels=("grayscale",),
    classification=(one_of("label", *CLASSES.values()),),
    box_classes=(BOX_CLASS,),
    file_ending=".png",
)
