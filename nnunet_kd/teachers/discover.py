"""Find the joint teacher of a student that names none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_results

from nnunet_kd.data.joint import find_joint_datasets
from nnunet_kd.errors import TeacherError
from nnunet_kd.settings import BLOCK

TEACHER_TRAINER = "nnUNetTrainerKDTeacher"
CLASS_AVERAGE_TRAINER = "nnUNetTrainerSIKDTeacher"


def discover_joint_teacher(
    dataset: str,
    configuration: str,
    fold: int | str,
    joint: str | None = None,
    checkpoint: str = "checkpoint_final.pth",
) -> dict[str, Any]:
    """Settings of the one trained joint teacher that has ``dataset`` as a member, for this configuration and fold.

    Args:
        dataset: Full dataset name of the student.
        configuration: Its configuration.
        fold: Its fold.
        joint: Only this joint dataset (full name or id).
        checkpoint: Checkpoint that must exist.

    Raises:
        TeacherError: No joint dataset names it, none has a trained teacher, or several have.
    """
    candidates = [
        (found, plans)
        for found, plans in find_joint_datasets(dataset)
        if is_wanted(found.name, joint) and configuration in found.members[dataset].batch_sizes
    ]
    if not candidates:
        which = "no joint dataset" if joint is None else f"the joint dataset {joint} does not exist or does not"
        raise TeacherError(
            f"No teacher: {which} name{'s' if joint is None else ''} {dataset} as a member in {configuration}. Make a "
            f"teacher first:\n"
            f"  nnUNetKD_plan_and_preprocess -d {dataset[7:10]} OTHER_ID --joint NEW_ID -c {configuration}\n"
            f"  nnUNetv2_train NEW_ID {configuration} {fold} -tr {TEACHER_TRAINER} -p nnUNetKDPlans\n"
            f'or name any trained nnU-Net in the settings (teachers: {{"joint": {{"model": FOLDER}}}}).'
        )
    trained, commands = [], []
    for found, plans in candidates:
        relative = f"{found.name}/{TEACHER_TRAINER}__{plans}__{configuration}"
        commands.append(f"  nnUNetv2_train {found.name[7:10]} {configuration} {fold} -tr {TEACHER_TRAINER} -p {plans}")
        if (Path(str(nnUNet_results)) / relative / f"fold_{fold}" / checkpoint).is_file():
            trained.append((found.name, relative))
    if not trained:
        raise TeacherError(
            f"No trained teacher for {dataset} {configuration} fold {fold}. Train one first:\n" + "\n".join(commands)
        )
    if len(trained) > 1:
        names = {name for name, _ in trained}
        example = (
            f'"joint": "{trained[0][0]}"'
            if len(names) > 1
            else (f'"teachers": {{"joint": {{"model": "{trained[0][1]}"}}}}')
        )
        raise TeacherError(
            f"Several joint teachers are trained for {dataset} {configuration} fold {fold}: "
            f"{', '.join(model for _, model in trained)}. Name one in the settings, for example "
            f"nnUNetKD_settings='{{{example}}}'."
        )
    return {"joint": trained[0][0], "teachers": {"joint": {"model": trained[0][1]}}}


def is_wanted(name: str, joint: str | None) -> bool:
    """Whether ``joint`` (full name, id, or None for any) means the joint dataset ``name``."""
    return joint is None or name == joint or name[7:10] == str(joint).zfill(3)


def class_average_model(plans: dict[str, Any], configuration: str, fold: int | str, checkpoint: str) -> str:
    """Model folder, relative to nnUNet_results, of the class-average teacher trained on a student's own dataset.

    That of the same plans if it is trained, else of the plans they came from (those of a smaller student, or with
    heads, which such a teacher does not have).
    """
    own, base = (
        f"{plans['dataset_name']}/{CLASS_AVERAGE_TRAINER}__{name}__{configuration}"
        for name in (plans["plans_name"], base_plans(plans))
    )
    return own if (Path(str(nnUNet_results)) / own / f"fold_{fold}" / checkpoint).is_file() else base


def base_plans(plans: dict[str, Any]) -> str:
    """Name of the plans that a student's plans were made from; their own where they are stock."""
    name: str = plans.get(BLOCK, {}).get("student", {}).get("base", plans["plans_name"])
    return name
