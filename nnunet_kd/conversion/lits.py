"""LiTS: CT of the liver and its tumours.

Layout of the archives by public code that reads them; the licence could not be confirmed at its source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nnunet_kd.conversion.base import Case, Converter, LeftOut, inside, without_ending
from nnunet_kd.conversion.loading import load_volumes


def find(folder: Path) -> Iterator[Case | LeftOut]:
    """Pairs ``volume-N.nii``, ``segmentation-N.nii`` and test volumes, in any folders below."""
    root = inside(folder, "**/volume-*.nii*")
    segmentations = {_number(file): file for file in root.rglob("segmentation-*.nii*")}
    for image in sorted(root.rglob("volume-*.nii*"), key=_number):
        number = _number(image)
        if number in segmentations:
            yield Case(f"lits_{number:03d}", partial(load_volumes, [image], segmentations[number]))
        else:
            yield LeftOut(f"lits_{number:03d}", f"there is no segmentation-{number}.nii")
    for image in sorted(root.rglob("test-volume-*.nii*"), key=_number):
        load = partial(load_volumes, [image])
        yield Case(f"lits_test_{_number(image):03d}", load, training=False, labelled=False)


def _number(file: Path) -> int:
    match = re.search(r"(\d+)$", without_ending(file))
    return int(match[1]) if match else -1


LITS = Converter(
    name="LiTS",
    title="Liver Tumor Segmentation Challenge: 131 training and 70 test CT volumes; liver and tumours",
    licence="CC BY-NC-SA 4.0, as usually stated; see its page",
    citation="Bilic P et al. The Liver Tumor Segmentation Benchmark (LiTS). Med Image Anal 2023;84:102680.",
    url="https://competitions.codalab.org/competitions/17094",
    dataset_id=513,
    dataset_name="LiTS",
    layout="""  FOLDER/                                all in one folder, or as the archives unpack
    Training Batch 1/volume-0.nii, segmentation-0.nii, ...
    Training Batch 2/volume-28.nii, segmentation-28.nii, ...
    test-volume-0.nii, ...               optional""",
    find=find,
    channels=("CT",),
    labels={"background": 0, "liver": 1, "tumor": 2},
)
