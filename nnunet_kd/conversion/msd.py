"""Medical Segmentation Decathlon: every task, in the layout of its archives.

nnU-Net's own converter (``nnunetv2.dataset_conversion.convert_MSD_dataset``) splits volumes of several channels here
too, and names, labels and channels are as it writes them; it neither checks nor resumes nor takes an output folder.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2.dataset_conversion.convert_MSD_dataset import split_4d_nifti

from nnunet_kd.conversion.base import Case, Converter, LeftOut, Loaded, inside, without_ending
from nnunet_kd.conversion.images import read_volume
from nnunet_kd.errors import ConversionError

NEEDED = ("dataset.json", "imagesTr/*.nii.gz", "labelsTr/*.nii.gz")


def specialise(converter: Converter, folder: Path) -> Converter:
    """Channels and labels of dataset.json; id and name of the task's folder (Task06_Lung: 6, Lung)."""
    root, content = _open(folder)
    match = re.fullmatch(r"Task(\d+)_(\w+)", root.resolve().name)
    if match is None:
        raise ConversionError(f"{root} is not named Task06_Lung or alike, which tells the task.")
    try:
        channels = tuple(content["modality"][str(index)] for index in range(len(content["modality"])))
        labels = {name: int(value) for value, name in content["labels"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f"{root / 'dataset.json'} has no usable 'modality' or 'labels' ({error!r}).") from error
    return replace(converter, dataset_id=int(match[1]), dataset_name=match[2], channels=channels, labels=labels)


def find(folder: Path) -> Iterator[Case | LeftOut]:
    """Volumes of imagesTr and imagesTs; files that begin with a dot or underscore are no images."""
    root, _ = _open(folder)
    for side, training in (("Tr", True), ("Ts", False)):
        for image in sorted((root / f"images{side}").glob("[!._]*.nii.gz")):
            name = without_ending(image)
            segmentation = root / "labelsTr" / image.name
            if not training:
                yield Case(name, partial(_load, image, None), training=False, labelled=False)
            elif segmentation.is_file():
                yield Case(name, partial(_load, image, segmentation))
            else:
                yield LeftOut(name, f"there is no labelsTr/{image.name}")


def _open(folder: Path) -> tuple[Path, dict[str, Any]]:
    root = inside(folder, *NEEDED)
    try:
        return root, json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{root / 'dataset.json'} is not valid JSON ({error}).") from error


def _load(image: Path, segmentation: Path | None) -> Loaded:
    with tempfile.TemporaryDirectory() as temporary:
        split_4d_nifti(str(image), temporary)
        images = tuple(read_volume(file) for file in sorted(Path(temporary).iterdir()))
    return Loaded(images, None if segmentation is None else read_volume(segmentation))


MSD = Converter(
    name="MSD",
    title="Medical Segmentation Decathlon: any of its ten tasks, for example Task06_Lung",
    licence="CC BY-SA 4.0",
    citation="Antonelli M et al. The Medical Segmentation Decathlon. Nat Commun 2022;13:4128. Simpson AL et al. A "
    "large annotated medical image dataset for the development and evaluation of segmentation algorithms. "
    "arXiv:1902.09063",
    url="http://medicaldecathlon.com",
    dataset_id=0,
    dataset_name="",
    layout="""  Task06_Lung/                           the folder's name tells the task
    dataset.json
    imagesTr/lung_001.nii.gz ...         labelsTr/lung_001.nii.gz ...
    imagesTs/lung_002.nii.gz ...         optional""",
    find=find,
    specialise=specialise,
)
