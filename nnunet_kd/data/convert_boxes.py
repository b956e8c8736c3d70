"""Boxes of a dataset from other sources: COCO json, nnDetection's instances, or the dataset's own segmentations."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import yaml
from numpy.typing import NDArray
from scipy import ndimage
from tqdm import tqdm

from nnunet_kd.data.member import read_json
from nnunet_kd.data.side_files import CaseBoxes, Problem, SideFileError
from nnunet_kd.data.verify import RawCase, image_reader, image_sizes
from nnunet_kd.settings import BLOCK
from nnunet_kd.spaces.labels import LabelSpace

MAX_NAMED = 5
UNIQUE_IDS = "Give every one an id of its own, also in the annotations, or convert joined files one by one."
Labelled = tuple[str, NDArray[np.float64]]  # a class, and a box [2 * dimension] in array order


@dataclass(frozen=True)
class Conversion:
    """Boxes in the form of a side file.

    Attributes:
        boxes: Case to its boxes; every case that the source speaks of is there, also without boxes.
        classes: Names of the labels: the asked ones, or those that occur, in the source's order.
        left_out: What the source has and the result has not, in sentences.
    """

    boxes: dict[str, CaseBoxes]
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def boxes_from_coco(
    file: Path, cases: Mapping[str, RawCase], dataset_json: Mapping[str, Any], classes: Sequence[str] | None = None
) -> Conversion:
    """Read boxes from a COCO json (``images``, ``annotations`` with ``bbox`` [x, y, width, height], ``categories``).

    A ``file_name`` belongs to the case whose image has this name, or whose name is left without folders, file ending
    and channel number. Crowds (``iscrowd``) are no single objects and left out.

    Args:
        file: The json.
        cases: Training cases of the dataset.
        dataset_json: Its dataset.json.
        classes: Categories to keep, in this order; None keeps all that occur.

    Raises:
        SideFileError: Lists everything that cannot be converted.
    """
    content = read_json(file, "Give a COCO json with --coco.")
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(_is_list_of_objects(content.get(part)) for part in parts):
        raise SideFileError(f"{file} is not a COCO json: it must hold the lists of objects {', '.join(parts)}.")
    problems: list[Problem] = []
    left_out: list[str] = []
    _check_coco_ids(file, content)
    name_of = _coco_names(file, content["categories"], problems)
    _check_classes(classes, list(name_of.values()))
    case_of = _coco_cases(file, content["images"], cases, dataset_json, problems, left_out)
    found: dict[str, list[Labelled]] = {case: [] for case in case_of.values() if case is not None}
    crowds = 0
    for index, annotation in enumerate(content["annotations"]):
        wrong = None
        box = _coco_box(annotation.get("bbox"))
        if annotation.get("image_id") not in case_of:
            wrong = f"image_id {annotation.get('image_id')!r} is not among the images"
        elif annotation.get("category_id") not in name_of:
            wrong = f"category_id {annotation.get('category_id')!r} is not among the categories"
        elif box is None:
            wrong = f"bbox {annotation.get('bbox')!r} is not [x, y, width, height] in numbers, with a size above 0"
        if wrong is not None:
            remedy = "Correct it, or the ids that it names, or remove the annotation."
            problems.append(Problem(str(file), f"annotations[{index}]", wrong, remedy))
            continue
        case = case_of[annotation["image_id"]]
        if annotation.get("iscrowd"):
            crowds += 1
        elif case is not None and box is not None:
            found[case].append((name_of[annotation["category_id"]], box))
    if problems:
        raise SideFileError.listing(problems)
    if crowds:
        left_out.append(f"{crowds} annotation(s) with iscrowd: these are groups, not single objects.")
    return _conversion(found, list(name_of.values()), classes, 2, left_out)


def boxes_from_nndetection(
    folder: Path,
    cases: Mapping[str, RawCase],
    dataset_json: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    min_voxels: int = 1,
    show_progress: bool = True,
) -> Conversion:
    """Read boxes from nnDetection's ``labelsTr``: CASE.nii.gz with instance numbers, CASE.json with their classes.

    Args:
        folder: The folder with both files of every case.
        cases: Training cases of the dataset.
        dataset_json: Its dataset.json.
        classes: Names of the class indices; None takes ``labels`` of nnDetection's dataset.json or dataset.yaml, in
            the folder or up to two above.
        min_voxels: Smaller instances are left out.
        show_progress: Show a bar over the cases.

    Raises:
        SideFileError: Lists everything that cannot be converted.
    """
    names = tuple(classes) if classes is not None else _nndetection_classes(folder)
    masked = {file.name.removesuffix(".nii.gz") for file in folder.glob("*.nii.gz")}
    files = [file for file in sorted(folder.glob("*.json")) if file.name != "dataset.json"]
    remedy = 'Put it there; without objects it holds {"instances": {}}.'
    problems = [
        Problem(str(folder / f"{case}.json"), "", f"the file does not exist, but {case}.nii.gz does", remedy)
        for case in sorted((masked & cases.keys()) - {file.stem for file in files})
    ]
    sizes = image_sizes(cases, dataset_json, problems, show_progress)
    found: dict[str, list[Labelled]] = {}
    small = 0
    for file in tqdm(files, "Reading instances", disable=not show_progress, leave=False):
        if file.stem not in sizes:
            continue
        classes_of = _instance_classes(file, len(names), problems)
        segmentation = file.with_suffix(".nii.gz")
        if not segmentation.is_file():
            problems.append(Problem(str(segmentation), "", "the file does not exist", f"It belongs to {file.name}."))
            continue
        size = sizes[file.stem]
        try:
            read = sitk.GetArrayFromImage(sitk.ReadImage(str(segmentation)))
        except RuntimeError as error:  # all that SimpleITK raises
            what = f"it cannot be read: {str(error).splitlines()[-1]}"
            problems.append(Problem(str(segmentation), "", what, "Save the instances again."))
            continue
        if classes_of is None:
            continue
        instances = _of_dimension(read, len(size))
        if instances.shape != size:
            what = f"its size (in array order) is {instances.shape}, that of {cases[file.stem].image} is {size}"
            problems.append(Problem(str(segmentation), "", what, "Give the instances of the same images."))
            continue
        boxes, voxels = _components(instances.astype(np.int64))
        for number in sorted(boxes.keys() ^ classes_of.keys()):
            what = f"instance {number} is in {'the image' if number in boxes else 'the json'} only"
            problems.append(Problem(str(file), f"instance {number}", what, "Correct the json or the image."))
        kept = [number for number in sorted(boxes.keys() & classes_of.keys()) if voxels[number] >= min_voxels]
        small += len(boxes) - len(kept)
        if not problems:
            found[file.stem] = [(names[classes_of[number]], boxes[number]) for number in kept]
    if problems:
        raise SideFileError.listing(problems)
    if not found:
        raise SideFileError(
            f"{folder} holds no CASE.json of a case of this dataset, for example {next(iter(cases))}.json."
        )
    left_out = _small(small, min_voxels) + _strangers([file.stem for file in files if file.stem not in cases])
    return _conversion(found, names, classes, len(next(iter(sizes.values()))), left_out)


def boxes_from_masks(
    cases: Mapping[str, RawCase],
    dataset_json: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    min_voxels: int = 1,
    show_progress: bool = True,
) -> Conversion:
    """Box every connected component of every class in the segmentations; voxels that touch at a corner are connected.

    A region is the union of its labels, so boxes of nested regions overlap.

    Args:
        cases: Training cases of the dataset.
        dataset_json: Its dataset.json.
        classes: Labels or regions to take, in this order; None takes all that occur.
        min_voxels: Smaller components are left out.
        show_progress: Show a bar over the cases.

    Raises:
        SideFileError: A class is not among the labels, there are no segmentations, or lists those that cannot be read.
    """
    space = LabelSpace.from_dataset_json(dataset_json)
    values = dict(zip(space.names, space.values, strict=True))
    available = list(space.foreground_names)
    _check_classes(classes, available)
    folders = sorted({files.segmentation.parent for files in cases.values()})
    if not any(folder.is_dir() for folder in folders):
        raise SideFileError(
            f"There is no {folders[0].name} with segmentations: {folders[0]} does not exist. Put it there, or convert "
            f"boxes with --coco or --nndetection."
        )
    problems: list[Problem] = []
    sizes = image_sizes(cases, dataset_json, problems, show_progress)
    if problems:
        raise SideFileError.listing(problems)
    dimension = len(next(iter(sizes.values())))
    reader = image_reader(dataset_json, next(iter(cases.values())).image)
    found: dict[str, list[Labelled]] = {}
    small = 0
    for case, files in tqdm(cases.items(), "Reading segmentations", disable=not show_progress, leave=False):
        try:
            segmentation = _of_dimension(reader().read_seg(str(files.segmentation))[0][0], dimension)
        except Exception as error:  # whatever a missing or broken file makes its library raise
            what = f"the segmentation cannot be read ({error})"
            problems.append(Problem(str(files.segmentation), f"case {case}", what, "Put it there or replace it."))
            continue
        found[case] = []
        for name in classes or available:
            boxes, voxels = _components(connected_components(np.isin(segmentation, values[name])))
            kept = [number for number in boxes if voxels[number] >= min_voxels]
            small += len(boxes) - len(kept)
            found[case] += [(name, boxes[number]) for number in kept]
    if problems:
        raise SideFileError.listing(problems)
    return _conversion(found, available, classes, dimension, _small(small, min_voxels))


def connected_components(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number the connected components of a mask of any dimension from 1; 0 is outside. Diagonal neighbours connect."""
    numbered, _ = ndimage.label(mask, structure=np.ones((3,) * mask.ndim), output=np.int64)
    return numbered


