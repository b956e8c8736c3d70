"""The heads of a joint teacher: one per member, or one that members share through label maps (``--heads``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_kd.data.joint import HeadEntry
from nnunet_kd.data.member import Member, dataset_name
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import LabelSpaceError
from nnunet_kd.spaces.labels import BACKGROUND, LabelSpace, member_to_head_map

EXAMPLE = '{"lesion": {"labels": {"background": 0, "lesion": 1}, "members": {"302": {"nodule": "lesion"}}}}'


def read_heads(path: str | None, members: Sequence[str]) -> dict[str, Any]:
    """Read and check ``--heads``; members get their full names. None has no shared heads.

    Args:
        path: A JSON file: head to ``labels`` and ``members`` (id or name to label map).
        members: Full names of all members of the joint dataset.

    Raises:
        LabelSpaceError: The file is missing, or something in it is not as it must be; says which head and what.
    """
    if path is None:
        return {}
    file = Path(path).expanduser()
    if not file.is_file():
        raise LabelSpaceError(f"The file {file} (--heads) does not exist. Give a JSON file like: {EXAMPLE}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LabelSpaceError(f"{file} (--heads) is not valid JSON: {error}. It must be like: {EXAMPLE}") from error
    if not isinstance(content, Mapping):
        raise LabelSpaceError(f"{file} (--heads) must hold one JSON object like: {EXAMPLE}")
    return {name: _checked_head(name, head, members) for name, head in content.items()}


def _checked_head(name: str, head: Any, members: Sequence[str]) -> dict[str, Any]:
    where = f"Shared head '{name}' (--heads):"
    if name in members:
        raise LabelSpaceError(f"{where} a member has this name, and so has its own head. Give this one another name.")
    if not isinstance(head, Mapping) or set(head) != {"labels", "members"}:
        raise LabelSpaceError(f"{where} it must have exactly 'labels' and 'members', like: {EXAMPLE}")
    labels, maps = head["labels"], head["members"]
    values = list(labels.values()) if isinstance(labels, Mapping) else []
    if any(type(value) is not int for value in values) or sorted(values) != list(range(max(2, len(values)))):
        raise LabelSpaceError(
            f"{where} 'labels' must name consecutive integers from 0 with at least one class, but they are "
            f"{labels!r}. Write them like: {EXAMPLE}"
        )
    if labels.get(BACKGROUND) != 0:
        raise LabelSpaceError(f"{where} 'labels' must declare \"background\": 0, but they are {labels!r}.")
    if not isinstance(maps, Mapping) or not maps:
        raise LabelSpaceError(f"{where} 'members' must name at least one member, like: {EXAMPLE}")
    named: dict[str, dict[str, str]] = {}
    for member, mapping in maps.items():
        full_name = dataset_name(member)
        if not isinstance(mapping, Mapping) or not all(isinstance(label, str) for label in mapping.values()):
            raise LabelSpaceError(
                f"{where} the label map of member {member} must be an object (member label: head label), not "
                f"{mapping!r}. Write it like: {EXAMPLE}"
            )
        if full_name in named:
            raise LabelSpaceError(f"{where} it names {full_name} twice. Leave one of the two label maps.")
        named[full_name] = dict(mapping)
    return {"labels": dict(labels), "members": named}


def plan_heads(
    members: Mapping[str, Member], shared: Mapping[str, Any]
) -> tuple[dict[str, HeadEntry], dict[str, str], dict[str, dict[str, str]]]:
    """Heads in order, the head of each member that segments, and the label maps of members with a shared head.

    Raises:
        LabelSpaceError: A shared head names something that is no member, or lacks a label of one.
    """
    heads: dict[str, HeadEntry] = {}
    head_of: dict[str, str] = {}
    maps: dict[str, dict[str, str]] = {}
    for head_name, content in shared.items():
        labels = dict(content["labels"])
        ignored = [m for m in content["members"] if m in members and members[m].label_space.ignore is not None]
        if ignored and "ignore" not in labels:
            labels["ignore"] = max(labels.values()) + 1
        heads[head_name] = HeadEntry(labels)
        for member, mapping in content["members"].items():
            if member not in members:
                raise LabelSpaceError(
                    f"Shared head '{head_name}' (--heads) names {member}, which is no member. Add it after -d, or "
                    f"take it out of the head."
                )
            if not Tasks.from_dataset_json(members[member].dataset_json).segmentation:
                raise LabelSpaceError(
                    f"Shared head '{head_name}' (--heads) names {member}, which has no segmentation. Take it out of "
                    f"the head."
                )
            if member in head_of:
                raise LabelSpaceError(
                    f"{member} is named by two shared heads, '{head_of[member]}' and '{head_name}'. Leave one."
                )
            try:
                member_to_head_map(members[member].label_space, heads[head_name].label_space, mapping)
            except LabelSpaceError as error:
                raise LabelSpaceError(f"Shared head '{head_name}', member {member}: {error}") from error
            head_of[member], maps[member] = head_name, dict(mapping)
    for name, member in members.items():
        if name not in head_of and Tasks.from_dataset_json(member.dataset_json).segmentation:
            heads[name] = HeadEntry(member.dataset_json["labels"], member.dataset_json.get("regions_class_order"))
            _ = LabelSpace.from_dataset_json(member.dataset_json)  # refuse a broken label space now
            head_of[name] = name
    return heads, head_of, maps
