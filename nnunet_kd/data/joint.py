"""The joint dataset: a pseudo-dataset in nnUNet_preprocessed that names its members and copies no image.

Its description lives in the block ``nnunet_kd`` of its plans file: ``members`` (dataset, plans, head, label map, state
per configuration), ``channels`` (the channel space) and ``heads`` (label space and output channels). Heads for classes
and boxes depend on the network, so they are part of each configuration: ``task_heads``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed

from nnunet_kd.data.member import Member
from nnunet_kd.data.splits import fold_cases, split_key
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import JointDatasetError
from nnunet_kd.networks.joint import Head, Route
from nnunet_kd.networks.multitask import Heads
from nnunet_kd.settings import BLOCK
from nnunet_kd.spaces.channels import ChannelSpace
from nnunet_kd.spaces.labels import LabelMap, LabelSpace, member_to_head_map

VERSION = 2
TASK_HEADS = "task_heads"  # key in a configuration: member to its "classification" and "detection" settings


@dataclass(frozen=True)
class MemberEntry:
    """A member as the joint plans know it.

    ``description``: the member's ``plans`` and ``dataset_json``, so that a trained teacher predicts and teaches where
    the member's dataset is not. ``previous_stage_labels``: foreground labels that a cascade puts into the input as
    one-hot channels. ``head``: None where the member has no segmentation.
    ``batch_sizes`` and ``state``: per configuration.
    """

    plans: str
    description: dict[str, Any]
    channel_names: list[str]
    head: str | None
    previous_stage_labels: list[int]
    label_map: dict[str, str] | None = None
    batch_sizes: dict[str, int] = field(default_factory=dict)
    state: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadEntry:
    """A head: nnU-Net's ``labels`` and ``regions_class_order`` of its label space."""

    labels: dict[str, Any]
    regions_class_order: list[int] | None = None

    @cached_property
    def label_space(self) -> LabelSpace:
        """The head's classes in the order of its output channels."""
        return LabelSpace.from_dataset_json(self.dataset_json)

    @property
    def dataset_json(self) -> dict[str, Any]:
        """The part of a dataset.json that nnU-Net's label manager reads."""
        order = {} if self.regions_class_order is None else {"regions_class_order": self.regions_class_order}
        return {"labels": self.labels, **order}


