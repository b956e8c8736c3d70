"""Source and target of a domain adaptation: their cases, and where the images of the target lie (our design).

The source is the dataset that is trained, or a part of it; its labels are used. The target is another part of it, or
another dataset, whose images are preprocessed with the source's plans, because that is how they will be predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed

from nnunet_kd.data.add_unlabeled import added_cases, added_folder, check_added
from nnunet_kd.data.member import Member, dataset_name, read_json
from nnunet_kd.data.side_files import Problem, SideFileError, read_rows, side_file
from nnunet_kd.data.splits import REPAIR_SPLITS, fold_cases
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.data.unlabeled_checks import some_of
from nnunet_kd.errors import AdaptationError
from nnunet_kd.settings import BLOCK, Adaptation, Domain

TARGETS = "nnunet_kd_target"  # folder beside the source's preprocessed data, with one folder per target dataset
REFERENCES = "gt_segmentations"  # as nnU-Net names it


@dataclass(frozen=True)
class Target:
    """The domain without labels, as a fold of the training sees it.

    Attributes:
        dataset: Full name of its dataset.
        folder: Its preprocessed images.
        training: Cases that are trained on, without their labels.
        validation: Cases that are held back.
        evaluated: Those of them that have a mask, for the final evaluation.
        base: Folder with its ``gt_segmentations``.
    """

    dataset: str
    folder: Path
    training: list[str]
    validation: list[str]
    evaluated: list[str]
    base: Path


def target_folder(source: str, target: str) -> Path:
    """Where everything about ``target`` lies that is prepared for the adaptation from ``source`` (full names)."""
    return Path(str(nnUNet_preprocessed)) / source / TARGETS / target


def target_collection(target: str) -> str:
    """The collection of the target's preprocessed images, see ``add_unlabeled.py``."""
    return f"{TARGETS}/{target}"


def target_name(source: str, settings: Adaptation) -> str:
    """Full name of the target's dataset.

    Raises:
        AdaptationError: The settings name no target, or the same cases in both domains, or another source.
        JointDatasetError: There is no such dataset.
    """
    own = settings.source.dataset
    if own is not None and dataset_name(own) != source:
        raise AdaptationError(
            f"'adaptation.source.dataset' is {own}, but {source} is trained. Train {dataset_name(own)}, or remove it."
        )
    target = source if settings.target.dataset is None else dataset_name(settings.target.dataset)
    if target != source:
        return target
    if settings.source.label is None or settings.target.label is None:
        raise AdaptationError(
            f"The source and the target of the adaptation are both in {source}, but not told apart. Name another "
            f'dataset ("adaptation": {{"target": {{"dataset": 307}}}}), or divide this one by a column of its '
            f'classification file ("adaptation": {{"source": {{"label": "normal"}}, "target": {{"label": '
            f'"tuberculosis"}}}}).'
        )
    if _place(settings.source) == _place(settings.target):
        raise AdaptationError(
            f"The same cases of {source} are source and target of the adaptation: both have the label "
            f"'{settings.source.label}'. Give them two labels."
        )
    return target


def domain_cases(dataset: str, dataset_json: Mapping[str, Any], domain: Domain, cases: Sequence[str]) -> list[str]:
    """Those of ``cases`` that belong to ``domain``, in their order.

    Args:
        dataset: Full name.
        dataset_json: Its dataset.json, which names the classification file.
        domain: All of the dataset, or those cases that have a value in a column of that file.
        cases: Of the dataset.

    Raises:
        AdaptationError: There is no such column or value, or none of the cases has it.
        SideFileError: The file is missing or malformed.
    """
    if domain.label is None:
        return list(cases)
    tasks = Tasks.from_dataset_json(dataset_json)
    columns = [column for target in tasks.classification for column in target.columns]
    column = domain.column
    if column is None:
        if len(columns) != 1:
            raise AdaptationError(
                f"{dataset} declares {len(columns) or 'no'} columns of a classification file in its dataset.json"
                f"{': ' if columns else ''}{', '.join(columns)}. Say with 'column' which one tells the domains apart."
            )
        column = columns[0]
    values = _values(side_file(dataset, tasks.groups_file), column)
    wanted = str(domain.label)
    if wanted not in values.values():
        raise AdaptationError(
            f"No case of {dataset} has '{wanted}' in the column '{column}'; its values are "
            f"{', '.join(sorted(set(values.values()) - {''}))}. Correct 'label' in the settings."
        )
    return [case for case in cases if values.get(case) == wanted]


