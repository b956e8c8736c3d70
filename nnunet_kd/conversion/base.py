"""What a converter is: a description of a public dataset and a function that finds its cases in a download.

A converter is a pure function of an input folder. What writes, checks and resumes is in ``convert.py`` (our design).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from nnunet_kd.errors import ConversionError

MAX_NAMED = 5


@dataclass(frozen=True)
class Box:
    """A box as ``boxes.json`` has it.

    Attributes:
        label: Its class.
        edges: [x0, y0, x1, y1] or [x0, y0, z0, x1, y1, z1], voxel-edge coordinates, x the image column, end exclusive.
    """

    label: str
    edges: tuple[float, ...]


@dataclass(frozen=True)
class Loaded:
    """What was read of one case.

    Attributes:
        images: One per channel, all on one grid.
        segmentation: On the same grid; None where the dataset or this test case has none.
        boxes: Edges may be outside the image; they are clipped when the case is written.
    """

    images: tuple[sitk.Image, ...]
    segmentation: sitk.Image | None = None
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Case:
    """One case of a download.

    Attributes:
        name: Its name in the converted dataset.
        load: Reads it; a module-level function or a ``functools.partial`` of one, because worker processes get it.
        training: False puts the images into imagesTs.
        values: Column of classification.csv to value; an empty text means "not labelled".
        labelled: False for test cases whose labels are not public.
    """

    name: str
    load: Callable[[], Loaded]
    training: bool = True
    values: Mapping[str, str] = field(default_factory=dict)
    labelled: bool = True


@dataclass(frozen=True)
class LeftOut:
    """A case of a download that is not converted, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Converter:
    """A public dataset and how its download is read.

    Attributes:
        name: Name on the command line.
        title: One line about it.
        licence: Terms of use as published, or where they are found.
        citation: What its authors ask to be cited.
        url: Where it is found.
        dataset_id: Default id.
        dataset_name: The part of the folder's name after the id.
        layout: What the input folder must contain; shown where something is missing.
        find: Yields the cases of an input folder; raises ConversionError for a wrong one.
        channels: Channel names in their order; ``CT`` decides nnU-Net's normalisation.
        labels: As in dataset.json; None where there are no segmentations.
        regions_class_order: As in dataset.json.
        classification: Targets as in ``nnunet_kd.tasks.classification``.
        box_classes: Classes of boxes; empty without boxes.
        split_by: Column of classification.csv that must not be divided between training and validation.
        columns: Further columns of classification.csv.
        file_ending: Of images and segmentations.
        specialise: Completes the description from the input folder, for downloads of several tasks.
    """

    name: str
    title: str
    licence: str
    citation: str
    url: str
    dataset_id: int
    dataset_name: str
    layout: str
    find: Callable[[Path], Iterable[Case | LeftOut]]
    channels: tuple[str, ...] = ()
    labels: Mapping[str, Any] | None = None
    regions_class_order: tuple[int, ...] | None = None
    classification: tuple[Mapping[str, Any], ...] = ()
    box_classes: tuple[str, ...] = ()
    split_by: str | None = None
    columns: tuple[str, ...] = ()
    file_ending: str = ".nii.gz"
    specialise: Callable[[Converter, Path], Converter] | None = None

    @property
    def label_values(self) -> frozenset[int]:
        """All values that a segmentation may hold."""
        values: set[int] = {0}
        for value in (self.labels or {}).values():
            values.update([value] if isinstance(value, int) else value)
        return frozenset(values)

    @property
    def table_columns(self) -> tuple[str, ...]:
        """Columns of classification.csv after ``case``; empty where the file is not needed."""
        columns: list[str] = []
        for target in self.classification:
            columns += target["columns"] if "columns" in target else [target["column"]]
        columns += [self.split_by] if self.split_by is not None else []
        return tuple(dict.fromkeys([*columns, *self.columns]))


def one_of(column: str, *classes: str) -> Mapping[str, Any]:
    """A classification target whose classes exclude each other."""
    return {"file": "classification.csv", "column": column, "classes": list(classes)}


def findings(*columns: str) -> Mapping[str, Any]:
    """A classification target with one column of 0 and 1 per finding."""
    return {"file": "classification.csv", "columns": list(columns)}


def inside(folder: Path, *needed: str) -> Path:
    """The folder that has ``needed``: the given one, or the only one directly inside it that has, as archives unpack.

    Args:
        folder: The input folder.
        needed: Relative paths; patterns of ``Path.glob`` are allowed.

    Raises:
        ConversionError: Neither has them, or several have.
    """
    if _has(folder, needed):
        return folder
    found = [child for child in sorted(folder.iterdir()) if child.is_dir() and _has(child, needed)]
    if len(found) == 1:
        return found[0]
    names = " and ".join(needed)
    if found:
        several = ", ".join(child.name for child in found[:MAX_NAMED])
        raise ConversionError(f"{folder} holds several folders with {names}: {several}. Give one of them with -i.")
    raise ConversionError(f"Neither {folder} nor a folder directly inside it holds {names}.")


def is_test_folder(name: str) -> bool:
    """Whether a word of a folder's name begins with test, as in Testing or releaseMask_test."""
    return re.search(r"(?:^|[^a-z])test", name.lower()) is not None


def without_ending(file: Path) -> str:
    """Name of a NIfTI file without .nii or .nii.gz; of others, without the last ending."""
    return file.name.removesuffix(".gz").removesuffix(".nii") if ".nii" in file.suffixes else file.stem


def _has(folder: Path, needed: Iterable[str]) -> bool:
    return all(any(folder.glob(path)) for path in needed)
