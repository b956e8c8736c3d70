"""Plans and data for adapting from a labelled source to an unlabelled target (our design).

The source's own stock plans get a task-code network and the domains; images of another dataset are preprocessed with
these plans, as prediction would do it. The target's masks are not looked at: a copy waits for the final evaluation.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from tqdm import tqdm

from nnunet_kd.data.add_unlabeled import add_unlabeled, added_cases
from nnunet_kd.data.domains import (
    REFERENCES,
    domain_cases,
    refuse_shared_cases,
    target_collection,
    target_folder,
    target_name,
)
from nnunet_kd.data.folds import planned_splits
from nnunet_kd.data.image_headers import read_header
from nnunet_kd.data.member import Member, read_json
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import AdaptationError, JointDatasetError
from nnunet_kd.files import replacing, write_json
from nnunet_kd.networks.task_codes import task_code_architecture
from nnunet_kd.networks.width import scale_width
from nnunet_kd.planners.members import StockSteps, member_cases, prepare_member
from nnunet_kd.planners.student_planner import MIN_FEATURES
from nnunet_kd.planners.tasks import declared_tasks, prepare_side_files, write_splits
from nnunet_kd.settings import BLOCK, Adaptation, Domain
from nnunet_kd.spaces.channels import channel_names

MAX_SIZE_RATIO = 2.0  # of the images' mean sides: beyond, the structures of one domain are of another scale
NUM_MEASURED = 20  # images


def prepare_source(source: str, steps: StockSteps, configurations: Sequence[str], preprocess: bool) -> None:
    """Stock fingerprint, plans, splits and preprocessing of the source, where it lacks them.

    Raises:
        AdaptationError: The source has no masks.
        JointDatasetError: Its plans have no such configuration.
        NotImplementedError: A configuration is the second stage of a cascade.
    """
    tasks = declared_tasks([source])
    if not tasks[source].segmentation:
        raise AdaptationError(
            f"The source {source} has no masks (tasks.segmentation is false in its dataset.json), so there is nothing "
            f"to adapt. Name a dataset with segmentations after -source."
        )
    prepare_side_files(tasks)
    prepare_member(source, steps, ())
    members = [Member(source, steps.plans_name, configuration) for configuration in configurations]
    if any(member.configuration_manager.previous_stage_name is not None for member in members):
        raise NotImplementedError("AdaIN is not supported in the second stage of a cascade. Plan 3d_lowres instead.")
    if preprocess:
        stock = StockSteps(steps.planner, steps.plans_name, num_processes=steps.num_processes)
        prepare_member(source, stock, configurations)
    write_splits(members[0])


def prepare_target(
    source: str,
    target: str,
    plans_name: str,
    configurations: Sequence[str],
    num_processes: int | None,
    any_size: bool,
) -> int:
    """Preprocess the training images of another dataset with the source's plans; returns how many there are.

    Also keeps the target's dataset.json, side files and splits, and, where its labels are the source's, its masks.

    Raises:
        AdaptationError: The target has other channels or sizes, or no images.
        UnlabeledError: Images cannot be preprocessed (lists all problems), or are copies of the source's.
    """
    folder = target_folder(source, target)
    raw = Path(str(nnUNet_raw)) / target
    members = [Member(source, plans_name, configuration) for configuration in configurations]
    collection = target_collection(target)
    is_prepared = (folder / "dataset.json").is_file() and all(added_cases(member, collection) for member in members)
    if is_prepared and not (raw / "dataset.json").is_file():
        print(f"INFO: {raw} is not there; what was prepared of {target} before is taken as it is.")
        return len(added_cases(members[0], collection))
    dataset_json = read_json(raw / "dataset.json", "The target's images are needed. Put the dataset there.")
    own, others = members[0].channel_names, channel_names(dataset_json)
    if own != others:
        raise AdaptationError(
            f"The target {target} has the channels {', '.join(others)}, the source {source} has {', '.join(own)}. Both "
            f"domains go through one network. Name a target with the same channels, in the same order (correct the "
            f"names in its dataset.json if they only differ in spelling)."
        )
    images = raw / "imagesTr"
    if not images.is_dir() or not any(images.iterdir()):
        raise AdaptationError(f"The target {target} has no images in {images}. Put them there.")
    if not any_size:
        _refuse_other_sizes(members[0], target, images)
    prepare_side_files({target: Tasks.from_dataset_json(dataset_json)}, needs_masks=False)
    add_unlabeled(members, images, num_processes, collection=collection)
    cases = added_cases(members[0], collection)
    view = Member(target, plans_name, configurations[0], {"plans": members[0].plans, "dataset_json": dataset_json})
    view.base_folder.mkdir(parents=True, exist_ok=True)
    if not view.splits_file.is_file():  # then the target's own trainings have the same folds
        write_json(view.splits_file, planned_splits(view, cases))
    unused = set(cases) - {case for split in planned_splits(view, cases) for side in split.values() for case in side}
    if unused:
        print(
            f"INFO: {len(unused)} images of {target} are in no fold of {view.splits_file} and will not be used. "
            f"Correct that file to use them."
        )
    write_json(folder / "dataset.json", dataset_json)
    _keep_references(source, target, raw / "labelsTr", cases, dataset_json)
    return len(cases)


def _refuse_other_sizes(member: Member, target: str, images: Path) -> None:
    """Raise AdaptationError where the target's images are of another scale; some of them are measured."""
    reader, ending = member.plans_manager.image_reader_writer_class, member.dataset_json["file_ending"]
    files = sorted(images.glob(f"*_0000{ending}"))
    chosen = files[:: max(1, len(files) // NUM_MEASURED)]
    if not chosen:
        return  # add_unlabeled says why
    headers = [read_header(file, reader) for file in chosen]
    sides = [_mean_side(header.size, header.spacing[-len(header.size) :]) for header in headers]
    manager = member.plans_manager
    own = _mean_side(manager.plans["original_median_shape_after_transp"], manager.original_median_spacing_after_transp)
    ratio = float(np.median(sides)) / own
    if not 1 / MAX_SIZE_RATIO <= ratio <= MAX_SIZE_RATIO:
        raise AdaptationError(
            f"The images of the target {target} have {ratio:.2g} times the size of those of the source {member.name} "
            f"(mean side {np.median(sides):.4g} and {own:.4g}, in the unit of their spacing), so the same structure is "
            f"of another scale. Resample them to the source's scale, or give --any_size if they are meant so."
        )


def _mean_side(size: Sequence[float], spacing: Sequence[float]) -> float:
    """Geometric mean of an image's sides, without axes of one voxel (2D)."""
    return float(np.exp(np.mean([np.log(n * step) for n, step in zip(size, spacing, strict=True) if n > 1])))


def _keep_references(
    source: str, target: str, masks: Path, cases: Sequence[str], dataset_json: Mapping[str, Any]
) -> None:
    """Copy the target's masks, as stock preprocessing does for the final validation."""
    own = Member(source, "", "").dataset_json["labels"]
    if not Tasks.from_dataset_json(dataset_json).segmentation or not masks.is_dir():
        print(f"INFO: {target} has no masks, so its held-back cases will not be evaluated.")
        return
    if dataset_json["labels"] != own:
        print(
            f"INFO: {target} has the labels {dataset_json['labels']}, {source} has {own}: the target will be predicted "
            f"in the source's labels, and its held-back cases not evaluated."
        )
        return
    folder = target_folder(source, target) / REFERENCES
    folder.mkdir(parents=True, exist_ok=True)
    for case in tqdm(cases, desc="Masks for the final evaluation"):
        name = f"{case}{dataset_json['file_ending']}"
        if (masks / name).is_file() and not _is_copied(masks / name, folder / name):
            with replacing(folder / name) as temporary:
                shutil.copyfile(masks / name, temporary)


def _is_copied(mask: Path, copy_of_it: Path) -> bool:
    """Whether a copy is there and not older than its original, which may have been corrected."""
    return copy_of_it.is_file() and copy_of_it.stat().st_mtime >= mask.stat().st_mtime


def write_adaptation_plans(
    source: str,
    settings: Adaptation,
    base_plans: str,
    plans_name: str,
    configurations: Sequence[str],
    width: float,
) -> Path:
    """Write the source's plans with a task-code network and the domains in our block; returns their path.

    Raises:
        JointDatasetError: Plans of this name exist that are others: trained models may depend on them.
    """
    path = Path(str(nnUNet_preprocessed)) / source / f"{plans_name}.json"
    plans = copy.deepcopy(Member(source, base_plans, "").plans)
    for name in configurations:
        configuration = plans["configurations"][name]
        whole = Member(source, base_plans, name).configuration_manager.configuration["architecture"]
        configuration["architecture"] = scale_width(
            task_code_architecture(whole, settings.network or "stargan"), width, MIN_FEATURES
        )
    domains = {
        name: {key: value for key, value in asdict(domain).items() if value is not None}
        for name, domain in (("source", settings.source), ("target", settings.target))
    }
    plans["configurations"] = {name: plans["configurations"][name] for name in _with_parents(plans, configurations)}
    for configuration in plans["configurations"].values():
        configuration.pop("next_stage", None)  # stock validation would predict for a cascade that is not planned here
    plans["plans_name"] = plans_name
    plans[BLOCK] = {
        "student": {"base": base_plans},
        "adaptation": {**domains, "network": settings.network or "stargan"},
    }
    if path.is_file():
        existing = read_json(path, "Delete the broken file or choose another -plans_name.")
        plans = _with_existing(path, existing, plans)
    write_json(path, plans)
    return path


def _with_parents(plans: Mapping[str, Any], configurations: Sequence[str]) -> list[str]:
    """The configurations and those that they inherit from, in the order of the plans."""
    wanted = set()
    for name in configurations:
        current: str | None = name
        while current is not None:
            wanted.add(current)
            current = plans["configurations"][current].get("inherits_from")
    return [name for name in plans["configurations"] if name in wanted]


def _with_existing(path: Path, existing: dict[str, Any], plans: dict[str, Any]) -> dict[str, Any]:
    """Keep other configurations and the user's settings of plans for the same adaptation; refuse all others."""
    block = existing.get(BLOCK, {})
    own = block.get("adaptation", {})
    same = {key: own.get(key) for key in ("source", "target", "network")} == plans[BLOCK]["adaptation"]
    shared = [name for name in plans["configurations"] if name in existing["configurations"]]
    changed = [name for name in shared if existing["configurations"][name] != plans["configurations"][name]]
    if not same or changed or block.get("student", {}).get("base") != plans[BLOCK]["student"]["base"]:
        what = f"other settings of {', '.join(changed)}" if same and changed else "something else"
        raise JointDatasetError(
            f"{path} exists and plans {what}: models may have been trained with it. Choose another -plans_name."
        )
    return {**existing, "configurations": {**existing["configurations"], **plans["configurations"]}}


def check_domains(source: str, settings: Adaptation, base_plans: str, configuration: str) -> tuple[int, int]:
    """Numbers of cases of source and target.

    Raises:
        AdaptationError: A domain is empty, or both hold the same cases.
    """
    member = Member(source, base_plans, configuration)
    target = target_name(source, settings)
    target_json, target_cases = member.dataset_json, member_cases(member)
    if target != source:
        target_json = read_json(target_folder(source, target) / "dataset.json", "Plan the adaptation again.")
        target_cases = tuple(added_cases(member, target_collection(target)))

    if target == source:
        refuse_shared_cases(member, settings, member_cases(member))

    def count(name: str, dataset: str, dataset_json: Mapping[str, Any], domain: Domain, cases: Sequence[str]) -> int:
        own = domain_cases(dataset, dataset_json, domain, cases)
        if not own:
            raise AdaptationError(f"The {name} of the adaptation is empty: no case of {dataset} belongs to it.")
        return len(own)

    return (
        count("source", source, member.dataset_json, settings.source, member_cases(member)),
        count("target", target, target_json, settings.target, target_cases),
    )
