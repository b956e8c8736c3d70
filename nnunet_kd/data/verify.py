"""Everything that is wrong with a dataset's side files, found at once and without training anything."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.utils import (
    get_filenames_of_train_images_and_targets,
    get_identifiers_from_splitted_dataset_folder,
)
from PIL import Image
from tqdm import tqdm

from nnunet_kd.data.folds import Presence, shared_groups
from nnunet_kd.data.member import read_json
from nnunet_kd.data.side_files import Problem, SideFileError, read_boxes, read_labels, read_rows
from nnunet_kd.data.splits import read_splits, some
from nnunet_kd.data.tasks import ClassificationTarget, DetectionTarget, TaskError, Tasks
from nnunet_kd.errors import JointDatasetError, NnUNetKDError
from nnunet_kd.settings import BLOCK

REPAIR_FOLDS = "Correct the folds, or add cases."  # of folds that can be trained, but neither learn nor score a class
REPAIR_CASES = "Correct the folds, or do not train this one."
REPAIR_MASKS = f'Put them there; without any, write "segmentation": false in {BLOCK}.tasks of dataset.json.'
FOLD_REMEDIES = (REPAIR_FOLDS, REPAIR_CASES)  # of problems with one fold, which forbid no planning
TURNING_READERS = (SimpleITKIOWithReorient, NibabelIOWithReorient)  # boxes are in the axes of the stored image


@dataclass(frozen=True)
class RawCase:
    """A training case in nnUNet_raw: the file of its first channel and the one of its segmentation."""

    image: Path
    segmentation: Path


@dataclass(frozen=True)
class Contents:
    """What a side file says about one target.

    Attributes:
        title: File and target.
        num_cases: Cases with a label; of boxes, cases with an entry, which may be empty.
        counts: Class to cases of it; of boxes, to boxes of it.
        num_without: Images without a label; of boxes, images without an entry.
        num_empty: Of boxes, entries without boxes; None of labels.
    """

    title: str
    num_cases: int
    counts: dict[str, int]
    num_without: int
    num_empty: int | None = None


@dataclass(frozen=True)
class Report:
    """What a dataset's side files hold, and what is wrong with them.

    Attributes:
        dataset: Full dataset name.
        folder: Where dataset.json was read.
        tasks: What can be understood of them; None where dataset.json cannot be read.
        dimension: Axes of the images, 2 (also of single slices in volumes) or 3; None where nothing needs or tells it.
        num_cases: Training cases.
        contents: One entry per target, classification first.
        num_groups: Different values of ``split_by``; None without it.
        ungrouped: Cases without a value of ``split_by``, each a group of its own.
        problems: All problems, each once.
    """

    dataset: str
    folder: Path
    tasks: Tasks | None
    dimension: int | None
    num_cases: int
    contents: tuple[Contents, ...]
    num_groups: int | None
    ungrouped: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def notes(self) -> list[str]:
        """What is allowed, but may be a mistake."""
        if not self.ungrouped or self.tasks is None:
            return []
        return [
            f"{len(self.ungrouped)} case(s) without a value of '{self.tasks.split_by}' in {self.tasks.groups_file} are "
            f"each taken for a group of their own: {some(self.ungrouped)}. Fill it in where they belong to others."
        ]


def verify_dataset(
    name: str, dimension: int | None = None, show_progress: bool = True, check_copies: bool = True
) -> Report:
    """Check the side files of a dataset against each other, its images and its splits.

    The raw folder is checked, and that copies in nnUNet_preprocessed agree with it; where the raw folder is gone, the
    preprocessed one is checked, without image sizes.

    Args:
        name: Full dataset name.
        dimension: Axes of the stored images; None finds out.
        show_progress: Show a bar while image headers are read.
        check_copies: Whether copies in nnUNet_preprocessed must agree with the raw folder.

    Raises:
        SideFileError: The dataset is in neither folder, or is a joint dataset.
    """
    folder = _folder(name)
    problems: list[Problem] = []
    try:
        dataset_json = read_json(folder / "dataset.json", "Correct the file.")
        if not isinstance(dataset_json, dict):
            raise JointDatasetError(f"{folder / 'dataset.json'} holds no object. Correct the file.")
        block = dataset_json.get(BLOCK)
        if isinstance(block, dict) and "members" in block:
            raise SideFileError(f"{name} is a joint dataset and has no side files. Verify its members instead.")
    except JointDatasetError as error:
        problem = _as_problem(folder / "dataset.json", error)
        return Report(name, folder, None, dimension, 0, (), None, (), (problem,))
    wrong: list[TaskError] = []
    tasks = Tasks.understood(dataset_json, wrong)
    problems += [_as_problem(folder / "dataset.json", error) for error in wrong]

    raw = raw_cases(folder, dataset_json)
    cases = list(raw) or _preprocessed_cases(name, dataset_json)
    known = {*cases, *_preprocessed_cases(name, dataset_json)}
    if not cases:
        what = "no training images, neither in imagesTr nor preprocessed"
        problems.append(Problem(str(folder), "", what, "Put them there, or check 'file_ending' in dataset.json."))
    if tasks.segmentation:
        _verify_segmentations(name, raw, problems)
    contents: list[Contents] = []
    presences: list[Presence] = []
    for target in tasks.classification:
        own, present = _verify_labels(_path(name, folder, target.file), target, cases, problems)
        contents.append(own)
        presences += present
    if tasks.detection is not None:
        sizes = image_sizes(raw, dataset_json, problems, show_progress)
        dimension = dimension or next((len(size) for size in sizes.values()), None) or planned_dimension(name)
        path = _path(name, folder, tasks.detection.file)
        own, present = _verify_boxes(path, tasks.detection, dimension, sizes, cases, problems)
        contents.append(own)
        presences += present
    groups: dict[str, str] | None = None
    ungrouped: tuple[str, ...] = ()
    if tasks.split_by is not None and (tasks.classification or not wrong):  # else the file is not known
        path = _path(name, folder, tasks.groups_file)
        groups, ungrouped = _groups(path, tasks.split_by, cases, problems)
    _verify_splits(name, known, tasks.split_by, groups or {}, presences, problems)
    if check_copies and not wrong:
        _verify_copies(name, folder, tasks, problems)
    num_groups = None if groups is None else len(set(groups.values()))
    unique = tuple(dict.fromkeys(problems))  # two targets in one file meet the same ones
    return Report(name, folder, tasks, dimension, len(cases), tuple(contents), num_groups, ungrouped, unique)


# --- files of a dataset -----------------------------------------------------------------------------------------------
def raw_cases(folder: Path, dataset_json: Mapping[str, Any]) -> dict[str, RawCase]:
    """The training cases in a raw folder as nnU-Net finds them, sorted; none if there are no images."""
    if "dataset" in dataset_json:
        files = get_filenames_of_train_images_and_targets(str(folder), json.loads(json.dumps(dataset_json)))
        return {case: RawCase(Path(own["images"][0]), Path(own["label"])) for case, own in sorted(files.items())}
    ending = dataset_json.get("file_ending")
    if ending is None or not (folder / "imagesTr").is_dir():
        return {}
    # not nnU-Net's list of files, which starts a pool of twelve processes
    found = sorted(str(case) for case in get_identifiers_from_splitted_dataset_folder(str(folder / "imagesTr"), ending))
    return {
        case: RawCase(folder / "imagesTr" / f"{case}_0000{ending}", folder / "labelsTr" / f"{case}{ending}")
        for case in found
    }


def image_reader(dataset_json: Mapping[str, Any], example: Path) -> type[BaseReaderWriter]:
    """The reader that nnU-Net chooses for the images of a dataset.

    Raises:
        SideFileError: nnU-Net has none for this file ending.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a traceback of each reader that is not the right one
            return determine_reader_writer_from_dataset_json(dict(dataset_json), str(example), verbose=False)
    except RuntimeError as error:
        raise SideFileError(
            f"nnU-Net cannot read {example} ({error}). Correct 'file_ending' in dataset.json, or the image."
        ) from error


