"""Datasets with classification or detection: side files, stand-in segmentations, heads in the plans."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from numpy.typing import NDArray
from tqdm import tqdm

from nnunet_kd.data.box_geometry import clip, to_preprocessed
from nnunet_kd.data.folds import planned_splits
from nnunet_kd.data.member import Member, read_json
from nnunet_kd.data.side_files import SideFileError, read_boxes, side_file
from nnunet_kd.data.tasks import TaskError, Tasks
from nnunet_kd.data.verify import FOLD_REMEDIES, REPAIR_MASKS, TURNING_READERS, planned_dimension, verify_dataset
from nnunet_kd.environment import environment
from nnunet_kd.files import replacing, write_json
from nnunet_kd.networks.multitask import Heads, multitask_architecture, planned_heads
from nnunet_kd.planners.members import is_preprocessed, member_cases
from nnunet_kd.settings import BLOCK
from nnunet_kd.tasks.detection_plan import neighbour_overlaps, plan_detection

STAND_IN_LABELS = {"background": 0, "whole_image": 1}


def declared_tasks(names: Sequence[str]) -> dict[str, Tasks]:
    """The tasks that datasets declare in their dataset.json, the raw one first, by full name.

    Raises:
        JointDatasetError: There is no dataset.json.
        SideFileError: Tasks are declared in a form that is not allowed; lists all that is wrong with the datasets.
    """
    tasks = {}
    for name in names:
        raw = Path(str(nnUNet_raw)) / name if nnUNet_raw.is_set() else None
        folder = raw if raw is not None and (raw / "dataset.json").is_file() else Path(str(nnUNet_preprocessed)) / name
        remedy = "Put a correct dataset.json there, or check the dataset's id."
        content = read_json(folder / "dataset.json", remedy)
        with suppress(TaskError):
            if isinstance(content, dict):
                tasks[name] = Tasks.from_dataset_json(content)
    if len(tasks) < len(set(names)):
        _refuse_problems(names)
    return tasks


def prepare_side_files(tasks: Mapping[str, Tasks], *, needs_masks: bool = True) -> None:
    """Check the side files of datasets and copy them beside their plans, where training reads them.

    Args:
        tasks: What each dataset declares, by its full name.
        needs_masks: Whether segmentations that are declared must be there.

    Raises:
        SideFileError: Lists everything that is wrong in them; nothing is written then.
    """
    with_files = [name for name, own in tasks.items() if _has_side_files(own)]
    _refuse_problems(with_files, () if needs_masks else (REPAIR_MASKS,))
    for name in tasks:
        _refresh_declaration(name)
    for name in with_files:
        _copy_side_files(name, tasks[name])


def _refuse_problems(names: Sequence[str], ignored: Sequence[str] = ()) -> None:
    """Raise SideFileError with all that is wrong with these datasets; what is wrong with single folds is printed.

    Args:
        names: Full names.
        ignored: Remedies of problems that are none here.
    """
    reports = [verify_dataset(name, show_progress=False, check_copies=False) for name in names]
    problems = [problem for report in reports for problem in report.problems if problem.remedy not in ignored]
    fatal = [problem for problem in problems if problem.remedy not in FOLD_REMEDIES]
    if fatal:
        raise SideFileError.listing(fatal)
    for problem in problems:
        print(f"WARNING: {problem}")
    for report in reports:
        for note in report.notes:
            print(f"WARNING: {report.dataset}: {note}")


def _has_side_files(tasks: Tasks) -> bool:
    return not tasks.is_segmentation_only or tasks.split_by is not None


def _copy_side_files(name: str, tasks: Tasks) -> None:
    folder = Path(str(nnUNet_preprocessed)) / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in _side_file_names(tasks):
        source = Path(str(nnUNet_raw)) / name / file if nnUNet_raw.is_set() else None
        if source is not None and source.is_file():
            with replacing(folder / file) as temporary:
                shutil.copyfile(source, temporary)


def _refresh_declaration(name: str) -> None:
    """Bring our block of the preprocessed dataset.json up to the raw one; nnU-Net copies it only when it plans."""
    raw = Path(str(nnUNet_raw)) / name / "dataset.json" if nnUNet_raw.is_set() else None
    copied = Path(str(nnUNet_preprocessed)) / name / "dataset.json"
    if raw is None or not raw.is_file() or not copied.is_file():
        return
    declared, content = (read_json(file, "Correct the file.") for file in (raw, copied))
    if content.get(BLOCK) != declared.get(BLOCK):
        content.pop(BLOCK, None)
        write_json(copied, {**content, **({BLOCK: declared[BLOCK]} if BLOCK in declared else {})})


def _side_file_names(tasks: Tasks) -> list[str]:
    names = [target.file for target in tasks.classification]
    names += [tasks.detection.file] if tasks.detection is not None else []
    names += [tasks.groups_file] if tasks.split_by is not None else []
    return list(dict.fromkeys(names))


@contextmanager
def stand_in_segmentations(name: str, tasks: Tasks) -> Iterator[None]:
    """Within the block, stock nnU-Net finds a dataset without segmentations with a stand-in for each.

    nnU-Net cannot plan or preprocess without ``labelsTr``, and what lies there is not looked at. The stand-ins (the
    whole image is one class) lie in our folder in nnUNet_preprocessed and nothing is written into nnUNet_raw; images
    are named, not copied.
    """
    raw = Path(str(nnUNet_raw)) / name if nnUNet_raw.is_set() else None
    if tasks.segmentation or raw is None or not (raw / "imagesTr").is_dir():
        yield
        return
    root = Path(str(nnUNet_preprocessed)) / name / "nnunet_kd_stand_in"
    folder = root / name
    (folder / "labelsTr").mkdir(parents=True, exist_ok=True)
    dataset_json = read_json(raw / "dataset.json", "Correct the file.")
    dataset_json = {**dataset_json, "labels": STAND_IN_LABELS}
    ending = dataset_json["file_ending"]
    images = {
        case: content["images"]
        for case, content in get_filenames_of_train_images_and_targets(str(raw), dataset_json).items()
    }
    for case, files in tqdm(images.items(), desc=f"{name}: stand-in segmentations"):
        file = folder / "labelsTr" / f"{case}{ending}"
        if not file.is_file():
            reader = determine_reader_writer_from_dataset_json(dataset_json, files[0], verbose=False)()
            image, properties = reader.read_images(files)
            with replacing(file) as temporary:
                named = temporary.with_name(f"{temporary.stem}{ending}")  # writers choose the format by the ending
                reader.write_seg(np.ones(image.shape[1:], dtype=np.uint8), str(named), properties)
                named.replace(temporary)
    dataset_json["dataset"] = {
        case: {
            "images": [str(Path(file).resolve()) for file in files],
            "label": str(folder / "labelsTr" / f"{case}{ending}"),
        }
        for case, files in images.items()
    }
    write_json(folder / "dataset.json", dataset_json)
    with environment({"nnUNet_raw": str(root)}):
        yield


def with_heads(
    plans: Mapping[str, Any], member: str, base_plans: str, existing: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The plans with heads for the member's tasks in the network of every configuration.

    Args:
        plans: Plans whose networks segment only.
        member: Full dataset name.
        base_plans: The plans under which the member is preprocessed.
        existing: Plans of the same name that are there already: their heads stay where they are for the same targets
            and classes, because trained models and the user's changes depend on them.

    Returns:
        A copy; unchanged where segmentation is the dataset's only task. Boxes get no head before the dataset is
        preprocessed, or in a configuration of another dimension; both is said.
    """
    planned: dict[str, Any] = copy.deepcopy(dict(plans))
    segmentation = Tasks.from_dataset_json(Member(member, base_plans, "").dataset_json).segmentation
    for name, configuration in planned["configurations"].items():
        if "architecture" in configuration:
            heads = member_heads(Member(member, base_plans, name), _heads(existing, name))
            if any(heads):
                architecture = multitask_architecture(configuration["architecture"], *heads, segmentation)
                configuration["architecture"] = architecture
    return planned


