"""JSRT radiographs with the SCR segmentations.

JSRT images are raw: 2048 x 2048 whole numbers of 2 bytes, big endian, 12 bits, air bright; they are stored inverted
(4095 - value), so that air is dark as in other radiographs. Names that begin with JPCLN have a nodule, with JPCNN none.
SCR masks are 1024 x 1024 and are doubled, nothing is interpolated. Left and right lung are one label, as in Montgomery
and Shenzhen; where the masks of heart and lung overlap, the lung wins; clavicles are left out because they lie over the
lungs. Layout by public code that uses both; the positions of the nodules (CLNDAT_EN.txt) are not converted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from nnunet_kd.conversion.base import Case, Converter, LeftOut, Loaded, inside, one_of
from nnunet_kd.conversion.images import array_of, like, read_grey, unsigned
from nnunet_kd.errors import ConversionError

SIDE = 2048
WHITE = 4095
STRUCTURES = ("heart", "left lung", "right lung")  # later ones win
VALUES = {"heart": 2, "left lung": 1, "right lung": 1}


def find(folder: Path) -> Iterator[Case | LeftOut]:
    """Files ``JPC*.IMG`` with the masks ``heart/NAME.gif``, ``left lung/NAME.gif`` and ``right lung/NAME.gif``."""
    root = inside(folder, "**/JPC*.IMG", "**/left lung/JPC*.gif")
    masks = {(file.parent.name, file.stem): file for file in root.rglob("JPC*.gif")}
    for image in sorted(root.rglob("JPC*.IMG"), key=lambda file: file.name):
        own = {name: masks.get((name, image.stem)) for name in STRUCTURES}
        missing = [name for name, file in own.items() if file is None]
        if missing:
            yield LeftOut(image.stem, f"there is no mask of {', '.join(missing)}")
            continue
        values = {"nodule": "nodule" if image.stem.startswith("JPCLN") else "none"}
        files = {name: file for name, file in own.items() if file is not None}
        yield Case(image.stem, partial(_load, image, files), values=values)


def _load(file: Path, masks: Mapping[str, Path]) -> Loaded:
    raw = np.fromfile(file, dtype=">u2")
    if raw.size != SIDE * SIDE:
        raise ConversionError(f"{file.name} holds {raw.size} numbers of 2 bytes instead of {SIDE} x {SIDE}")
    if raw.max() > WHITE:
        raise ConversionError(f"{file.name} holds {raw.max()}, which is no number of 12 bits")
    image = unsigned(WHITE - raw.astype(np.int32).reshape(SIDE, SIDE), file.name)
    labels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    for name in STRUCTURES:
        mask = array_of(read_grey(masks[name])) > 0
        if mask.shape != (SIDE // 2, SIDE // 2):
            raise ConversionError(f"the mask of {name} has the size {mask.shape[::-1]} instead of half the image's")
        labels[mask.repeat(2, axis=0).repeat(2, axis=1)] = VALUES[name]
    return Loaded((image,), like(labels, image))


JSRT = Converter(
    name="JSRT",
    title="JSRT radiographs with SCR masks: 247 chest X-rays; lungs and heart, nodule or none",
    licence="JSRT and SCR: free for research, by their pages (registration)",
    citation="Shiraishi J et al. Development of a digital image database for chest radiographs with and without a lung "
    "nodule. AJR 2000;174:71-74. van Ginneken B, Stegmann MB, Loog M. Segmentation of anatomical structures in chest "
    "radiographs using supervised methods. Med Image Anal 2006;10:19-40.",
    url="http://db.jsrt.or.jp/eng.php ; SCR: https://www.isi.uu.nl/Research/Databases/SCR/",
    dataset_id=510,
    dataset_name="JSRT",
    layout="""  FOLDER/                                both downloads, in any folders
    All247images/JPCLN001.IMG ...
    scratch/fold1/masks/heart/JPCLN001.gif ...
    scratch/fold1/masks/left lung/JPCLN001.gif ...
    scratch/fold1/masks/right lung/JPCLN001.gif ...    and fold2""",
    find=find,
    channels=("grayscale",),
    labels={"background": 0, "lung": 1, "heart": 2},
    classification=(one_of("nodule", "none", "nodule"),),
    file_ending=".png",
)