def image_size(file: Path, reader: type[BaseReaderWriter]) -> tuple[int, ...]:
    """Voxels per axis of a stored image in array order, (z, y, x) or (y, x); from the header where that is possible."""
    if issubclass(reader, NaturalImage2DIO):
        with Image.open(file) as image:
            return image.height, image.width
    if issubclass(reader, SimpleITKIO):
        header = sitk.ImageFileReader()
        header.SetFileName(str(file))
        header.ReadImageInformation()
        return tuple(int(size) for size in reversed(header.GetSize()[:3]))  # a fourth axis holds channels
    images, _ = reader().read_images((str(file),))
    return tuple(int(size) for size in images.shape[1:])


def _folder(name: str) -> Path:
    folders = [Path(str(root)) / name for root in (nnUNet_raw, nnUNet_preprocessed) if root.is_set()]
    for folder in folders:
        if (folder / "dataset.json").is_file():
            return folder
    searched = (
        " nor in ".join(str(folder) for folder in folders) or "nnUNet_raw or nnUNet_preprocessed, which are unset"
    )
    raise SideFileError(f"There is no dataset.json in {searched}. Check the dataset's name and the two variables.")


def _path(name: str, folder: Path, file: str) -> Path:
    """The side file in ``folder``, or the copy in nnUNet_preprocessed where only that is there."""
    copy = _preprocessed(name, file)
    return copy if copy is not None and not (folder / file).is_file() else folder / file