def member_heads(member: Member, before: Heads = (None, None)) -> Heads:
    """Heads for the tasks of a dataset in the network of one configuration.

    Args:
        member: The dataset under the plans that it is preprocessed with.
        before: Existing heads, which stay where they are for the same targets and classes.
    """
    tasks = Tasks.from_dataset_json(member.dataset_json)
    classification = None
    if tasks.classification:
        classification = {"targets": [[target.name, len(target.classes)] for target in tasks.classification]}
        if (before[0] or {}).get("targets") == classification["targets"]:
            classification = before[0]
    detection = None
    if tasks.detection is not None:
        strides = np.cumprod(np.array(member.configuration_manager.pool_op_kernel_sizes), axis=0)[:-1].tolist()
        same_classes = (before[1] or {}).get("classes") == list(tasks.detection.classes)
        if same_classes and _has_levels(before[1], strides):
            detection = before[1]
        elif _can_detect(member):
            detection = _detection(member, tasks, strides)
    return classification, detection


def teacher_heads(member: Member, plans_name: str, strides: Sequence[Sequence[int]]) -> Heads:
    """A member's heads in the network of a joint teacher.

    Boxes get the anchors of the member's own plans, because student and teacher are compared anchor by anchor; only
    where the teacher's decoder has not their strides are they planned for the teacher.

    Args:
        member: The member under the plans that it is preprocessed with.
        plans_name: The plans that its students train with.
        strides: Of the teacher's decoder, finest first.
    """
    file = member.base_folder / f"{plans_name}.json"
    existing = read_json(file, "Delete the broken file or choose another -plans_name.") if file.is_file() else None
    classification, detection = member_heads(member, _heads(existing, member.configuration))
    if detection is not None and not _has_levels(detection, strides):
        detection = _detection(member, Tasks.from_dataset_json(member.dataset_json), strides)
        print(
            f"INFO: the joint teacher's decoder has not the strides of {member.name} in {member.configuration}, so its "
            f"boxes get anchors of their own there: the teacher learns them, but cannot teach boxes."
        )
    return classification, detection