@dataclass(frozen=True)
class JointDataset:
    """Members, channel space and heads of a joint teacher.

    ``task_heads``: per configuration, the members that have classes or boxes, with the settings of these heads.
    """

    name: str
    channels: ChannelSpace
    members: dict[str, MemberEntry]
    heads: dict[str, HeadEntry]
    task_heads: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def from_plans(cls, plans: Mapping[str, Any]) -> JointDataset:
        """Read the description from the joint dataset's plans.

        Raises:
            JointDatasetError: The plans belong to no joint dataset, or to one of a newer version.
        """
        block = plans.get(BLOCK, {})
        if "members" not in block:
            raise JointDatasetError(
                f"{plans.get('plans_name')} of {plans.get('dataset_name')} does not describe a joint dataset. Make one "
                f"with: nnUNetKD_plan_and_preprocess -d ID ID ... --joint NEW_ID, then train "
                f"nnUNetTrainerKDTeacher on NEW_ID with -p nnUNetKDPlans."
            )
        if block.get("version", 0) > VERSION:
            raise JointDatasetError(
                f"The joint plans of {plans.get('dataset_name')} have version {block['version']}, this nnunet_kd reads "
                f"up to {VERSION}. Update nnunet_kd."
            )
        if block.get("version", 0) < VERSION:
            raise JointDatasetError(
                f"The joint plans of {plans.get('dataset_name')} were made by an older nnunet_kd. Run again: "
                f"nnUNetKD_plan_and_preprocess -d ID ID ... --joint {plans.get('dataset_name', '')[7:10]}"
            )
        return cls(
            name=plans["dataset_name"],
            channels=ChannelSpace(tuple(block["channels"])),
            members={name: MemberEntry(**entry) for name, entry in block["members"].items()},
            heads={name: HeadEntry(**entry) for name, entry in block["heads"].items()},
            task_heads={
                c: content[TASK_HEADS]
                for c, content in plans.get("configurations", {}).items()
                if TASK_HEADS in content
            },
        )

    def to_block(self) -> dict[str, Any]:
        """The description as plain JSON types, without ``task_heads``, which belong to the configurations."""
        return {
            "version": VERSION,
            "channels": list(self.channels.names),
            "members": {name: asdict(entry) for name, entry in self.members.items()},
            "heads": {name: asdict(entry) for name, entry in self.heads.items()},
        }

    def signature(self, configuration: str) -> dict[str, Any]:
        """What the weights of a trained network mean: equal signatures read the same channels and heads from them.

        Cases, splits and batch sizes may differ: a checkpoint records the cases that it was trained on.
        """
        return {
            "channels": list(self.channels.names),
            "heads": [[name, asdict(head)] for name, head in self.heads.items()],
            "members": [
                {
                    "name": name,
                    "head": entry.head,
                    "channel_names": list(entry.channel_names),
                    "previous_stage_labels": list(entry.previous_stage_labels),
                    "label_map": entry.label_map,
                    TASK_HEADS: self.task_heads.get(configuration, {}).get(name),
                    "tasks": Tasks.from_dataset_json(entry.description["dataset_json"]).meaning,
                    **{part: entry.state.get(configuration, {}).get(part) for part in ("plans", "dataset.json")},
                }
                for name, entry in self.members.items()
            ],
        }

    def member(self, name: str, configuration: str) -> Member:
        """The member's stock view for one configuration, as its dataset's folder is now."""
        return Member(name, self.members[name].plans, configuration)

    def recorded_member(self, name: str, configuration: str) -> Member:
        """The same as it was when the teacher was planned; nothing is read from the dataset's folder."""
        return Member(name, self.members[name].plans, configuration, self.members[name].description)

    def member_heads(self, name: str, configuration: str) -> Heads:
        """Settings of the member's heads for classification and detection in the teacher's network, None without."""
        own = self.task_heads.get(configuration, {}).get(name, {})
        return own.get("classification"), own.get("detection")

    def member_tasks(self, name: str, configuration: str) -> Tasks:
        """What the teacher learns of a member, as its dataset declared it when the teacher was planned."""
        declared = Tasks.from_dataset_json(self.members[name].description["dataset_json"])
        return declared.with_heads(*self.member_heads(name, configuration))

    @property
    def num_head_channels(self) -> int:
        """Output channels of all heads together; one at least, because nnU-Net builds no network without."""
        return max(1, sum(head.label_space.num_channels for head in self.heads.values()))

    @property
    def joint_class_names(self) -> tuple[str, ...]:
        """Classes of the joint label map (see JointUNet): background, then HEAD.CLASS."""
        names = ["background"]
        for head_name, head in self.heads.items():
            names += [f"{head_name}.{name}" for name in head.label_space.foreground_names]
        return tuple(names)

    def network_heads(self) -> list[Head]:
        """The heads with their slices of output channels."""
        return [Head(start, stop, entry.label_space.regions) for _, entry, start, stop in self._slices()]

    def routes(self, cascaded: bool) -> dict[str, Route]:
        """Input channels and output slice of every member; a cascade adds channels for the previous stage's labels."""
        slices: dict[str | None, tuple[int, int]] = {None: (0, 0)}
        slices.update({name: (start, stop) for name, _, start, stop in self._slices()})
        routes, next_channel = {}, len(self.channels.names)
        for name, entry in self.members.items():
            channels = self.channels.indices(entry.channel_names)
            if cascaded:
                added = range(next_channel, next_channel + len(entry.previous_stage_labels))
                channels, next_channel = (*channels, *added), added.stop
            routes[name] = Route(tuple(channels), *slices[entry.head])
        return routes

    def num_input_channels(self, cascaded: bool) -> int:
        """Input channels of the joint network."""
        added = sum(len(entry.previous_stage_labels) for entry in self.members.values()) if cascaded else 0
        return len(self.channels.names) + added

    def head_map(self, member: str) -> LabelMap | None:
        """The member's labels to its shared head's labels; None where the member has a head of its own."""
        entry = self.members[member]
        if entry.label_map is None or entry.head is None:
            return None
        own = self.recorded_member(member, "").label_space
        return member_to_head_map(own, self.heads[entry.head].label_space, entry.label_map)

    @property
    def splits_file(self) -> Path:
        """The joint splits, with keys MEMBER/CASE."""
        return Path(str(nnUNet_preprocessed)) / self.name / "splits_final.json"

    def split(self, member: Member, fold: int | str) -> tuple[list[str], list[str]]:
        """Training and validation cases of one member in one joint fold, by nnU-Net's rules."""
        if fold == "all":
            return fold_cases([], "all", member.identifiers)
        splits = json.loads(self.splits_file.read_text())
        if int(fold) >= len(splits):
            own = json.loads(member.splits_file.read_text()) if member.splits_file.is_file() else []
            return fold_cases(own, int(fold), member.identifiers)
        keys = splits[int(fold)]
        sides = []
        for side in ("train", "val"):
            pairs = [split_key(key) for key in keys[side]]
            sides.append([case for name, case in pairs if name == member.name])
        return sides[0], sides[1]

    def check_unchanged(self, configuration: str) -> None:
        """Raise JointDatasetError if a member was re-planned, re-preprocessed or re-split since the joint planning."""
        for name, entry in self.members.items():
            recorded, now = entry.state.get(configuration, {}), self.member(name, configuration).state()
            changed = [part for part in now if recorded.get(part) != now[part]]
            if changed:
                ids = " ".join(member[7:10] for member in self.members)
                raise JointDatasetError(
                    f"{name} changed since {self.name} was planned ({', '.join(changed)}). Run again: "
                    f"nnUNetKD_plan_and_preprocess -d {ids} --joint {self.name[7:10]} (with the flags used before)."
                )

    def _slices(self) -> Iterator[tuple[str, HeadEntry, int, int]]:
        start = 0
        for name, entry in self.heads.items():
            stop = start + entry.label_space.num_channels
            yield name, entry, start, stop
            start = stop


