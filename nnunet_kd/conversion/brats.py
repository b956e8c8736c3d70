"""BraTS 2021 and BraTS 2023-GLI: multi-parametric MRI of gliomas.

Layout by the challenges' Synapse pages and nnU-Net's own converters (``Dataset137_BraTS21``, whose label conversion is
called; ``Dataset226_BraTS2024-BraTS-GLI`` for the names of 2023). Both are trained on the challenge's regions. Labels
of 2021: 1 necrotic core, 2 oedema, 4 enhancing; stored as 2, 1, 3, as nnU-Net does. Labels of 2023: 1 necrotic core,
2 oedema, 3 enhancing; stored as they are. In 2023 the last number of a name is the time point of a patient.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from nnunetv2.dataset_conversion.Dataset137_BraTS21 import copy_BraTS_segmentation_and_convert_labels_to_nnUNet

from nnunet_kd.conversion.base import Case, Converter, LeftOut, Loaded, inside
from nnunet_kd.conversion.images import read_volume
from nnunet_kd.conversion.loading import load_volumes

PARTS_2021 = ("t1", "t1ce", "t2", "flair")
PARTS_2023 = ("t1n", "t1c", "t2w", "t2f")
CITATION = (
    "Baid U et al. The RSNA-ASNR-MICCAI BraTS 2021 benchmark on brain tumor segmentation and radiogenomic "
    "classification. arXiv:2107.02314. Menze BH et al. The multimodal brain tumor image segmentation benchmark "
    "(BRATS). IEEE Trans Med Imaging 2015;34(10):1993-2024. Bakas S et al. Advancing The Cancer Genome Atlas glioma "
    "MRI collections with expert segmentation labels and radiomic features. Sci Data 2017;4:170117."
)


def find_2021(folder: Path) -> Iterator[Case | LeftOut]:
    """Folders ``BraTS2021_NNNNN``; those without segmentation (validation) become test cases."""
    root = inside(folder, "**/BraTS2021_*/BraTS2021_*_t1ce.nii.gz")
    for name, images, segmentation, missing in _patients(root, "BraTS2021_*", "_", PARTS_2021):
        if missing:
            yield LeftOut(name, missing)
        elif segmentation is None:
            yield Case(name, partial(load_volumes, images), training=False, labelled=False)
        else:
            yield Case(name, partial(_load_2021, images, segmentation))


def find_2023(folder: Path) -> Iterator[Case | LeftOut]:
    """Folders ``BraTS-GLI-NNNNN-NNN``; those without segmentation (validation) become test cases."""
    root = inside(folder, "**/BraTS-GLI-*/BraTS-GLI-*-t1c.nii.gz")
    for name, images, segmentation, missing in _patients(root, "BraTS-GLI-*", "-", PARTS_2023):
        if missing:
            yield LeftOut(name, missing)
            continue
        labelled = segmentation is not None
        values = {"patient": re.sub(r"-\d+$", "", name)}
        yield Case(name, partial(load_volumes, images, segmentation), labelled, values, labelled)


def _patients(
    root: Path, pattern: str, separator: str, parts: Sequence[str]
) -> Iterator[tuple[str, list[Path], Path | None, str]]:
    """Name, images, segmentation and what is missing, of every folder that holds an image."""
    for folder in sorted(path for path in root.rglob(pattern) if path.is_dir() and any(path.glob("*.nii.gz"))):
        files = {part: folder / f"{folder.name}{separator}{part}.nii.gz" for part in (*parts, "seg")}
        missing = [file.name for part, file in files.items() if part != "seg" and not file.is_file()]
        segmentation = files["seg"] if files["seg"].is_file() else None
        why = f"there is no {', '.join(missing)}" if missing else ""
        if not why and segmentation is None and "validation" not in folder.parent.name.lower():
            why = f"there is no {files['seg'].name}"
        yield folder.name, [files[part] for part in parts], segmentation, why


def _load_2021(images: Sequence[Path], segmentation: Path) -> Loaded:
    with tempfile.TemporaryDirectory() as temporary:
        converted = Path(temporary) / segmentation.name
        copy_BraTS_segmentation_and_convert_labels_to_nnUNet(str(segmentation), str(converted))
        labels = read_volume(converted)
    return Loaded(tuple(read_volume(file) for file in images), labels)


BRATS_2021 = Converter(
    name="BraTS2021",
    title="BraTS 2021: MRI (T1, T1ce, T2, FLAIR) of 1251 gliomas; tumour regions",
    licence="CC BY 4.0 on TCIA; on Synapse, terms of the challenge",
    citation=CITATION,
    url="https://www.synapse.org/#!Synapse:syn25829067/wiki/610863",
    dataset_id=137,
    dataset_name="BraTS2021",
    layout="""  FOLDER/
    BraTS2021_00000/BraTS2021_00000_t1.nii.gz, _t1ce, _t2, _flair, _seg.nii.gz
    ...                                  folders without _seg inside one named *Validation* become test cases""",
    find=find_2021,
    channels=("T1", "T1ce", "T2", "Flair"),
    labels={"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]},
    regions_class_order=(1, 2, 3),
)

BRATS_2023 = Converter(
    name="BraTS2023-GLI",
    title="BraTS 2023 adult glioma: MRI (T1n, T1c, T2w, T2-FLAIR); tumour regions",
    licence="Terms of the challenge on Synapse",
    citation=CITATION,
    url="https://www.synapse.org/#!Synapse:syn51156910/wiki/622351",
    dataset_id=523,
    dataset_name="BraTS2023GLI",
    layout="""  ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/
    BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1n.nii.gz, -t1c, -t2w, -t2f, -seg.nii.gz
    ...                                  folders without -seg inside one named *Validation* become test cases""",
    find=find_2023,
    channels=("T1", "T1ce", "T2", "Flair"),
    labels={"background": 0, "whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": [3]},
    regions_class_order=(2, 1, 3),
    split_by="patient",
)