def _preprocessed(name: str, file: str) -> Path | None:
    if not nnUNet_preprocessed.is_set():
        return None
    path = Path(str(nnUNet_preprocessed)) / name / file
    return path if path.exists() else None


def _preprocessed_cases(name: str, dataset_json: Mapping[str, Any]) -> list[str]:
    """The cases whose segmentations nnU-Net copied beside the preprocessed images, as it does for every case."""
    segmentations = _preprocessed(name, "gt_segmentations")
    ending = dataset_json.get("file_ending")
    if segmentations is None or not ending:
        return []
    return sorted(file.name[: -len(ending)] for file in segmentations.iterdir() if file.name.endswith(ending))


def planned_dimension(name: str) -> int | None:
    """2 or 3 from the fingerprint, where a 2D image is a single slice."""
    path = _preprocessed(name, "dataset_fingerprint.json")
    shapes = None if path is None else read_json(path, "Move it away and plan again.").get("shapes_after_crop")
    return (2 if all(shape[0] == 1 for shape in shapes) else 3) if shapes else None


def image_sizes(
    raw: Mapping[str, RawCase], dataset_json: Mapping[str, Any], problems: list[Problem], show_progress: bool = True
) -> dict[str, tuple[int, ...]]:
    """Voxels per axis in array order of the images of a dataset, all (z, y, x) or all (y, x).

    A dataset of single slices is 2D, however many axes its files have.

    Args:
        raw: The images.
        dataset_json: Content of their dataset.json.
        problems: Collects the images that cannot be read; these are left out.
        show_progress: Show a bar.
    """
    if not raw:
        return {}
    try:
        reader = image_reader(dataset_json, next(iter(raw.values())).image)
    except SideFileError as error:
        problems.append(_as_problem(next(iter(raw.values())).image, error))
        return {}
    if issubclass(reader, TURNING_READERS):
        what = f"its boxes are in the axes of the stored image, which {reader.__name__} turns"
        other = reader.__name__.removesuffix("WithReorient")
        remedy = f"Write {other} as 'overwrite_image_reader_writer' of dataset.json, and preprocess it anew."
        problems.append(Problem(str(next(iter(raw.values())).image), "", what, remedy))
    sizes = {}
    for case, files in tqdm(raw.items(), "Reading image sizes", disable=not show_progress, leave=False):
        try:
            sizes[case] = image_size(files.image, reader)
        except Exception as error:  # whatever a broken image makes its library raise
            what = f"the image cannot be read ({error})"
            problems.append(Problem(str(files.image), f"case {case}", what, "Replace the file."))
    is_flat = all(len(size) == 2 or size[0] == 1 for size in sizes.values())
    return {case: size[-2:] for case, size in sizes.items()} if is_flat else sizes


