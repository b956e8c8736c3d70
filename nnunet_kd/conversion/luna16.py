"""LUNA16: CT of the lungs with boxes of nodules; with LIDC-IDRI's readings, their malignancy.

Layout, columns and licence by the challenge's page; LIDC's XML by public code that reads it. A nodule is given by its
centre in mm and its diameter; its box is the cube around it. LIDC's XML files (``LIDC-XML-only.zip`` of TCIA) are
optional: a reading of a nodule belongs to the LUNA16 nodule whose centre lies within its radius from the centre of the
reading's outlines, and the nodule's class is the median of its readings' malignancy, 1 to 5: below 3 benign, 3 (or no
reading) indeterminate, above malignant (our design, after the usual reading of LIDC). The class of a scan is that of
its most suspicious nodule. The centre of a reading takes columns and rows from its points and z in mm, as the XML has
them. TCIA's ``metadata.csv`` is optional and tells the patient of a series; without it every scan is a patient of its
own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from nnunet_kd.conversion.base import Box, Case, Converter, LeftOut, Loaded, inside, one_of
from nnunet_kd.conversion.images import read_volume
from nnunet_kd.conversion.tables import read_table
from nnunet_kd.errors import ConversionError

GRADES = ("benign", "indeterminate", "malignant")
NO_NODULE = "none"
NAMESPACE = {"lidc": "http://www.nih.gov"}
METADATA = "metadata.csv"


@dataclass(frozen=True)
class Nodule:
    """A nodule of LUNA16 in world coordinates (LPS, mm)."""

    centre_mm: tuple[float, float, float]
    diameter_mm: float


@dataclass(frozen=True)
class Reading:
    """A radiologist's reading: column and row of its centre in pixels, its z in mm, and malignancy 1 to 5."""

    column: float
    row: float
    z_mm: float
    malignancy: int


def specialise(converter: Converter, folder: Path) -> Converter:
    """With LIDC's readings, boxes are graded and scans have a class."""
    if not _xml_files(inside(folder, "**/subset*/[!.]*.mhd")):
        return converter
    return replace(converter, box_classes=GRADES, classification=(one_of("malignancy", NO_NODULE, *GRADES),))


def find(folder: Path) -> Iterator[Case | LeftOut]:
    """Scans of the folders ``subsetN``."""
    root = inside(folder, "**/subset*/[!.]*.mhd", "**/annotations.csv")
    nodules: dict[str, list[Nodule]] = defaultdict(list)
    columns = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")
    for row in read_table(min(root.rglob("annotations.csv")), columns):
        x, y, z, diameter = (float(row[column]) for column in columns[1:])
        nodules[row["seriesuid"]].append(Nodule((x, y, z), diameter))
    files = _xml_files(root)
    readings = _readings(files)
    patients = _patients(root)
    for image in sorted(root.rglob("subset*/[!.]*.mhd")):
        uid = image.stem
        values = {"patient": patients.get(uid, uid)}
        grades = None
        if files:
            grades = _grades(image, nodules[uid], readings.get(uid, []))
            values["malignancy"] = max(grades, key=GRADES.index, default=NO_NODULE)
        name = f"luna16_{uid.rpartition('.')[2]}"
        yield Case(name, partial(_load, image, nodules[uid], grades or ["nodule"] * len(nodules[uid])), values=values)


def _load(image: Path, nodules: Sequence[Nodule], labels: Sequence[str]) -> Loaded:
    volume = read_volume(image)
    boxes = [Box(label, _edges(volume, nodule)) for nodule, label in zip(nodules, labels, strict=True)]
    return Loaded((volume,), boxes=tuple(boxes))


def _edges(volume: sitk.Image, nodule: Nodule) -> tuple[float, ...]:
    centre = np.array(volume.TransformPhysicalPointToContinuousIndex(nodule.centre_mm)) + 0.5  # edges, not centres
    half = nodule.diameter_mm / 2 / np.array(volume.GetSpacing())
    return (*(centre - half).tolist(), *(centre + half).tolist())


