"""ACDC: cine MRI of the heart, end of diastole and of systole.

Layout by the challenge's page and nnU-Net's own converter (``Dataset027_ACDC``), whose names of cases and labels are
kept; that one neither checks nor resumes. It leaves out the segmentations of the test set, which were published after
the challenge; here they go into labelsTs. ``Info.cfg`` has the diagnosis as ``Group``: a column of classification.csv.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nnunet_kd.conversion.base import Case, Converter, LeftOut, inside, without_ending
from nnunet_kd.conversion.loading import load_volumes


def find(folder: Path) -> Iterator[Case | LeftOut]:
    """Frames of ``training`` and, if it is there, ``testing``."""
    root = inside(folder, "training/patient*")
    for part, training in (("training", True), ("testing", False)):
        for image in sorted((root / part).glob("patient*/patient*_frame[0-9][0-9].nii*")):
            name = without_ending(image)
            segmentation = image.with_name(image.name.replace(name, f"{name}_gt"))
            labelled = segmentation.is_file()
            if training and not labelled:
                yield LeftOut(name, "there is no segmentation")
                continue
            values = {"patient": image.parent.name, "group": _group(image.with_name("Info.cfg"))}
            load = partial(load_volumes, [image], segmentation if labelled else None)
            yield Case(name, load, training, values, labelled)


def _group(file: Path) -> str:
    """DCM, HCM, MINF, NOR or RV; empty where the file does not say."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Group:")), "")


ACDC = Converter(
    name="ACDC",
    title="Automated Cardiac Diagnosis Challenge: cine MRI of 150 patients; ventricles and myocardium",
    licence="CC BY-NC-SA 4.0, by the challenge's page",
    citation="Bernard O et al. Deep learning techniques for automatic MRI cardiac multi-structures segmentation and "
    "diagnosis: is the problem solved? IEEE Trans Med Imaging 2018;37(11):2514-2525.",
    url="https://www.creatis.insa-lyon.fr/Challenge/acdc/databases.html",
    dataset_id=27,
    dataset_name="ACDC",
    layout="""  database/
    training/patient001/Info.cfg, patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz, ...
    testing/patient101/...               optional""",
    find=find,
    channels=("cineMRI",),
    labels={"background": 0, "RV": 1, "MLV": 2, "LVC": 3},
    split_by="patient",
    columns=("group",),
)