def _as_problem(file: Path, error: NnUNetKDError) -> Problem:
    what, _, remedy = str(error).replace(str(file), "it", 1).partition(". ")
    return Problem(str(file), "", what, remedy)


def _verify_segmentations(name: str, raw: Mapping[str, RawCase], problems: list[Problem]) -> None:
    """Report cases whose segmentation is neither in the raw folder nor was copied from there by nnU-Net."""
    copies = _preprocessed(name, "gt_segmentations")
    missing = []
    for case, files in raw.items():
        own = files.segmentation
        if not own.is_file() and not (copies is not None and (copies / own.name).is_file()):
            missing.append(case)
    if missing:
        what = f"{len(missing)} of {len(raw)} cases have no segmentation: {some(missing)}"
        problems.append(Problem(str(raw[missing[0]].segmentation.parent), "", what, REPAIR_MASKS))


# --- entries ----------------------------------------------------------------------------------------------------------
def _verify_labels(
    path: Path, target: ClassificationTarget, cases: Sequence[str], problems: list[Problem]
) -> tuple[Contents, list[Presence]]:
    """What the file says, and which classes the cases have; the latter is empty where it could not be read."""
    found: list[Problem] = []
    labels = read_labels(path, target, found)
    problems.extend(found)
    rows = read_rows(path, target.columns, []) if path.is_file() else []
    _verify_case_names(path, {row.case: str(row) for row in rows}, cases, problems)
    own = {case: labels[case] for case in cases if case in labels and not np.isnan(labels[case]).all()}
    title = f"{target.file}, {target.name}"
    presence = Presence(title, target.classes, own, needs_negatives=target.multilabel)
    counts = presence.counts(own)
    is_read = not any(problem.is_unread for problem in found)
    if cases and is_read:
        _verify_classes(path, title, counts, problems)
    return Contents(title, len(own), counts, len(cases) - len(own)), [presence] if is_read else []


def _verify_boxes(
    path: Path,
    target: DetectionTarget,
    dimension: int | None,
    sizes: Mapping[str, Sequence[int]],
    cases: Sequence[str],
    problems: list[Problem],
) -> tuple[Contents, list[Presence]]:
    """As :func:`_verify_labels`."""
    found: list[Problem] = []
    if dimension is None:
        what = "it is not known whether the images are 2D or 3D, so boxes are not checked"
        problems.append(Problem(str(path), "", what, "Put the images or dataset_fingerprint.json there."))
        boxes = {}
    else:
        boxes = read_boxes(path, target, dimension, found, sizes)
        problems.extend(found)
        _verify_case_names(path, {case: f"case {case}" for case in boxes}, cases, problems)
    own = {case: boxes[case].labels for case in cases if case in boxes}
    numbers = np.bincount(np.concatenate([[], *own.values()]).astype(np.int64), minlength=len(target.classes))
    counts = {name: int(number) for name, number in zip(target.classes, numbers, strict=True)}
    is_read = dimension is not None and not any(problem.is_unread for problem in found)
    if cases and is_read:
        _verify_classes(path, target.file, counts, problems)
    num_empty = sum(1 for labels in own.values() if not len(labels))
    contents = Contents(target.file, len(own), counts, len(cases) - len(own), num_empty)
    return contents, [Presence.of_boxes(target.file, target.classes, boxes, cases)] if is_read else []


def _verify_case_names(path: Path, places: Mapping[str, str], cases: Collection[str], problems: list[Problem]) -> None:
    """Report cases without an image; ``places``: case to where in the file it is named."""
    known = set(cases)
    for case, where in places.items():
        if known and case not in known:
            what = "there is no training image of this case"
            remedy = "Remove it, or write the case as in imagesTr, without channel number and file ending."
            problems.append(Problem(str(path), where, what, remedy))