def _has_levels(detection: Mapping[str, Any] | None, strides: Sequence[Sequence[int]]) -> bool:
    """Whether a decoder of these strides has the levels of a detection head."""
    return detection is not None and all(list(stride) in list(map(list, strides)) for stride in detection["strides"])


def _detection(member: Member, tasks: Tasks, strides: Sequence[Sequence[int]]) -> dict[str, Any]:
    assert tasks.detection is not None
    patch_size = member.configuration_manager.patch_size
    sizes, overlaps = _box_sizes(member, tasks)
    return plan_detection(sizes, strides, patch_size, tasks.detection.classes, overlaps=overlaps).to_dict()


def _heads(plans: Mapping[str, Any] | None, configuration: str) -> Heads:
    """Classification and detection head that plans have in a configuration."""
    content = {} if plans is None else plans.get("configurations", {}).get(configuration, {})
    heads = planned_heads(content["architecture"]) if "architecture" in content else None
    return heads or (None, None)


def _can_detect(member: Member) -> bool:
    """Whether boxes can be planned for: of the configuration's dimension, on preprocessed images."""
    _refuse_other_axes(member)
    if len(member.configuration_manager.patch_size) == 2 and not _is_two_dimensional(member):
        print(f"INFO: {member.name} has boxes of volumes, which its 2d configuration cannot detect; it goes without.")
        return False
    if not is_preprocessed(member):
        print(
            f"INFO: {member.name} is not preprocessed for {member.configuration}, so no head for its boxes is planned "
            f"there. Run this command again without --no_pp, or with this configuration after -c."
        )
        return False
    return True


def _refuse_other_axes(member: Member) -> None:
    """Raise NotImplementedError where the boxes of the stored images are not those of the preprocessed ones."""
    if issubclass(member.plans_manager.image_reader_writer_class, TURNING_READERS):
        reader = member.plans_manager.image_reader_writer_class.__name__
        raise NotImplementedError(
            f"{member.name} is planned with {reader}, which turns images, but boxes are in the axes of the stored "
            f"image. Name another reader in dataset.json, move {member.base_folder} away, and plan again."
        )
    dimension = planned_dimension(member.name)
    if dimension is None or (dimension == 2) == _is_two_dimensional(member):
        return
    if dimension == 2:
        why = "all of them are single slices. Give them a spacing across the slice that is larger than within (as 999)"
    else:
        why = "some of them are volumes. Boxes need single slices or volumes alone: divide the dataset"
    raise NotImplementedError(
        f"nnU-Net has planned {member.name} as {5 - dimension}D images, but {why}, move {member.base_folder} away, and "
        f"plan again."
    )


def _is_two_dimensional(member: Member) -> bool:
    """Whether the images are; stock plans of 2D datasets have no 3D configuration."""
    return "3d_fullres" not in member.plans["configurations"]


def _box_sizes(member: Member, tasks: Tasks) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lengths [N, dim] in preprocessed voxels of all boxes of the dataset, and their overlaps with neighbours [N]."""
    assert tasks.detection is not None
    dimension = len(member.configuration_manager.patch_size)
    boxes = read_boxes(side_file(member.name, tasks.detection.file), tasks.detection, dimension)
    sizes: list[NDArray[np.float64]] = []
    overlaps: list[NDArray[np.float64]] = []
    data = member.dataset_class(str(member.data_folder), list(member.identifiers))
    for case in member.identifiers:
        if case not in boxes or not len(boxes[case].boxes):
            continue
        properties = load_pickle(str(member.data_folder / f"{case}.pkl"))
        shape = data.load_case(case)[0].shape[1:]
        own = to_preprocessed(boxes[case].boxes, properties, member.plans_manager.transpose_forward, shape)
        own = clip(own, shape[-dimension:])
        lengths = own[:, dimension:] - own[:, :dimension]
        visible = (lengths > 0).all(1)
        sizes.append(lengths[visible])
        overlaps.append(neighbour_overlaps(own[visible], boxes[case].labels[visible]))
    return np.concatenate([np.zeros((0, dimension)), *sizes]), np.concatenate([np.zeros(0), *overlaps])


def write_splits(member: Member) -> None:
    """Write the splits_final.json of a member with tasks or groups, which stock training would not look at."""
    tasks = Tasks.from_dataset_json(member.dataset_json)
    if not _has_side_files(tasks):
        return
    if not member.splits_file.is_file():
        write_json(member.splits_file, planned_splits(member, member_cases(member)))
        warn_of_folds(member.name)


def warn_of_folds(name: str) -> None:
    """Print what folds, which have just been made, can neither teach nor score."""
    for problem in verify_dataset(name, show_progress=False, check_copies=False).problems:
        if problem.remedy in FOLD_REMEDIES:
            print(f"WARNING: {problem}")
