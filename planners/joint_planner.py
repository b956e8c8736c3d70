"""The joint planner: members -> channel space, heads, joint splits and the teacher's plans. No image is copied.

The teacher adapts to its members: its topology is what the stock planner class makes of the largest member's patch, and
every member keeps its own spacing, normalisation, patch and augmentation.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_kd.data.folds import divided_groups, planned_splits
from nnunet_kd.data.joint import TASK_HEADS, HeadEntry, JointDataset, MemberEntry
from nnunet_kd.data.member import Member
from nnunet_kd.data.splits import Split, join_splits, split_key
from nnunet_kd.environment import environment
from nnunet_kd.errors import JointDatasetError
from nnunet_kd.files import write_json
from nnunet_kd.networks.multitask import Heads, multitask_architecture
from nnunet_kd.planners.existing import (
    check_joint_name,
    check_same_members,
    dataset_folder,
    in_stored_order,
    joint_plans,
    keep_configurations,
)
from nnunet_kd.planners.heads import plan_heads
from nnunet_kd.planners.members import find_planner, member_cases, planning_threads
from nnunet_kd.planners.student_planner import settings_of
from nnunet_kd.planners.tasks import teacher_heads, warn_of_folds
from nnunet_kd.settings import BLOCK
from nnunet_kd.spaces.channels import ChannelSpace, union

MIN_BATCH_SIZE = 2  # stock nnU-Net's UNet_min_batch_size; with 1, foreground oversampling would stop
ENOUGH_MEMORY_GB = 1e6
FEATURE_STEP = 4
MIN_BASE_FEATURES = 8


@dataclass(frozen=True)
class TeacherPlan:
    """The teacher's configuration and what it costs: GB per member as stock nnU-Net estimates it."""

    configuration: dict[str, Any]
    batch_sizes: dict[str, int]
    memory_gb: dict[str, float]
    largest: str


def plan_joint(
    name: str,
    members: Sequence[str],
    members_plans: str,
    configurations: Sequence[str],
    *,
    plans_name: str = "nnUNetKDPlans",
    planner: type[ExperimentPlanner] | None = None,
    gpu_memory_target: float | None = None,
    width: float = 1.0,
    shared_heads: Mapping[str, Any] | None = None,
) -> tuple[JointDataset, dict[str, TeacherPlan]]:
    """Write the joint dataset ``name`` and return its description and the teacher's plan per configuration.

    Joint plans of that name that exist already keep the order of their members, heads and channels, because a trained
    teacher's weights depend on it, their other configurations where these are still valid, and the user's settings.

    Args:
        name: Full name, for example Dataset900_Joint.
        members: Full names of prepared members.
        members_plans: The members' plans name.
        configurations: All of them must exist for every member.
        plans_name: Name of the joint plans.
        planner: Stock planner class for the teacher; None takes the one that planned the largest member.
        gpu_memory_target: GB; None takes the planner class's default.
        width: Factor on the planner's number of features.
        shared_heads: What ``read_heads`` returns.

    Raises:
        JointDatasetError: Members cannot be joined; says which and why. Nothing is written then.
        LabelSpaceError: A shared head misses a label.
    """
    check_joint_name(name, members)
    existing = joint_plans(dataset_folder(name), plans_name)
    stored = {plans: JointDataset.from_plans(content) for plans, content in existing.items()}
    order = stored.get(plans_name, next(iter(stored.values()), None))
    members = in_stored_order(members, order.members if order else ())
    views = {c: {m: Member(m, members_plans, c) for m in members} for c in configurations}
    first = views[configurations[0]]
    channels = union({m: view.channel_names for m, view in first.items()})
    heads, head_of, maps = plan_heads(first, shared_heads or {})
    if order is not None:
        channels = ChannelSpace(tuple(in_stored_order(channels.names, order.channels.names)))
        heads = {head: heads[head] for head in in_stored_order(heads, order.heads)}
    normalisation = {c: _check_normalisation(views[c]) for c in configurations}
    cases = {c: {m: member_cases(view) for m, view in views[c].items()} for c in configurations}
    own_cases = cases[configurations[0]]
    splits = {m: planned_splits(view, own_cases[m]) for m, view in first.items()}
    joint_splits = join_splits(splits, own_cases)
    plans_of = {
        c: plan_teacher(name, views[c], channels.names, heads, head_of, plans_name, planner, gpu_memory_target, width)
        for c in configurations
    }
    entries = {
        m: MemberEntry(
            plans=members_plans,
            description={"plans": view.plans, "dataset_json": view.dataset_json},
            channel_names=list(view.channel_names),
            head=head_of.get(m),
            previous_stage_labels=[int(label) for label in view.label_manager.foreground_labels],
            label_map=maps.get(m),
            batch_sizes={c: plans_of[c].batch_sizes[m] for c in configurations},
        )
        for m, view in first.items()
    }
    task_heads = {c: plan.configuration[TASK_HEADS] for c, plan in plans_of.items()}
    joint = JointDataset(name, channels, entries, heads, task_heads)
    check_same_members(joint, {plans: other for plans, other in stored.items() if plans != plans_name})
    plans, dataset_json = _joint_files(joint, views, plans_of, plans_name, normalisation)
    dataset_json["numTraining"] = sum(len(own) for own in own_cases.values())

    # everything is computed and checked; from here on files are written
    for m, view in first.items():
        if not view.splits_file.is_file():
            write_json(view.splits_file, splits[m])
            warn_of_folds(m)
    states = {m: {c: views[c][m].state(cases[c][m]) for c in configurations} for m in members}
    joint = replace(joint, members={m: replace(entry, state=states[m]) for m, entry in entries.items()})
    settings: dict[str, Any] = {}
    if plans_name in existing:
        joint = keep_configurations(joint, plans, stored[plans_name], existing[plans_name])
        settings = settings_of(existing[plans_name][BLOCK])
    plans[BLOCK] = {**settings, **joint.to_block()}
    folder = dataset_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "dataset.json", dataset_json)  # names the members, so that a half-written folder is known
    write_json(folder / "splits_final.json", joint_splits)
    write_json(folder / "dataset_fingerprint.json", _fingerprint(first))
    write_json(folder / f"{plans_name}.json", plans)
    _warn_of_divided_groups(name, joint_splits, first)
    return joint, plans_of