def detection_block(dataset_json: Mapping[str, Any], file: str, classes: Sequence[str]) -> dict[str, Any]:
    """The block ``nnunet_kd`` of a dataset.json with these boxes declared, and everything else as it was."""
    block = dict(dataset_json.get(BLOCK) or {})
    tasks = {"segmentation": True, **block.get("tasks", {})}
    block["tasks"] = {**tasks, "detection": {"file": file, "classes": list(classes)}}
    return {BLOCK: block}


def _components(numbered: NDArray[np.int64]) -> tuple[dict[int, NDArray[np.float64]], NDArray[np.int64]]:
    """Box in array order per number that occurs, 0 left out, and voxels of each number."""
    boxes = {
        number: np.array([[extent.start, extent.stop] for extent in extents], dtype=np.float64).T.ravel()
        for number, extents in enumerate(ndimage.find_objects(numbered), start=1)
        if extents is not None
    }
    return boxes, np.bincount(numbered.ravel())


def _of_dimension(array: NDArray[Any], dimension: int) -> NDArray[Any]:
    """Drop the single slice that readers put in front of 2D images."""
    return array[0] if array.ndim == dimension + 1 and array.shape[0] == 1 else array


def _conversion(
    found: Mapping[str, Sequence[Labelled]],
    available: Sequence[str],
    classes: Sequence[str] | None,
    dimension: int,
    left_out: Sequence[str],
) -> Conversion:
    occurring = {name for entries in found.values() for name, _ in entries}
    names = tuple(classes) if classes is not None else tuple(dict.fromkeys(n for n in available if n in occurring))
    boxes = {}
    for case, entries in sorted(found.items()):
        kept = [(names.index(name), box) for name, box in entries if name in names]
        boxes[case] = CaseBoxes(
            np.array([label for label, _ in kept], dtype=np.int64),
            np.array([box for _, box in kept], dtype=np.float64).reshape(-1, 2 * dimension),
        )
    others = [name for name in dict.fromkeys(available) if name not in names]
    notes = [*left_out, *([f"Class(es) {', '.join(others)}."] if others else [])]
    return Conversion(boxes, names, tuple(notes))