def _grades(image: Path, nodules: Sequence[Nodule], readings: Sequence[Reading]) -> list[str]:
    header = sitk.ImageFileReader()
    header.SetFileName(str(image))
    header.ReadImageInformation()
    direction = np.array(header.GetDirection()).reshape(3, 3)
    centres = [_centre(header, direction, reading) for reading in readings]
    grades = []
    for nodule in nodules:
        own = [
            reading.malignancy
            for reading, centre in zip(readings, centres, strict=True)
            if np.linalg.norm(centre - nodule.centre_mm) <= nodule.diameter_mm / 2
        ]
        middle = median(own) if own else 3
        grades.append(GRADES[1 if middle == 3 else 0 if middle < 3 else 2])
    return grades


def _centre(header: sitk.ImageFileReader, direction: NDArray[np.float64], reading: Reading) -> NDArray[np.float64]:
    """World coordinates of a reading; the axes of LUNA16's scans are parallel to the world's."""
    in_plane = direction @ (np.array([reading.column, reading.row, 0]) * header.GetSpacing()) + header.GetOrigin()
    return np.array([in_plane[0], in_plane[1], reading.z_mm])


def _readings(files: Sequence[Path]) -> Mapping[str, list[Reading]]:
    """Series to the readings of nodules of 3 mm and more, which alone have a malignancy."""
    readings: dict[str, list[Reading]] = defaultdict(list)
    for file in files:
        try:
            tree = ElementTree.parse(file)
        except ElementTree.ParseError as error:
            raise ConversionError(f"{file} is not valid XML ({error}).") from error
        uid = tree.findtext(".//lidc:SeriesInstanceUid", "", NAMESPACE).strip()
        for nodule in tree.iterfind(".//lidc:unblindedReadNodule", NAMESPACE):
            malignancy = nodule.findtext("lidc:characteristics/lidc:malignancy", "", NAMESPACE).strip()
            points = [
                [float(edge.findtext(f"lidc:{axis}Coord", "nan", NAMESPACE)) for axis in "xy"]
                + [float(outline.findtext("lidc:imageZposition", "nan", NAMESPACE))]
                for outline in nodule.iterfind("lidc:roi", NAMESPACE)
                for edge in outline.iterfind("lidc:edgeMap", NAMESPACE)
            ]
            if malignancy.isdigit() and int(malignancy) and points:
                low, high = np.min(points, axis=0), np.max(points, axis=0)
                column, row, z_mm = ((low + high) / 2).tolist()
                readings[uid].append(Reading(column, row, z_mm, int(malignancy)))
    return readings


def _xml_files(root: Path) -> list[Path]:
    return sorted(file for file in root.rglob("[!.]*.xml") if b"LidcReadMessage" in file.read_bytes()[:2000])


def _patients(root: Path) -> dict[str, str]:
    file = root / METADATA
    if not file.is_file():
        return {}
    return {row["Series UID"]: row["Subject ID"] for row in read_table(file, ("Series UID", "Subject ID"))}


LUNA16 = Converter(
    name="LUNA16",
    title="LUNA16: 888 CT scans of LIDC-IDRI; boxes of nodules, with LIDC's XML their malignancy",
    licence="CC BY 4.0 (LUNA16), CC BY 3.0 (LIDC-IDRI), by their pages",
    citation="Setio AAA et al. Validation, comparison, and combination of algorithms for automatic detection of "
    "pulmonary nodules in computed tomography images: The LUNA16 challenge. Med Image Anal 2017;42:1-13. Armato SG et "
    "al. The Lung Image Database Consortium (LIDC) and Image Database Resource Initiative (IDRI). Med Phys "
    "2011;38(2):915-931.",
    url="https://luna16.grand-challenge.org",
    dataset_id=561,
    dataset_name="LUNA16",
    layout="""  FOLDER/
    subset0/1.3.6.1.4.1.14519.5.2.1.6279.6001.*.mhd and .raw, ... subset9/
    annotations.csv                      seriesuid,coordX,coordY,coordZ,diameter_mm
    tcia-lidc-xml/157/158.xml ...        optional: LIDC-XML-only, for the malignancy
    metadata.csv                         optional: of TCIA's download, columns Series UID and Subject ID""",
    find=find,
    specialise=specialise,
    channels=("CT",),
    box_classes=("nodule",),
    split_by="patient",
)
