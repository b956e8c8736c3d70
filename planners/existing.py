"""What is there already: joint plans that are planned again, and trained models that depend on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from nnunet_kd.data.joint import VERSION, JointDataset, changes
from nnunet_kd.data.member import read_json
from nnunet_kd.errors import JointDatasetError
from nnunet_kd.settings import BLOCK


def check_joint_name(name: str, members: Sequence[str]) -> None:
    """Refuse a joint dataset ``name`` that is another dataset, and members that cannot be joined under it.

    Raises:
        JointDatasetError: Says which name is taken, or which member is named wrongly.
    """
    if name in members or name[7:10] in {member[7:10] for member in members}:
        raise JointDatasetError(f"{name} cannot be its own member. Give --joint an id that no dataset has.")
    if len(members) < 2:
        raise JointDatasetError("A joint dataset needs at least two members. Give several ids after -d.")
    if len(set(members)) < len(members):
        raise JointDatasetError(f"A member is named twice after -d: {', '.join(members)}.")
    for member in members:
        if _is_joint(dataset_folder(member)):
            raise JointDatasetError(f"{member} is a joint dataset and cannot be a member. Give its members after -d.")
    others = sorted(str(found) for found in find_candidate_datasets(int(name[7:10])) if str(found) != name)
    if others:
        raise JointDatasetError(f"The id {name[7:10]} belongs to {', '.join(others)}. Give --joint another id.")
    folder = dataset_folder(name)
    raw = Path(str(nnUNet_raw)) / name
    # names that begin with a dot are what a killed run leaves of a file that it was writing
    in_use = folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir())
    if raw.is_dir() or (in_use and not _is_joint(folder)):
        raise JointDatasetError(
            f"{name} is a dataset that is not a joint one ({raw if raw.is_dir() else folder}). Give --joint another id."
        )


def dataset_folder(name: str) -> Path:
    """The dataset's folder in nnUNet_preprocessed."""
    return Path(str(nnUNet_preprocessed)) / name


def joint_plans(folder: Path, plans_name: str) -> dict[str, dict[str, Any]]:
    """All joint plans in ``folder`` by their name, but those of an older nnunet_kd, which are planned anew.

    Raises:
        JointDatasetError: ``plans_name`` is there but broken; writing it anew would lose the user's settings in it.
    """
    file = folder / f"{plans_name}.json"
    if file.is_file():
        read_json(file, "Correct or delete the file.")
    plans = {name: content for name, content in _contents_with_block(folder).items() if "configurations" in content}
    return {name: content for name, content in plans.items() if content[BLOCK].get("version", 0) >= VERSION}


def in_stored_order(names: Iterable[str], stored: Iterable[str]) -> list[str]:
    """``names`` in the order in which they are stored, new ones behind them."""
    names = list(names)
    known = [name for name in stored if name in names]
    return known + [name for name in names if name not in known]


def check_same_members(joint: JointDataset, others: Mapping[str, JointDataset]) -> None:
    """All joint plans of one joint dataset share its dataset.json and splits, so they need the same members."""
    for plans_name, other in others.items():
        same_members = (other.channels, list(other.members)) == (joint.channels, list(joint.members))
        if not same_members or list(other.heads.items()) != list(joint.heads.items()):
            raise JointDatasetError(
                f"{plans_name} of {joint.name} joins other members ({', '.join(other.members)}), channels or heads. "
                f"One joint dataset has one set of them. Give --joint another id, or delete "
                f"{dataset_folder(joint.name) / plans_name}.json."
            )


def keep_configurations(
    joint: JointDataset, plans: dict[str, Any], old: JointDataset, old_plans: Mapping[str, Any]
) -> JointDataset:
    """Keep the configurations of existing joint plans that were not planned again, as far as they are still valid."""
    others = [c for c in old_plans["configurations"] if c not in plans["configurations"]]
    kept = [c for c in others if _is_still_valid(joint, old, c)]
    for configuration in others:
        if configuration not in kept:
            print(
                f"INFO: {configuration} of the existing joint plans does not fit the members any more and was dropped. "
                f"Give it after -c too, to plan it again."
            )
    if kept:
        plans.update({key: value for key, value in old_plans.items() if key not in ("configurations", BLOCK)})
    found = {**plans["configurations"], **{c: old_plans["configurations"][c] for c in kept}}
    plans["configurations"] = {c: found[c] for c in in_stored_order(found, old_plans["configurations"])}
    entries = {
        m: replace(
            entry,
            batch_sizes={**entry.batch_sizes, **{c: old.members[m].batch_sizes[c] for c in kept}},
            state={**entry.state, **{c: old.members[m].state[c] for c in kept}},
        )
        for m, entry in joint.members.items()
    }
    task_heads = {c: own for c, own in old.task_heads.items() if c in kept}
    return replace(joint, members=entries, task_heads={**task_heads, **joint.task_heads})


def outdated_teachers(joint_name: str, plans_name: str) -> list[Path]:
    """Trained models of the joint dataset that do not fit its plans any more: other channels, heads or network."""
    if not nnUNet_results.is_set():
        return []
    now = read_json(dataset_folder(joint_name) / f"{plans_name}.json", "Plan the joint dataset again.")
    outdated = []
    for model in sorted((Path(str(nnUNet_results)) / joint_name).glob(f"*__{plans_name}__*")):
        if any(model.glob("fold_*/checkpoint_*.pth")) and (model / "plans.json").is_file():
            then = read_json(model / "plans.json", "Delete the broken model.")
            if not _fits(model.name.split("__")[-1], then, now):
                outdated.append(model)
    return outdated


def _fits(configuration: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if any(configuration not in plans["configurations"] for plans in (then, now)):
        return False
    try:
        return not changes(then, now, configuration)
    except JointDatasetError:
        return False  # of an older nnunet_kd


def _is_still_valid(joint: JointDataset, old: JointDataset, configuration: str) -> bool:
    try:
        states = {m: {configuration: joint.member(m, configuration).planned_state()} for m in joint.members}
    except JointDatasetError:
        return False  # a member lost this configuration
    members = {m: replace(entry, state=states[m]) for m, entry in joint.members.items()}
    now = replace(joint, members=members, task_heads=old.task_heads)
    return now.signature(configuration) == old.signature(configuration)


def _is_joint(folder: Path) -> bool:
    """Whether a file in ``folder`` names members; the members themselves hold plans with our block too."""
    return any("members" in content[BLOCK] for content in _contents_with_block(folder).values())


def _contents_with_block(folder: Path) -> dict[str, dict[str, Any]]:
    contents = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = read_json(file, "")
        except JointDatasetError:
            continue  # broken, and not ours to judge
        if isinstance(content, dict) and isinstance(content.get(BLOCK), dict):
            contents[file.stem] = content
    return contents