def find_target(member: Member, settings: Adaptation, fold: int | str, split: tuple[list[str], list[str]]) -> Target:
    """The target of a fold.

    Args:
        member: The source.
        settings: Which domains.
        fold: Of the training; another dataset has this fold of its own splits.
        split: Training and validation cases of the source's dataset in this fold.

    Raises:
        AdaptationError: The target was not prepared, does not fit any more, or has no case in this fold.
    """
    name = target_name(member.name, settings)
    training, validation = split
    folder, base, dataset_json = member.data_folder, member.base_folder, member.dataset_json
    if name != member.name:
        folder = added_folder(member, target_collection(name))
        base = target_folder(member.name, name)
        command = _command(member, name)
        prepared = added_cases(member, target_collection(name))
        if not prepared:
            raise AdaptationError(f"{name} is not prepared as the target of {member.name} in {folder}. Run: {command}")
        check_added(member, target_collection(name))
        dataset_json = read_json(base / "dataset.json", f"Run: {command}")
        splits_file = Path(str(nnUNet_preprocessed)) / name / "splits_final.json"
        splits = read_json(splits_file, f"Run: {command}")
        training, validation = fold_cases(splits, fold, prepared)
        missing = sorted({*training, *validation} - set(prepared))
        if missing:
            raise AdaptationError(
                f"{splits_file} names {len(missing)} cases that are not prepared as the target of {member.name}, for "
                f"example {some_of(missing)}. {REPAIR_SPLITS} Or run: {command}"
            )
    training, validation = (
        domain_cases(name, dataset_json, settings.target, cases) for cases in (training, validation)
    )
    if not training:
        raise AdaptationError(
            f"The target of the adaptation is empty: fold {fold} of {name} has no training case"
            f"{_with_label(settings.target)}. Choose another fold or label, or correct splits_final.json."
        )
    if name == member.name:
        refuse_shared_cases(member, settings, split[0] + split[1])
    validation = [] if fold == "all" else validation  # which trains on all
    has_masks, ending = Tasks.from_dataset_json(dataset_json).segmentation, member.dataset_json["file_ending"]
    evaluated = [case for case in validation if has_masks and (base / REFERENCES / f"{case}{ending}").is_file()]
    return Target(name, folder, training, validation, evaluated, base)


def refuse_shared_cases(member: Member, settings: Adaptation, cases: Sequence[str]) -> None:
    """Raise AdaptationError where cases of a divided dataset belong to both domains."""
    source, target = (
        domain_cases(member.name, member.dataset_json, domain, cases) for domain in (settings.source, settings.target)
    )
    shared = sorted(set(source) & set(target))
    if shared:
        raise AdaptationError(
            f"{len(shared)} cases of {member.name} are source and target of the adaptation at once "
            f"({some_of(shared)}). Give the domains columns and labels that exclude each other."
        )


def source_cases(member: Member, domain: Domain, cases: Sequence[str], fold: int | str) -> list[str]:
    """Those of ``cases`` that belong to the source.

    Raises:
        AdaptationError: There is none.
    """
    own = domain_cases(member.name, member.dataset_json, domain, cases)
    if not own:
        raise AdaptationError(
            f"The source of the adaptation is empty: fold {fold} of {member.name} has no case{_with_label(domain)} "
            f"among {len(cases)}. Choose another fold or label, or correct splits_final.json."
        )
    return own


def _values(file: Path, column: str) -> dict[str, str]:
    problems: list[Problem] = []
    rows = read_rows(file, [column], problems)
    if problems:
        raise SideFileError.listing(problems)
    return {row.case: row.values[0] for row in rows}


def _place(domain: Domain) -> tuple[str | None, str]:
    return domain.column, str(domain.label)


def _with_label(domain: Domain) -> str:
    return "" if domain.label is None else f" with the label '{domain.label}'"


def _command(member: Member, target: str) -> str:
    block = member.plans.get(BLOCK, {})
    command = f"nnUNetKD_plan_adaptation -source {member.name[7:10]} -target {target[7:10]} -c {member.configuration}"
    if "adaptation" not in block:
        return f"{command} -p {member.plans_name}"
    planned = block["adaptation"]
    command += f" -p {block['student']['base']} -plans_name {member.plans_name} --network {planned['network']}"
    labels = ((f"-{name}_label", planned.get(name, {}).get("label")) for name in ("source", "target"))
    return command + "".join(f" {flag} {label}" for flag, label in labels if label is not None)
