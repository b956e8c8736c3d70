"""Plans for students: a member's stock plans under our name, or a smaller or otherwise set student.

Both keep the data identifiers of the plans they come from, so nothing is preprocessed again.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed

from nnunet_kd.data.member import Member, read_json
from nnunet_kd.errors import JointDatasetError, SettingsError
from nnunet_kd.files import write_json
from nnunet_kd.networks.width import scale_width
from nnunet_kd.settings import BLOCK, merge, parse_settings


def write_member_plans(member: str, base_plans: str, plans_name: str, joint_name: str) -> Path:
    """Write the member's stock plans as ``plans_name`` with our block; repeating it for another joint adds that one.

    Raises:
        JointDatasetError: A file of that name exists and is not ours, or was made from other plans.
    """
    path = Path(str(nnUNet_preprocessed)) / member / f"{plans_name}.json"
    plans = copy.deepcopy(Member(member, base_plans, "").plans)
    joints = [joint_name]
    if path.is_file():
        existing = _existing_block(path, base_plans)
        joints = sorted({*existing.get("member_of", []), joint_name})
    plans["plans_name"] = plans_name
    plans[BLOCK] = merge(plans.get(BLOCK, {}), {"student": {"base": base_plans}, "member_of": joints})
    write_json(path, plans)
    return path


def plan_student(
    dataset: str,
    base_plans: str,
    plans_name: str,
    *,
    width: float = 1.0,
    min_features: int = 8,
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
        JointDatasetError: The name is taken by plans that are not ours or that come from other plans.
        SettingsError: A setting is unknown or out of range, or the name is not possible.
    """
    if "__" in plans_name or plans_name == base_plans:
        raise SettingsError(f"-plans_name {plans_name} is not possible: it must differ from -p and not contain '__'.")
    if settings:
        given = dict(settings)
        # terms may rely on a teacher that is only known when training starts
        parse_settings(merge({"teachers": {"joint": {}}}, given))
    path = Path(str(nnUNet_preprocessed)) / dataset / f"{plans_name}.json"
    plans = copy.deepcopy(Member(dataset, base_plans, "").plans)
    if path.is_file():
        _existing_block(path, base_plans)
    for configuration in plans["configurations"].values():
        if "architecture" in configuration:
            configuration["architecture"] = scale_width(configuration["architecture"], width, min_features)
    plans["plans_name"] = plans_name
    student = {"base": base_plans, "width": width, "min_features": min_features}
    plans[BLOCK] = merge(merge(plans.get(BLOCK, {}), settings or {}), {"student": student})
    write_json(path, plans)
    return path


def _existing_block(path: Path, base_plans: str) -> dict[str, Any]:
    """The block of our existing plans, after making sure that they are ours and come from the same plans."""
    block = read_json(path, "Delete the broken file or choose another -plans_name.").get(BLOCK, {})
    base = block.get("student", {}).get("base")
    if base is None:
        raise JointDatasetError(f"{path} exists and was not made by nnunet_kd. Choose another -plans_name.")
    if base != base_plans:
        raise JointDatasetError(
            f"{path} was made from {base}, not from {base_plans}. Choose another -plans_name, so that no results mix."
        )
    return block


def read_settings_file(path: str) -> dict[str, Any]:
    """Read ``--settings`` or ``--heads``: a JSON object in a file.

    Raises:
        SettingsError: The file is missing or holds no JSON object.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise SettingsError(f"The file {file} does not exist.")
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise SettingsError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{file} must hold a JSON object.")
    return content.get(BLOCK, content)