def _warn_of_divided_groups(name: str, joint_splits: Sequence[Split], members: Mapping[str, Member]) -> None:
    """Print which joint folds the teacher will refuse; a member with fewer folds gives random ones for the others."""
    for member, view in members.items():
        divided = []
        for fold, split in enumerate(joint_splits):
            pairs = {side: [split_key(key) for key in keys] for side, keys in split.items()}
            if divided_groups(view, {side: [case for m, case in own if m == member] for side, own in pairs.items()}):
                divided.append(str(fold))
        if divided:
            print(
                f"WARNING: fold(s) {', '.join(divided)} of {name} divide groups of {member} and cannot be trained. Add "
                f"them to {view.splits_file}, or correct them there, and run this command again."
            )


def plan_teacher(
    name: str,
    members: Mapping[str, Member],
    channel_names: Sequence[str],
    heads: Mapping[str, HeadEntry],
    head_of: Mapping[str, str],
    plans_name: str,
    planner_class: type[ExperimentPlanner] | None,
    gpu_memory_target: float | None,
    width: float,
) -> TeacherPlan:
    """The teacher's configuration: the stock planner's for the largest member's patch, within the memory target.

    The stock planner is told that there is memory enough, so that it covers the patch; then every member's batch is
    made to fit the real target: first with fewer samples, never below two, then with fewer features.

    Raises:
        JointDatasetError: Even the narrowest network does not fit.
    """
    largest = max(members, key=lambda m: (np.prod(members[m].configuration_manager.patch_size, dtype=np.int64), m))
    leader = members[largest]
    manager = leader.configuration_manager
    planner_class = planner_class or _planner_of(leader)
    with _planner(planner_class, name, channel_names, gpu_memory_target) as planner:
        architecture = _plan_architecture(planner, manager)["architecture"]
    strides = np.cumprod(np.array(architecture["arch_kwargs"]["strides"]), axis=0)  # they do not depend on the features
    task_heads = {m: teacher_heads(view, plans_name, strides[:-1].tolist()) for m, view in members.items()}
    outputs = {m: heads[head_of[m]].label_space.num_channels if m in head_of else 1 for m in members}
    with _planner(planner_class, name, channel_names, gpu_memory_target) as planner:
        target = planner.UNet_vram_target_GB
        base_features = max(MIN_BASE_FEATURES, round(planner.UNet_base_num_features * width))
        while True:
            planner.UNet_base_num_features = base_features
            planned = _plan_architecture(planner, manager)
            architecture = planned["architecture"]
            networks = {m: _with_task_heads(architecture, task_heads[m]) for m in members}
            memory = {m: _memory_gb(planner, view, networks[m], strides[-1], outputs[m]) for m, view in members.items()}
            batch_sizes = {m: _batch_size(view, memory[m], target) for m, view in members.items()}
            total = {m: memory[m] * batch_sizes[m] for m in members}
            too_large = max(total, key=lambda m: total[m])
            if total[too_large] <= target:
                break
            if base_features <= MIN_BASE_FEATURES:
                raise JointDatasetError(
                    f"A teacher that covers the patch of {too_large} needs {total[too_large]:.1f} GB for its batch of "
                    f"{batch_sizes[too_large]} even with {base_features} features, but the target is {target:g} GB. "
                    f"Raise -gpu_memory_target, plan the members with a smaller one, or leave this member out."
                )
            base_features = max(MIN_BASE_FEATURES, base_features - FEATURE_STEP)
    configuration = dict(manager.configuration)
    configuration.update(
        architecture=architecture,
        patch_size=[int(size) for size in planned["patch_size"]],
        batch_size=max(batch_sizes.values()),
    )
    configuration[TASK_HEADS] = {
        m: {"classification": classification, "detection": detection}
        for m, (classification, detection) in task_heads.items()
        if classification is not None or detection is not None
    }
    return TeacherPlan(configuration, batch_sizes, total, largest)