def changes(trained: Mapping[str, Any], plans: Mapping[str, Any], configuration: str) -> list[str]:
    """What makes a network trained under the joint plans ``trained`` mean something else under ``plans``."""
    blocks = [JointDataset.from_plans(content).signature(configuration) for content in (trained, plans)]
    changed = [part for part in blocks[0] if blocks[0][part] != blocks[1][part]]
    planned = [content["configurations"].get(configuration, {}) for content in (trained, plans)]
    architectures = [content.get("architecture") for content in planned]
    return changed + (["architecture"] if architectures[0] != architectures[1] else [])


def find_joint_datasets(member: str, plans_name: str | None = None) -> list[tuple[JointDataset, str]]:
    """All joint datasets that name ``member``, as (joint dataset, plans name), sorted.

    Args:
        member: Full dataset name.
        plans_name: Only joint datasets that hold the member under this plans file; None takes all.
    """
    found = []
    for plans_file in sorted(Path(str(nnUNet_preprocessed)).glob("Dataset*/*.json")):
        if plans_file.name in ("dataset.json", "dataset_fingerprint.json", "splits_final.json"):
            continue
        text = plans_file.read_text(errors="replace")
        if f'"{BLOCK}"' not in text:
            continue
        plans = json.loads(text)
        entry = plans.get(BLOCK, {}).get("members", {}).get(member) if isinstance(plans, dict) else None
        if entry is not None and plans_name in (None, entry["plans"]):
            found.append((JointDataset.from_plans(plans), plans_file.stem))
    return found
