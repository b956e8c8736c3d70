"""Synapse (BTCV), AMOS22 and KiTS23: organs and tumours in abdominal CT and MRI.

Synapse: layout of the folder Abdomen/RawData on Synapse, by public code that reads it; labels 1 to 13 in the order of
its page. Cases keep the original's four digits. AMOS22: layout of the Zenodo record and nnU-Net's own converters; the
record's dataset.json writes ``arota``, and names here are those of examples/leaderboards. Training set and official
validation set become training and test set; the 240 images of the official test set, whose labels are not public, are
not converted. KiTS23: layout of the challenge's repository; regions as in nnU-Net's own converter
(``Dataset220_KiTS2023``). Axes of AMOS22 and KiTS23 vary in the files and are brought into one order; nnU-Net's
converters choose a reader that does that.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nnunet_kd.conversion.base import Case, Converter, LeftOut, inside, is_test_folder, without_ending
from nnunet_kd.conversion.loading import load_volumes

LAST_CT_OF_AMOS = 500  # higher numbers are MRI


def find_synapse(folder: Path) -> Iterator[Case | LeftOut]:
    """Pairs ``imgNNNN`` and ``labelNNNN`` in any folders; images in a folder below one named Test* are test cases."""
    root = inside(folder, "**/img[0-9][0-9][0-9][0-9].nii.gz", "**/label[0-9][0-9][0-9][0-9].nii.gz")
    labels = {without_ending(file).removeprefix("label"): file for file in root.rglob("label[0-9]*.nii.gz")}
    for image in sorted(root.rglob("img[0-9][0-9][0-9][0-9].nii.gz"), key=lambda file: file.name):
        name = without_ending(image)
        if name.removeprefix("img") in labels:
            yield Case(name, partial(load_volumes, [image], labels[name.removeprefix("img")]))
        elif any(map(is_test_folder, image.relative_to(root).parts[:-1])):
            yield Case(name, partial(load_volumes, [image]), training=False, labelled=False)
        else:
            yield LeftOut(name, f"there is no label{name.removeprefix('img')}.nii.gz")


def find_amos(folder: Path) -> Iterator[Case | LeftOut]:
    """Pairs of imagesTr and labelsTr for training, of imagesVa and labelsVa for testing."""
    root = inside(folder, "imagesTr/amos_*.nii.gz", "labelsTr/amos_*.nii.gz")
    for side, training in (("Tr", True), ("Va", False)):
        for image in sorted((root / f"images{side}").glob("amos_*.nii.gz")):
            name = without_ending(image)
            segmentation = root / f"labels{side}" / image.name
            if segmentation.is_file():
                values = {"modality": "CT" if int(name.rpartition("_")[2]) <= LAST_CT_OF_AMOS else "MR"}
                yield Case(name, partial(load_volumes, [image], segmentation, reorient=True), training, values)
            else:
                yield LeftOut(name, f"there is no labels{side}/{image.name}")


def find_kits(folder: Path) -> Iterator[Case | LeftOut]:
    """Folders ``case_NNNNN`` with imaging.nii.gz and segmentation.nii.gz."""
    root = inside(folder, "case_*/segmentation.nii.gz")
    for patient in sorted(path for path in root.glob("case_*") if path.is_dir()):
        image, segmentation = patient / "imaging.nii.gz", patient / "segmentation.nii.gz"
        missing = [file.name for file in (image, segmentation) if not file.is_file()]
        if missing:
            yield LeftOut(patient.name, f"there is no {', '.join(missing)}")
        else:
            yield Case(patient.name, partial(load_volumes, [image], segmentation, reorient=True))


SYNAPSE = Converter(
    name="Synapse",
    title="Synapse multi-atlas abdomen (BTCV): 30 training and 20 test CT volumes; 13 organs",
    licence="Terms of the challenge on Synapse (registration)",
    citation="Landman B et al. MICCAI multi-atlas labeling beyond the cranial vault - workshop and challenge. 2015. "
    "doi:10.7303/syn3193805",
    url="https://www.synapse.org/#!Synapse:syn3193805/wiki/217789",
    dataset_id=531,
    dataset_name="Synapse",
    layout="""  Abdomen/RawData/
    Training/img/img0001.nii.gz ...
    Training/label/label0001.nii.gz ...
    Testing/img/img0061.nii.gz ...       optional""",
    find=find_synapse,
    channels=("CT",),
    labels={
        "background": 0,
        "spleen": 1,
        "right_kidney": 2,
        "left_kidney": 3,
        "gallbladder": 4,
        "esophagus": 5,
        "liver": 6,
        "stomach": 7,
        "aorta": 8,
        "inferior_vena_cava": 9,
        "portal_and_splenic_veins": 10,
        "pancreas": 11,
        "right_adrenal_gland": 12,
        "left_adrenal_gland": 13,
    },
)

AMOS22 = Converter(
    name="AMOS22",
    title="AMOS 2022: 240 training and 120 validation volumes, CT and MRI; 15 organs",
    licence="CC BY 4.0, by the Zenodo record",
    citation="Ji Y et al. AMOS: A large-scale abdominal multi-organ benchmark for versatile medical image "
    "segmentation. NeurIPS 2022. arXiv:2206.08023",
    url="https://zenodo.org/records/7262581",
    dataset_id=219,
    dataset_name="AMOS22",
    layout="""  amos22/
    imagesTr/amos_0001.nii.gz ...        labelsTr/amos_0001.nii.gz ...
    imagesVa/amos_0008.nii.gz ...        labelsVa/amos_0008.nii.gz ...     optional: the test set""",
    find=find_amos,
    channels=("CT_or_MR",),
    labels={
        "background": 0,
        "spleen": 1,
        "right_kidney": 2,
        "left_kidney": 3,
        "gallbladder": 4,
        "esophagus": 5,
        "liver": 6,
        "stomach": 7,
        "aorta": 8,
        "postcava": 9,
        "pancreas": 10,
        "right_adrenal_gland": 11,
        "left_adrenal_gland": 12,
        "duodenum": 13,
        "bladder": 14,
        "prostate_or_uterus": 15,
    },
    columns=("modality",),
)

KITS23 = Converter(
    name="KiTS23",
    title="KiTS 2023: CT of 489 patients; kidneys, tumours and cysts",
    licence="CC BY-NC-SA, by the challenge's repository",
    citation="Heller N et al. The KiTS21 challenge: automatic segmentation of kidneys, renal tumors, and renal cysts "
    "in corticomedullary-phase CT. arXiv:2307.01984",
    url="https://github.com/neheller/kits23",
    dataset_id=220,
    dataset_name="KiTS2023",
    layout="""  kits23/dataset/
    case_00000/imaging.nii.gz, segmentation.nii.gz
    ...""",
    find=find_kits,
    channels=("CT",),
    labels={"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2},
    regions_class_order=(1, 3, 2),
)
