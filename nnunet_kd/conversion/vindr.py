"""VinDr-CXR: chest radiographs with findings (22 local ones, and diagnoses of the whole image) and boxes.

Layout by PhysioNet, or that of the Kaggle challenge, which has the training part with 14 classes of boxes. Findings
are the columns of the files, by public code that reads them. Every training image was read by three radiologists: a
finding is present where at least two named it; boxes of one finding that overlap (intersection over union of at least
0.4) are averaged, and boxes of findings that fewer than two named are dropped (our design). The test part of PhysioNet
is a consensus and is taken as it is. DICOM files become png with their values as stored; MONOCHROME1 is inverted by
ITK.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nnunet_kd.conversion.base import Box, Case, Converter, LeftOut, findings, inside
from nnunet_kd.conversion.loading import load_radiograph
from nnunet_kd.conversion.tables import read_table
from nnunet_kd.errors import ConversionError

NO_FINDING = "No finding"
KEYS = ("image_id", "rad_id", NO_FINDING)
EDGES = ("x_min", "y_min", "x_max", "y_max")
MIN_READERS = 2
SAME_BOX = 0.4  # intersection over union of boxes that mean one thing


def specialise(converter: Converter, folder: Path) -> Converter:
    """Findings and classes of boxes, as the tables of the training part have them."""
    root = _root(folder)
    names = _names(root)
    boxed = {row["class_name"] for row in _box_rows(root, "train")}
    return replace(
        converter,
        classification=(findings(*names),),
        box_classes=tuple(name for name in names if name in boxed),
    )


def find(folder: Path) -> Iterator[Case | LeftOut]:
    """Images of ``train`` and, with the tables of PhysioNet, of ``test``."""
    root = _root(folder)
    names = _names(root)
    for part in ("train", "test"):
        needed = MIN_READERS if part == "train" else 1
        boxes: dict[str, list[Mapping[str, str]]] = defaultdict(list)
        for row in _box_rows(root, part):
            boxes[row["image_id"]].append(row)
        for image_id, own_votes in sorted(_votes(root, part, names).items()):
            present = [name for name in names if own_votes.get(name, 0) >= needed]
            image = root / part / f"{image_id}.dicom"
            if not image.is_file():
                yield LeftOut(image_id, f"there is no {part}/{image.name}")
                continue
            values = {name: str(int(name in present)) for name in names}
            own = [row for row in boxes[image_id] if row["class_name"] in present]
            load = partial(load_radiograph, image, _merged(own) if part == "train" else list(map(_box, own)))
            yield Case(image_id, load, part == "train", values)


def _root(folder: Path) -> Path:
    try:
        return inside(folder, "train", "train.csv")  # Kaggle
    except ConversionError:
        return inside(folder, "train", "annotations/annotations_train.csv", "annotations/image_labels_train.csv")


def _box_rows(root: Path, part: str) -> list[dict[str, str]]:
    """Rows with a box or, of Kaggle, with "No finding"; empty where there is no such table."""
    file = root / "annotations" / f"annotations_{part}.csv"
    if part == "train" and not file.is_file():
        file = root / "train.csv"
    return read_table(file, ("image_id", "class_name", *EDGES)) if file.is_file() else []


def _image_rows(root: Path, part: str) -> list[dict[str, str]]:
    file = root / "annotations" / f"image_labels_{part}.csv"
    return read_table(file, ("image_id",)) if file.is_file() else []


def _names(root: Path) -> tuple[str, ...]:
    rows = _image_rows(root, "train")
    if rows:
        return tuple(name for name in rows[0] if name not in KEYS)
    return tuple(sorted({row["class_name"] for row in _box_rows(root, "train")} - {NO_FINDING}))


def _votes(root: Path, part: str, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Image to finding to the number of readers who named it."""
    votes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    rows = _image_rows(root, part)
    known = {name.rstrip("s"): name for name in names}  # test writes "Other disease" for "Other diseases"
    for row in rows:
        for column, value in row.items():
            if column not in KEYS and value in ("1", "1.0"):
                if column.rstrip("s") not in known:
                    raise ConversionError(f"image_labels_{part}.csv has {column}, which the training part has not.")
                votes[row["image_id"]][known[column.rstrip("s")]] += 1
        votes[row["image_id"]]  # an image without a finding is there too
    if not rows:
        readers = {(row["image_id"], row["class_name"], row["rad_id"]) for row in _box_rows(root, part)}
        for image_id, name, _ in readers:
            votes[image_id][name] += 1
    return votes


def _box(row: Mapping[str, str]) -> Box:
    return Box(row["class_name"], tuple(float(row[edge]) for edge in EDGES))


def _merged(rows: Sequence[Mapping[str, str]]) -> list[Box]:
    """One box per group of overlapping boxes of a finding, in the order of the first."""
    groups: list[tuple[str, list[NDArray[np.float64]]]] = []
    for box in map(_box, rows):
        edges = np.array(box.edges)
        for name, members in groups:
            if name == box.label and _overlap(np.mean(members, axis=0), edges) >= SAME_BOX:
                members.append(edges)
                break
        else:
            groups.append((box.label, [edges]))
    return [Box(name, tuple(np.mean(members, axis=0).tolist())) for name, members in groups]


def _overlap(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Intersection over union of two boxes [x0, y0, x1, y1]."""
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    common = sides.clip(min=0).prod()
    return float(common / ((first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - common))


VINDR = Converter(
    name="VinDr-CXR",
    title="VinDr-CXR: 15000 training and 3000 test chest X-rays; findings and boxes",
    licence="PhysioNet Credentialed Health Data Use Agreement 1.5.0, by its page",
    citation="Nguyen HQ et al. VinDr-CXR: An open dataset of chest X-rays with radiologist's annotations. Sci Data "
    "2022;9:429.",
    url="https://physionet.org/content/vindr-cxr/1.0.0/",
    dataset_id=542,
    dataset_name="VinDrCXR",
    layout="""  vindr-cxr/1.0.0/
    train/*.dicom                        test/*.dicom
    annotations/annotations_train.csv    image_id,rad_id,class_name,x_min,y_min,x_max,y_max
    annotations/image_labels_train.csv   image_id,rad_id,FINDING,...
    annotations/annotations_test.csv, image_labels_test.csv     optional, without rad_id
  or of the Kaggle challenge:
    train/*.dicom
    train.csv                            image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max""",
    find=find,
    specialise=specialise,
    channels=("grayscale",),
    file_ending=".png",
)