def _check_classes(classes: Sequence[str] | None, available: Sequence[str]) -> None:
    unknown = [name for name in classes or () if name not in available]
    if unknown:
        raise SideFileError(f"--classes {unknown[0]} does not exist. Name some of: {', '.join(available)}.")


def _small(number: int, min_voxels: int) -> list[str]:
    return [f"{number} component(s) of fewer than {min_voxels} voxels."] if number else []


def _strangers(names: Sequence[str]) -> list[str]:
    shown = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
    return [f"{len(names)} image(s) that are no training case of this dataset: {shown}."] if names else []


# --- COCO -------------------------------------------------------------------------------------------------------------
def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _check_coco_ids(file: Path, content: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Raise SideFileError with all ids that are neither numbers nor texts."""
    ids = {"images": ("id",), "categories": ("id",), "annotations": ("image_id", "category_id")}
    problems = [
        Problem(str(file), f"{part}[{index}]", f"'{key}' is {entry[key]!r}", "Write a number or a text.")
        for part, keys in ids.items()
        for index, entry in enumerate(content[part])
        for key in keys
        if not isinstance(entry.get(key), int | float | str | None)
    ]
    if problems:
        raise SideFileError.listing(problems)


def _coco_names(file: Path, categories: Sequence[Any], problems: list[Problem]) -> dict[Any, str]:
    """Category id to name."""
    name_of: dict[Any, str] = {}
    for index, category in enumerate(categories):
        name = str(category.get("name"))
        if name_of.setdefault(category.get("id"), name) != name:
            what = f"the id {category.get('id')!r} of {name} is also that of {name_of[category.get('id')]}"
            problems.append(Problem(str(file), f"categories[{index}]", what, UNIQUE_IDS))
    return name_of


def _coco_cases(
    file: Path,
    images: Sequence[Any],
    cases: Mapping[str, RawCase],
    dataset_json: Mapping[str, Any],
    problems: list[Problem],
    left_out: list[str],
) -> dict[Any, str | None]:
    """Image id to case; None where the dataset has no such case."""
    by_file = {files.image.name: case for case, files in cases.items()}

    def case_of_file(file_name: str) -> tuple[str, str | None]:
        name = re.split(r"[/\\]", file_name)[-1]
        return name, by_file.get(name) or _case_of_name(name, cases, str(dataset_json["file_ending"]))

    names = [image["file_name"] for image in images if isinstance(image.get("file_name"), str)]
    named = {case_of_file(name)[1] for name in names}
    sizes = image_sizes({case: own for case, own in cases.items() if case in named}, dataset_json, problems, False)
    case_of: dict[Any, str | None] = {}
    first_with: dict[Any, str] = {}
    first_of: dict[str, str] = {}
    strangers = []
    for index, image in enumerate(images):
        if "id" not in image or not isinstance(image.get("file_name"), str):
            problems.append(Problem(str(file), f"images[{index}]", "'id' or 'file_name' is missing", "Add it."))
            continue
        if image["id"] in first_with:
            what = f"the id {image['id']!r} of {image['file_name']} is also that of {first_with[image['id']]}"
            problems.append(Problem(str(file), f"images[{index}]", what, UNIQUE_IDS))
            continue
        first_with[image["id"]] = image["file_name"]
        name, case = case_of_file(image["file_name"])
        case_of[image["id"]] = case
        if case is None:
            strangers.append(name)
            continue
        if first_of.setdefault(case, image["file_name"]) != image["file_name"]:
            what = f"{image['file_name']} and {first_of[case]} are both the case {case}"
            problems.append(Problem(str(file), f"images[{index}]", what, "Leave one of them, or rename the files."))
            continue
        if case not in sizes:
            continue
        size = sizes[case]
        if len(size) != 2:
            raise SideFileError(f"COCO boxes are 2D, but the images of this dataset are {len(size)}D.")
        declared = (image.get("height", size[0]), image.get("width", size[1]))
        if declared != size:
            what = f"{name} is {declared[1]} x {declared[0]}, but {cases[case].image} is {size[1]} x {size[0]}"
            problems.append(Problem(str(file), f"images[{index}]", what, "Give the boxes of the same images."))
    if strangers and len(strangers) == len(images):
        raise SideFileError(
            f"None of the {len(images)} images in {file} is a training case of this dataset, for example "
            f"{strangers[0]}; a case is {next(iter(cases))}. Rename one of the two."
        )
    left_out.extend(_strangers(strangers))
    return case_of


def _case_of_name(name: str, cases: Collection[str], file_ending: str) -> str | None:
    stem = name.removesuffix(file_ending) if name.endswith(file_ending) else Path(name).stem
    for candidate in (stem, re.sub(r"_\d{4}$", "", stem)):
        if candidate in cases:
            return candidate
    return None


def _coco_box(bbox: Any) -> NDArray[np.float64] | None:
    """[y0, x0, y1, x1] of COCO's [x, y, width, height]; None if that is not what it is."""
    try:
        x, y, width, height = np.array(bbox, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    box = np.array([y, x, y + height, x + width])
    return box if np.isfinite(box).all() and width > 0 and height > 0 else None


# --- nnDetection ------------------------------------------------------------------------------------------------------
def _nndetection_classes(folder: Path) -> tuple[str, ...]:
    for parent in (folder, *folder.resolve().parents[:2]):
        for file in (parent / "dataset.json", parent / "dataset.yaml"):
            if not file.is_file():
                continue
            try:
                labels = yaml.safe_load(file.read_text(encoding="utf-8")).get("labels", {})  # reads JSON as well
                names = {int(index): str(name) for index, name in labels.items()}
            except (yaml.YAMLError, UnicodeDecodeError, AttributeError, ValueError):
                continue  # nnU-Net's own dataset.json goes from names to indices
            if sorted(names) == list(range(len(names))) and names:
                return tuple(names[index] for index in range(len(names)))
    raise SideFileError(
        f"The classes of {folder} are not known: there is no dataset.json or dataset.yaml of nnDetection with 'labels' "
        f'{{"0": NAME, ...}} in it or up to two folders above. Name them in the order of their index with --classes.'
    )


def _instance_classes(file: Path, num_classes: int, problems: list[Problem]) -> dict[int, int] | None:
    """Instance number to class index, also those that are wrong; None if the file cannot be read."""
    try:
        instances = json.loads(file.read_text(encoding="utf-8"))["instances"]
        classes = {int(number): int(index) for number, index in instances.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = f'it does not hold {{"instances": {{"1": CLASS INDEX, ...}}}} ({error!r})'
        problems.append(Problem(str(file), "", what, "Correct the file."))
        return None
    for number, index in classes.items():
        if not 0 <= index < num_classes:
            what = f"class index {index}, but there are {num_classes} classes"
            problems.append(Problem(str(file), f"instance {number}", what, "Correct it, or name all with --classes."))
    return classes