def _plan_architecture(planner: ExperimentPlanner, manager: ConfigurationManager) -> dict[str, Any]:
    """The stock planner's configuration that covers the patch, whatever memory it needs."""
    planner.UNet_vram_target_GB = ENOUGH_MEMORY_GB
    planned: dict[str, Any] = planner.get_plans_for_configuration(
        np.array(manager.spacing), np.array(manager.patch_size), "unused", 1.0, {}
    )
    return planned


def _with_task_heads(architecture: dict[str, Any], heads: Heads) -> dict[str, Any]:
    """The network of one member; stock where it only segments."""
    return multitask_architecture(architecture, *heads) if any(head is not None for head in heads) else architecture


def _planner_of(member: Member) -> type[ExperimentPlanner]:
    try:
        return find_planner(member.plans_manager.experiment_planner_name)
    except JointDatasetError as error:
        raise JointDatasetError(f"{member.plans_name} of {member.name}: {error}") from error


def _memory_gb(
    planner: ExperimentPlanner, member: Member, architecture: dict[str, Any], multiple: np.ndarray, num_outputs: int
) -> float:
    """Stock estimate for one sample of the member's patch, padded as the joint network pads it, in GB."""
    patch = np.array(member.configuration_manager.patch_size)
    estimate = planner.static_estimate_VRAM_usage(
        tuple(int(size) for size in -(-patch // multiple) * multiple),
        len(member.channel_names),
        num_outputs,
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
    )
    two_dimensional = len(patch) == 2
    reference = planner.UNet_reference_val_2d if two_dimensional else planner.UNet_reference_val_3d
    batch = planner.UNet_reference_val_corresp_bs_2d if two_dimensional else planner.UNet_reference_val_corresp_bs_3d
    return float(estimate) / batch / reference * planner.UNet_reference_val_corresp_GB


def _batch_size(member: Member, memory_per_sample: float, target: float) -> int:
    own = int(member.configuration_manager.batch_size)
    return max(min(own, MIN_BATCH_SIZE), min(own, int(target / memory_per_sample)))


@contextlib.contextmanager
def _planner(
    planner_class: type[ExperimentPlanner], name: str, channel_names: Sequence[str], memory: float | None
) -> Iterator[ExperimentPlanner]:
    """The stock planner on an empty stand-in dataset: it reads raw and preprocessed folders when it is constructed."""
    with tempfile.TemporaryDirectory() as folder:
        folders = {kind: str(Path(folder) / kind) for kind in ("nnUNet_raw", "nnUNet_preprocessed")}
        for path in folders.values():
            (Path(path) / name).mkdir(parents=True)
        dataset_json = {
            "channel_names": {str(i): channel for i, channel in enumerate(channel_names)},
            "labels": {"background": 0},
            "numTraining": 0,
            "file_ending": ".nii.gz",
            "dataset": {},
        }
        fingerprint = {"median_relative_size_after_cropping": 1.0}
        write_json(Path(folder) / "nnUNet_raw" / name / "dataset.json", dataset_json)
        write_json(Path(folder) / "nnUNet_preprocessed" / name / "dataset_fingerprint.json", fingerprint)
        arguments = {} if memory is None else {"gpu_memory_target_in_gb": memory}
        with environment({**folders, **planning_threads()}):
            yield planner_class(name, **arguments)


def _check_normalisation(members: Mapping[str, Member]) -> dict[str, tuple[str, bool]]:
    """Normalisation scheme and mask use per channel name; refuse members that disagree on a channel's scheme."""
    schemes: dict[str, tuple[str, bool]] = {}
    origin: dict[str, str] = {}
    for name, member in members.items():
        manager = member.configuration_manager
        own = zip(member.channel_names, manager.normalization_schemes, manager.use_mask_for_norm, strict=True)
        for channel, scheme, use_mask in own:
            if channel in schemes and schemes[channel][0] != scheme:
                raise JointDatasetError(
                    f"Channel '{channel}' is normalised by {schemes[channel][0]} in {origin[channel]} but by {scheme} "
                    f"in {name}, so it cannot be one channel of a joint teacher. Rename the channel in one "
                    f"dataset.json and plan that dataset again, or leave one of the two out."
                )
            schemes.setdefault(channel, (scheme, bool(use_mask)))
            origin.setdefault(channel, name)
    return schemes


def _joint_files(
    joint: JointDataset,
    views: Mapping[str, Mapping[str, Member]],
    plans_of: Mapping[str, TeacherPlan],
    plans_name: str,
    normalisation: Mapping[str, Mapping[str, tuple[str, bool]]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The joint plans, without our block, and the joint dataset.json, without numTraining."""
    members = views[next(iter(views))]
    leader = members[plans_of[next(iter(views))].largest]
    properties = {}
    for index, channel in enumerate(joint.channels.names):
        view = next(view for view in members.values() if channel in view.channel_names)
        own = view.plans_manager.foreground_intensity_properties_per_channel
        properties[str(index)] = own[str(view.channel_names.index(channel))]
    configurations = {}
    for c, plan in plans_of.items():
        configurations[c] = dict(plan.configuration)
        configurations[c].pop("inherits_from", None)
        configurations[c].update(
            data_identifier=f"{plans_name}_{c}",
            normalization_schemes=[normalisation[c][channel][0] for channel in joint.channels.names],
            use_mask_for_norm=[normalisation[c][channel][1] for channel in joint.channels.names],
        )
    plans = dict(leader.plans)
    plans.update(
        dataset_name=joint.name,
        plans_name=plans_name,
        configurations=configurations,
        foreground_intensity_properties_per_channel=properties,
    )
    labels: dict[str, int] = {name: index for index, name in enumerate(joint.joint_class_names)}
    if any(view.label_space.ignore is not None for view in members.values()):
        labels["ignore"] = len(labels)
    file_ending = leader.dataset_json["file_ending"]
    if len({(v.dataset_json["file_ending"], v.plans["image_reader_writer"]) for v in members.values()}) > 1:
        file_ending, plans["image_reader_writer"] = ".nii.gz", "SimpleITKIO"  # reads and writes all of them
    dataset_json = {
        "channel_names": {str(index): channel for index, channel in enumerate(joint.channels.names)},
        "labels": labels,
        "file_ending": file_ending,
        "name": joint.name,
        BLOCK: {"members": list(joint.members)},
    }
    return plans, dataset_json


def _fingerprint(members: Mapping[str, Member]) -> dict[str, Any]:
    """The members' fingerprints put together; stock training copies it beside the model for information."""
    joined: dict[str, Any] = {"spacings": [], "shapes_after_crop": [], "members": list(members)}
    for member in members.values():
        file = member.base_folder / "dataset_fingerprint.json"
        if file.is_file():
            own = json.loads(file.read_text())
            joined["spacings"] += own.get("spacings", [])
            joined["shapes_after_crop"] += own.get("shapes_after_crop", [])
    return joined
