"""Montgomery and Shenzhen: chest radiographs with lung masks and tuberculosis labels.

Layout and names by public code that downloads and reads them from the National Library of Medicine. The last digit of
an image's name is its label: 0 normal, 1 tuberculosis.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nnunet_kd.conversion.base import Case, Converter, LeftOut, inside, one_of
from nnunet_kd.conversion.loading import load_grey
from nnunet_kd.errors import ConversionError

CLASSES = ("normal", "tuberculosis")
URL = "https://lhncbc.nlm.nih.gov/LHC-downloads/downloads.html#tuberculosis-image-data-sets"
JAEGER = (
    "Jaeger S, Candemir S, Antani S, Wang YX, Lu PX, Thoma G. Two public chest X-ray datasets for computer-aided "
    "screening of pulmonary diseases. Quant Imaging Med Surg 2014;4(6):475-477."
)


def find_montgomery(folder: Path) -> Iterator[Case | LeftOut]:
    """Cases of ``CXR_png`` with both masks of ``ManualMask``, whose union is the label."""
    root = inside(folder, "CXR_png/MCUCXR_*.png", "ManualMask/leftMask", "ManualMask/rightMask")
    for image in sorted((root / "CXR_png").glob("MCUCXR_*.png")):
        masks = [root / "ManualMask" / side / image.name for side in ("leftMask", "rightMask")]
        missing = [str(mask.relative_to(root)) for mask in masks if not mask.is_file()]
        if missing:
            yield LeftOut(image.stem, f"there is no {', '.join(path.rpartition('/')[0] for path in missing)}")
        else:
            yield Case(image.stem, partial(load_grey, image, masks), values=_tuberculosis(image))


def find_shenzhen(folder: Path) -> Iterator[Case | LeftOut]:
    """Cases of ``CXR_png`` with a mask ``*_mask.png`` anywhere in the folder."""
    root = inside(folder, "**/CXR_png/CHNCXR_*.png")
    masks = {file.name.removesuffix("_mask.png"): file for file in root.rglob("CHNCXR_*_mask.png")}
    if not masks:
        raise ConversionError(f"There are no lung masks CHNCXR_*_mask.png in {root}.")
    for image in sorted(root.rglob("CXR_png/CHNCXR_*.png")):
        if image.stem in masks:
            yield Case(image.stem, partial(load_grey, image, [masks[image.stem]]), values=_tuberculosis(image))
        else:
            yield LeftOut(image.stem, "there is no lung mask")


def _tuberculosis(image: Path) -> dict[str, str]:
    digit = image.stem.rpartition("_")[2]
    if digit not in ("0", "1"):
        raise ConversionError(f"The name of {image} does not end in _0 (normal) or _1 (tuberculosis).")
    return {"label": CLASSES[int(digit)]}


MONTGOMERY = Converter(
    name="Montgomery",
    title="Montgomery County chest X-ray set: 138 radiographs, lung masks, tuberculosis",
    licence="Public, by the National Library of Medicine; terms in its readme file; cite the papers",
    citation=JAEGER
    + " Candemir S et al. Lung segmentation in chest radiographs using anatomical atlases with nonrigid registration. "
    "IEEE Trans Med Imaging 2014;33(2):577-590.",
    url=URL,
    dataset_id=511,
    dataset_name="Montgomery",
    layout="""  MontgomerySet/
    CXR_png/MCUCXR_0001_0.png ...
    ManualMask/leftMask/MCUCXR_0001_0.png ...
    ManualMask/rightMask/MCUCXR_0001_0.png ...""",
    find=find_montgomery,
    channels=("grayscale",),
    labels={"background": 0, "lung": 1},
    classification=(one_of("label", *CLASSES),),
    file_ending=".png",
)

SHENZHEN = Converter(
    name="Shenzhen",
    title="Shenzhen Hospital chest X-ray set: 662 radiographs, tuberculosis; lung masks of 566",
    licence="Images public, by the National Library of Medicine; terms in its readme. Masks: see their Kaggle page",
    citation=JAEGER
    + " Masks: Stirenko S et al. Chest X-ray analysis of tuberculosis by deep learning with segmentation and "
    "augmentation. IEEE ELNANO 2018.",
    url=URL + " ; masks: https://www.kaggle.com/datasets/yoctoman/shcxr-lung-mask",
    dataset_id=512,
    dataset_name="Shenzhen",
    layout="""  FOLDER/
    ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png ...
    mask/CHNCXR_0001_0_mask.png ...      the masks, a download of their own; any folder name""",
    find=find_shenzhen,
    channels=("grayscale",),
    labels={"background": 0, "lung": 1},
    classification=(one_of("label", *CLASSES),),
    file_ending=".png",
)
