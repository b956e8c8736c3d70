"""OASIS-1 and ADNI: T1 MRI of the brain with a dementia rating or a diagnosis.

OASIS-1 needs, exactly: the folders ``OAS1_NNNN_MRn`` of the discs, each with the skull-stripped, gain-field corrected
atlas image ``PROCESSED/MPRAGE/T88_111/OAS1_NNNN_MRn_mpr_nK_anon_111_t88_masked_gfc.hdr`` and ``.img`` (K: number of
averaged scans), and its table as ``oasis_cross-sectional.csv`` with the columns ``ID`` and ``CDR`` (0, 0.5, 1, 2;
empty for young subjects: not labelled). The official table is a spreadsheet; save it as CSV. Names by public code that
reads them. Analyze files say nothing reliable of left and right, so that axes are kept as stored. FSL_SEG, an
automatic segmentation, is not converted.

ADNI needs, exactly: the CSV of an image collection as LONI writes it (columns ``Image Data ID``, ``Subject``,
``Group``; any name, one CSV in the folder) and NIfTI files anywhere below whose names end in the image id,
``..._I45108.nii`` or ``.nii.gz``, as its NIfTI downloads do. The ids of the table may lack the leading I. Classes are
the groups that occur (CN, MCI, AD, ...). Header and names of the files by public code that reads such downloads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nibabel.analyze import AnalyzeImage

from nnunet_kd.conversion.base import Case, Converter, LeftOut, Loaded, inside, one_of, without_ending
from nnunet_kd.conversion.loading import load_volumes
from nnunet_kd.conversion.tables import read_table
from nnunet_kd.errors import ConversionError

RATINGS = ("0", "0.5", "1", "2")
GROUPS = ("CN", "SMC", "EMCI", "MCI", "LMCI", "AD")  # the order in which known groups are listed
ADNI_COLUMNS = ("Image Data ID", "Subject", "Group")


def find_oasis(folder: Path) -> Iterator[Case | LeftOut]:
    """Sessions ``OAS1_NNNN_MRn``; the second session of a subject is a repetition without a row in some tables."""
    root = inside(folder, "oasis_cross-sectional.csv", "**/OAS1_*_MR*")
    ratings = {row["ID"]: row["CDR"] for row in read_table(root / "oasis_cross-sectional.csv", ("ID", "CDR"))}
    for session in sorted(path for path in root.rglob("OAS1_[0-9]*_MR[0-9]") if path.is_dir()):
        images = list((session / "PROCESSED" / "MPRAGE" / "T88_111").glob("OAS1_*_t88_masked_gfc.hdr"))
        if len(images) != 1:
            yield LeftOut(session.name, f"T88_111 has {len(images)} files *_t88_masked_gfc.hdr")
            continue
        rating = ratings.get(session.name, "")
        rating = f"{float(rating):g}" if rating else ""
        if rating and rating not in RATINGS:
            yield LeftOut(session.name, f"its CDR is {rating}")
            continue
        values = {"cdr": rating, "subject": session.name.rpartition("_")[0]}
        yield Case(session.name, partial(_load_analyze, images[0]), values=values)


def _load_analyze(file: Path) -> Loaded:
    stored = AnalyzeImage.from_filename(file)
    array = np.asanyarray(stored.dataobj)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise ConversionError(f"{file.name} has the shape {array.shape}")
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)).astype(array.dtype.newbyteorder("=")))
    image.SetSpacing([float(side) for side in stored.header.get_zooms()[:3]])
    return Loaded((image,))


def specialise_adni(converter: Converter, folder: Path) -> Converter:
    """The groups that occur in the table."""
    occurring = {row["Group"] for row in _adni_rows(folder)} - {""}
    known = [group for group in GROUPS if group in occurring]
    classes = [*known, *sorted(occurring - set(known))]
    if len(classes) < 2:
        raise ConversionError(f"The table in {folder} has the groups {', '.join(classes)}; two are needed.")
    return replace(converter, classification=(one_of("group", *classes),))


def find_adni(folder: Path) -> Iterator[Case | LeftOut]:
    """NIfTI files whose image id is in the table, and rows of the table without a file."""
    rows = {row["Image Data ID"].removeprefix("I"): row for row in _adni_rows(folder)}
    files = {}
    for file in sorted(folder.rglob("[!.]*.nii*")):
        match = re.search(r"_I(\d+)$", without_ending(file))
        if match is None or match[1] not in rows:
            yield LeftOut(without_ending(file), "its name does not end in an image id (_I45108) of the table")
        else:
            files[match[1]] = file
    for number, row in rows.items():
        name = f"{row['Subject']}_I{number}"
        if number in files:
            values = {"group": row["Group"], "subject": row["Subject"]}
            yield Case(name, partial(load_volumes, [files[number]]), values=values)
        else:
            yield LeftOut(name, "there is no file whose name ends in this image id")


def _adni_rows(folder: Path) -> list[dict[str, str]]:
    tables = sorted(folder.glob("*.csv"))
    if len(tables) != 1:
        raise ConversionError(f"{folder} holds {len(tables)} CSV files, and one is needed.")
    return read_table(tables[0], ADNI_COLUMNS)


OASIS_1 = Converter(
    name="OASIS-1",
    title="OASIS-1: T1 MRI of 416 subjects aged 18 to 96; clinical dementia rating",
    licence="OASIS Data Use Agreement",
    citation="Marcus DS et al. Open Access Series of Imaging Studies (OASIS): cross-sectional MRI data in young, "
    "middle aged, nondemented, and demented older adults. J Cogn Neurosci 2007;19(9):1498-1507.",
    url="https://sites.wustl.edu/oasisbrains/home/oasis-1/",
    dataset_id=551,
    dataset_name="OASIS1",
    layout="""  FOLDER/
    oasis_cross-sectional.csv            columns ID (OAS1_0001_MR1) and CDR, of the official spreadsheet
    disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/
      OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc.hdr and .img
    ...                                  any discs""",
    find=find_oasis,
    channels=("T1",),
    classification=(one_of("cdr", *RATINGS),),
    split_by="subject",
)

ADNI = Converter(
    name="ADNI",
    title="ADNI: T1 MRI from a collection's table and a folder of NIfTI files; diagnosis",
    licence="ADNI Data Use Agreement",
    citation="Data used in preparation of this article were obtained from the Alzheimer's Disease Neuroimaging "
    "Initiative (ADNI) database (adni.loni.usc.edu); the agreement has the full text to cite. Jack CR et al. The "
    "Alzheimer's Disease Neuroimaging Initiative (ADNI): MRI methods. J Magn Reson Imaging 2008;27(4):685-691.",
    url="https://adni.loni.usc.edu",
    dataset_id=552,
    dataset_name="ADNI",
    layout="""  FOLDER/
    COLLECTION.csv                       columns Image Data ID, Subject, Group; the only CSV
    ADNI/002_S_0295/.../ADNI_002_S_0295_MR_..._I45108.nii or .nii.gz, in any folders""",
    find=find_adni,
    specialise=specialise_adni,
    channels=("T1",),
    split_by="subject",
)