def _verify_classes(path: Path, title: str, counts: Mapping[str, int], problems: list[Problem]) -> None:
    """Report declared classes that no training case has."""
    if not any(counts.values()):
        what = f"no training case has any of the classes of {title}: {', '.join(counts)}"
        problems.append(Problem(str(path), "", what, "Add entries, or remove the task from dataset.json."))
        return
    for name in [name for name, count in counts.items() if count == 0]:
        what = f"no training case has the class '{name}' of {title}"
        problems.append(Problem(str(path), "", what, "Add cases of it, or remove the class from dataset.json."))


def _groups(
    path: Path, column: str, cases: Sequence[str], problems: list[Problem]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Case to group, and the cases that are groups of their own, none where that is not sure."""
    found: list[Problem] = []
    rows = read_rows(path, (column,), found)
    _verify_case_names(path, {row.case: str(row) for row in rows}, cases, problems)
    groups: dict[str, str] = {}
    for row in rows:
        (group,) = row.values
        if group and groups.setdefault(row.case, group) != group:
            what = f"{column} is '{group}', but '{groups[row.case]}' in another row of this case"
            problems.append(Problem(str(path), str(row), what, "Leave one row per case."))
    ungrouped = () if found else tuple(case for case in cases if case not in groups)
    if ungrouped and len(ungrouped) == len(cases):
        what = f"no training case has a value of {column}, by which folds are made"
        problems.append(Problem(str(path), "", what, "Fill in the column, or remove 'split_by' from dataset.json."))
        ungrouped = ()
    problems.extend(found)
    return groups, ungrouped


# --- splits and copies ------------------------------------------------------------------------------------------------
def _verify_splits(
    name: str,
    cases: Collection[str],
    split_by: str | None,
    groups: Mapping[str, str],
    presences: Sequence[Presence],
    problems: list[Problem],
) -> None:
    path = _preprocessed(name, "splits_final.json")
    if path is None:
        return
    try:
        splits = read_splits(path)
    except JointDatasetError as error:
        problems.append(_as_problem(path, error))
        return
    for fold, split in enumerate(splits):
        train, val = set(split["train"]), set(split["val"])
        for wrong, named in (
            ("are both in training and validation", train & val),
            ("have no training image", (train | val).difference(cases) if cases else set()),
        ):
            if named:
                what = f"{len(named)} case(s) {wrong}: {some(sorted(named))}"
                problems.append(Problem(str(path), f"fold {fold}", what, REPAIR_CASES))
        shared = shared_groups(groups, split)
        if shared:
            what = f"{len(shared)} value(s) of '{split_by}' are both in training and validation: {some(shared)}"
            remedy = "Move splits_final.json away and plan again, which divides by group."
            problems.append(Problem(str(path), f"fold {fold}", what, remedy))
        for presence in presences:
            for what in presence.lacks(split):
                problems.append(Problem(str(path), f"fold {fold}", what, REPAIR_FOLDS))


def _verify_copies(name: str, folder: Path, tasks: Tasks, problems: list[Problem]) -> None:
    """Training reads the copies in nnUNet_preprocessed, so a copy that differs from the raw file is out of date."""
    remedy = f"Copy the file from {folder} over it, or plan again."
    copied = _preprocessed(name, "dataset.json")
    if copied is None or copied.parent == folder:
        return
    try:
        agrees = Tasks.from_dataset_json(read_json(copied, remedy)) == tasks
    except (JointDatasetError, TaskError):
        agrees = False
    if not agrees:
        what = f"it declares other tasks than dataset.json in {folder}"
        problems.append(Problem(str(copied), BLOCK, what, remedy))
    files = [target.file for target in tasks.classification]
    files += [tasks.detection.file] if tasks.detection is not None else []
    files += [tasks.groups_file] if tasks.split_by is not None else []
    for file in dict.fromkeys(files):
        copy = _preprocessed(name, file)
        if copy is not None and (folder / file).is_file() and copy.read_bytes() != (folder / file).read_bytes():
            problems.append(Problem(str(copy), "", f"it differs from the file in {folder}", remedy))
