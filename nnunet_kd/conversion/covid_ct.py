"""COVID-CT (UCSD): slices of CT, cut from papers, with and without COVID-19.

Layout by its repository. The classes come from different sources, so that shortcuts are likely. ``split_by`` keeps
slices of one source together as far as the names tell (our reading of them): of COVID-19, what stands before the page
(``-p27-132``) is the paper; of the others, what stands before ``%``. The patients are in COVID-CT-MetaInfo.xlsx, which
is not read. The authors' split is not used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nnunet_kd.conversion.base import Case, Converter, inside, one_of
from nnunet_kd.conversion.loading import load_grey

CLASSES = {"covid": "CT_COVID", "non_covid": "CT_NonCOVID"}


def find(folder: Path) -> Iterator[Case]:
    """Images of both folders; case names keep letters, digits and the ending of the file."""
    root = inside(folder, *(f"**/{part}/[!.]*.*" for part in CLASSES.values()))
    for label, part in CLASSES.items():
        files = [file for ending in ("png", "jpg", "jpeg") for file in root.rglob(f"{part}/[!.]*.{ending}")]
        for file in sorted(files):
            name = re.sub(r"[^A-Za-z0-9]+", "_", file.name)
            group = f"{label}_{re.split(r'-p[0-9]|%', file.stem)[0]}"
            yield Case(f"{label}_{name}", partial(load_grey, file), values={"label": label, "group": group})


COVID_CT = Converter(
    name="COVID-CT",
    title="COVID-CT: 349 CT slices with COVID-19 and 397 without",
    licence="Not stated for the images, which are from papers: copyright with their authors and journals",
    citation="Yang X, He X, Zhao J, Zhang Y, Zhang S, Xie P. COVID-CT-Dataset: a CT scan dataset about COVID-19. "
    "arXiv:2003.13865",
    url="https://github.com/UCSD-AI4H/COVID-CT",
    dataset_id=545,
    dataset_name="COVIDCT",
    layout="""  COVID-CT/Images-processed/             both archives unpacked
    CT_COVID/*.png, *.jpg
    CT_NonCOVID/*.png, *.jpg""",
    find=find,
    channels=("grayscale",),
    classification=(one_of("label", *CLASSES),),
    split_by="group",
    file_ending=".png",
)
