"""BrainMetShare and ISLES 2022: metastases and strokes in brain MRI.

BrainMetShare: two published layouts are read, by public code that uses them (the data set's page needs a login): png
slices in folders 0 to 3 and seg, whose voxel size (0.94 x 0.94 x 1 mm) is not in the files and is set here; and NIfTI
files bravo, t1_pre, t1_gd, flair and seg. Folder 0 is T1 gradient echo after contrast (bravo), 1 T1 spin echo before,
2 T1 spin echo after contrast, 3 FLAIR. ISLES 2022: both layouts and the names by public code. Only DWI and ADC are
taken: they share the grid of the mask, and FLAIR does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_kd.conversion.base import Case, Converter, LeftOut, Loaded, inside, is_test_folder
from nnunet_kd.conversion.images import array_of, like, read_grey
from nnunet_kd.conversion.loading import load_volumes
from nnunet_kd.errors import ConversionError

NIFTI_PARTS = ("bravo", "t1_pre", "t1_gd", "flair")
SLICE_PARTS = ("0", "1", "2", "3")
SLICE_SPACING_MM = (0.94, 0.94, 1.0)


def find_metastases(folder: Path) -> Iterator[Case | LeftOut]:
    """Folders ``Mets_NNN``; in a folder named *test* they are test cases, with labels where there are any."""
    root = inside(folder, "**/Mets_*")
    for patient in sorted(path for path in root.rglob("Mets_*") if path.is_dir()):
        nifti = any(patient.glob("*.nii.gz"))
        parts = [patient / (f"{part}.nii.gz" if nifti else part) for part in (NIFTI_PARTS if nifti else SLICE_PARTS)]
        segmentation = patient / ("seg.nii.gz" if nifti else "seg")
        training = not is_test_folder(patient.parent.name)
        missing = [part.name for part in parts if not part.exists()]
        labelled = segmentation.exists()
        if training and not labelled:
            missing.append(segmentation.name)
        if missing:
            yield LeftOut(patient.name, f"there is no {', '.join(missing)}")
            continue
        load = partial(_load_metastases, parts, segmentation if labelled else None)
        yield Case(patient.name, load, training, labelled=labelled)


def _load_metastases(parts: Sequence[Path], segmentation: Path | None) -> Loaded:
    if parts[0].is_dir():
        images = tuple(_stack(part) for part in parts)
        labels = None if segmentation is None else _stack(segmentation)
    else:
        images, labels = (loaded := load_volumes(parts, segmentation)).images, loaded.segmentation
    if labels is not None:
        labels = like((array_of(labels) > 0).astype(np.uint8), labels)  # 255 in the slices
    return Loaded(images, labels)


def _stack(folder: Path) -> sitk.Image:
    """The slices of a folder in the order of their numbers as a volume."""
    files = list(folder.glob("*.png"))
    if not files or not all(file.stem.isdigit() for file in files):
        raise ConversionError(f"{folder.name} does not hold slices that are named by a number")
    slices = [array_of(read_grey(file)) for file in sorted(files, key=lambda file: int(file.stem))]
    volume = sitk.GetImageFromArray(np.stack(slices))
    volume.SetSpacing(SLICE_SPACING_MM)
    return volume


def find_strokes(folder: Path) -> Iterator[Case | LeftOut]:
    """Masks ``sub-strokecaseNNNN_ses-NNNN_msk.nii.gz`` with the DWI and ADC of the same name, in any folders."""
    root = inside(folder, "**/sub-strokecase*_dwi.nii.gz", "**/sub-strokecase*_msk.nii.gz")
    files = {file.name: file for file in root.rglob("sub-strokecase*.nii.gz")}
    for name in sorted(file.removesuffix("_dwi.nii.gz") for file in files if file.endswith("_dwi.nii.gz")):
        images = [files.get(f"{name}_{part}.nii.gz") for part in ("dwi", "adc")]
        mask = files.get(f"{name}_msk.nii.gz")
        found = [image for image in images if image is not None]
        if mask is None or len(found) < len(images):
            yield LeftOut(name, "there is no mask" if mask is None else "there is no ADC")
        else:
            yield Case(name, partial(load_volumes, found, mask))


BRAIN_MET_SHARE = Converter(
    name="BrainMetShare",
    title="BrainMetShare: four MRI sequences of 156 patients; brain metastases (105 with labels)",
    licence="Stanford University Dataset Research Use Agreement (registration, no commercial use)",
    citation="Grovik E et al. Deep learning enables automatic detection and segmentation of brain metastases on "
    "multisequence MRI. J Magn Reson Imaging 2020;51(1):175-182.",
    url="https://aimi.stanford.edu/brainmetshare",
    dataset_id=501,
    dataset_name="BrainMetShare",
    layout="""  brainmetshare-3/
    train/Mets_005/bravo.nii.gz, t1_pre.nii.gz, t1_gd.nii.gz, flair.nii.gz, seg.nii.gz ...
    test/Mets_001/...                    optional, without seg.nii.gz
  or the older release:
  stanford_release_brainmask/
    mets_stanford_releaseMask_train/Mets_005/0/*.png, 1/*.png, 2/*.png, 3/*.png, seg/*.png ...
    mets_stanford_releaseMask_test/...   optional, without seg""",
    find=find_metastases,
    channels=("T1 gradient echo post", "T1 spin echo pre", "T1 spin echo post", "FLAIR"),
    labels={"background": 0, "metastasis": 1},
)

ISLES_2022 = Converter(
    name="ISLES2022",
    title="ISLES 2022: DWI and ADC of 250 acute ischaemic strokes; infarct",
    licence="CC BY 4.0, by the Zenodo record",
    citation="Hernandez Petzsche MR et al. ISLES 2022: A multi-center magnetic resonance imaging stroke lesion "
    "segmentation dataset. Sci Data 2022;9:762.",
    url="https://zenodo.org/records/7960856",
    dataset_id=502,
    dataset_name="ISLES2022",
    layout="""  ISLES-2022/
    sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_dwi.nii.gz, ..._adc.nii.gz ...
    derivatives/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_msk.nii.gz ...
  or the same file names below rawdata/ and derivatives/""",
    find=find_strokes,
    channels=("DWI", "ADC"),
    labels={"background": 0, "infarct": 1},
)
