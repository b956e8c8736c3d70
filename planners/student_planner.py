"""Plans for students: a member's stock plans under our name, or a smaller or otherwise set student.

Both keep the data identifiers of the plans they come from, so nothing is preprocessed again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed

from nnunet_kd.data.member import Member, read_json
from nnunet_kd.errors import JointDatasetError, SettingsError
from nnunet_kd.files import write_json
from nnunet_kd.networks.width import scale_width
from nnunet_kd.planners.tasks import with_heads
from nnunet_kd.settings import BLOCK, DESCRIPTION_KEYS, merge, parse_settings, read_user_settings

MIN_FEATURES = 8
MEMBER_PLANS = "nnUNetKDPlans"  # as nnUNetKD_plan_and_preprocess names them by default


def write_member_plans(member: str, base_plans: str, plans_name: str, joint_name: str | None) -> Path:
    """Write the member's stock plans as ``plans_name`` with our block; repeating it for another joint adds that one.

    Networks get heads for the member's classification and detection tasks. Settings that the user wrote into the block
    stay.

    Raises:
        JointDatasetError: See :func:`check_member_plans`.
    """
    existing = check_member_plans(member, base_plans, plans_name)
    plans = with_heads(Member(member, base_plans, "").plans, member, base_plans, _existing_plans(member, plans_name))
    plans["plans_name"] = plans_name
    joints = {*existing.get("member_of", []), *([] if joint_name is None else [joint_name])}
    plans[BLOCK] = {
        **merge(plans.get(BLOCK, {}), settings_of(existing)),
        "student": {**existing.get("student", {}), "base": base_plans},
        "member_of": sorted(joints),
    }
    path = _path(member, plans_name)
    write_json(path, plans)
    return path


def check_member_plans(member: str, base_plans: str, plans_name: str) -> dict[str, Any]:
    """The block of the member's existing plans of that name, empty if there are none.

    Raises:
        JointDatasetError: The plans are not ours, were made from other plans, or are those of a smaller student.
    """
    existing = _existing_block(_path(member, plans_name), base_plans)
    width = existing.get("student", {}).get("width", 1.0)
    if width != 1:
        raise JointDatasetError(
            f"{_path(member, plans_name)} are plans of a student of width {width}. Choose another -plans_name."
        )
    return existing


def plan_student(
    dataset: str,
    base_plans: str,
    plans_name: str,
    *,
    width: float = 1.0,
    min_features: int = MIN_FEATURES,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write plans of a smaller or otherwise set student for ``dataset`` (full name) and return their path.

    Args:
        dataset: Full dataset name.
        base_plans: Existing plans to start from.
        plans_name: Name of the new plans; must differ and must not contain ``__`` (nnU-Net splits folders there).
        width: Factor on the features of every stage of every configuration.
        min_features: No stage gets fewer, unless it had fewer.
        settings: Goes into the plans' ``nnunet_kd`` block.

    Raises:
        JointDatasetError: The name is taken by plans that are not ours, come from other plans or were set otherwise.
        SettingsError: A setting is unknown or out of range, or the name is not possible.
    """
    if "__" in plans_name or plans_name == base_plans:
        raise SettingsError(f"-plans_name {plans_name} is not possible: it must differ from -p and not contain '__'.")
    if settings:
        given = settings_of(settings)
        # terms may rely on a teacher that is only known when training starts
        parse_settings(merge({"teachers": {"joint": {}}}, given))
    path = _path(dataset, plans_name)
    plans = copy.deepcopy(Member(dataset, base_plans, "").plans)
    student = {"base": base_plans, "width": width, "min_features": min_features}
    block = {**merge(settings_of(plans.get(BLOCK, {})), settings_of(settings or {})), "student": student}
    existing = _existing_block(path, base_plans)
    if existing:
        _check_same_student(path, existing, block)
        if "member_of" in existing:
            block["member_of"] = existing["member_of"]
    for configuration in plans["configurations"].values():
        if "architecture" in configuration:
            configuration["architecture"] = scale_width(configuration["architecture"], width, min_features)
    # a student and its member's plans must agree on anchors to be compared with one teacher
    before = _existing_plans(dataset, plans_name) or _existing_plans(dataset, MEMBER_PLANS)
    plans = with_heads(plans, dataset, base_plans, before)
    plans["plans_name"] = plans_name
    plans[BLOCK] = block
    write_json(path, plans)
    return path


def settings_of(block: Mapping[str, Any]) -> dict[str, Any]:
    """The user's settings in the block of a plans file, without what describes the plans."""
    return {key: value for key, value in block.items() if key not in DESCRIPTION_KEYS}


def read_settings_file(path: str) -> dict[str, Any]:
    """Read ``--settings``: an object in a JSON or YAML file.

    Raises:
        SettingsError: The file is missing or holds no such object.
    """
    if not Path(path).expanduser().is_file():
        raise SettingsError(f"The file {path} (--settings) does not exist. Give a JSON or YAML file.")
    return read_user_settings(path)


def _path(dataset: str, plans_name: str) -> Path:
    return Path(str(nnUNet_preprocessed)) / dataset / f"{plans_name}.json"


def _existing_plans(dataset: str, plans_name: str) -> dict[str, Any] | None:
    path = _path(dataset, plans_name)
    return read_json(path, "Delete the broken file or choose another -plans_name.") if path.is_file() else None


def _existing_block(path: Path, base_plans: str) -> dict[str, Any]:
    """The block of our existing plans, after making sure that they are ours and come from the same plans."""
    if not path.is_file():
        return {}
    block = read_json(path, "Delete the broken file or choose another -plans_name.").get(BLOCK, {})
    base = block.get("student", {}).get("base")
    if base is None:
        raise JointDatasetError(f"{path} exists and was not made by nnunet_kd. Choose another -plans_name.")
    if base != base_plans:
        raise JointDatasetError(
            f"{path} was made from {base}, not from {base_plans}. Choose another -plans_name, so that no results mix."
        )
    return block


def _check_same_student(path: Path, existing: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to turn plans that may have been trained already into those of another student."""
    recorded = {"width": 1.0, "min_features": MIN_FEATURES, **existing["student"]}
    given = wanted["student"]
    changed = [f"{key} {recorded[key]}, now {given[key]}" for key in given if recorded[key] != given[key]]
    if settings_of(existing) != settings_of(wanted):
        changed.append(f"settings {settings_of(existing)}, now {settings_of(wanted)}")
    if changed:
        joints = existing.get("member_of", [])
        belongs = f" and belongs to {', '.join(joints)}" if joints else ""
        raise JointDatasetError(
            f"{path} exists{belongs} with another student ({'; '.join(changed)}). Choose another -plans_name."
        )
