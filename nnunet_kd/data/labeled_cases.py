"""Which training cases keep their labels, where only some are to have them (our design)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_kd.data.member import Member
from nnunet_kd.data.side_files import side_file
from nnunet_kd.data.splits import read_groups
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import SettingsError
from nnunet_kd.settings import Labeled


def labeled_cases(member: Member, training_cases: Sequence[str], chosen: Labeled | Sequence[str] | None) -> list[str]:
    """The training cases that keep their labels, in their order.

    Args:
        member: The dataset; its ``split_by`` keeps the cases of a group together.
        training_cases: Of the fold.
        chosen: A share of them, or names; None keeps all.

    Raises:
        SettingsError: A named case is no training case of the fold, or a class is left without a case.
    """
    cases = [str(case) for case in training_cases]
    if chosen is None:
        return cases
    if isinstance(chosen, Labeled):
        kept = draw(cases, _groups(member), chosen)
    else:
        unknown = sorted(set(chosen) - set(cases))
        if unknown:
            raise SettingsError(
                f"'labeled' names {len(unknown)} cases that are no training cases of this fold of {member.name}, for "
                f"example {', '.join(unknown[:3])}. Name training cases (splits_final.json lists them)."
            )
        kept = set(chosen)
    _require_all_classes(member, [case for case in cases if case in kept], cases, chosen)
    return [case for case in cases if case in kept]


def draw(cases: Sequence[str], groups: Mapping[str, str], chosen: Labeled) -> set[str]:
    """A share of the cases, rounded down and at least one; a group is kept whole, so that there may be a few more."""
    wanted = max(1, int(chosen.fraction * len(cases) + 1e-9))
    together: dict[tuple[str, ...], list[str]] = {}
    for case in sorted(cases):
        # a tuple of one or two parts, so that a case without group cannot meet a group of the same name
        together.setdefault(("group", groups[case]) if case in groups else (case,), []).append(case)
    members = list(together.values())
    kept: set[str] = set()
    for index in np.random.RandomState(chosen.seed).permutation(len(members)):
        if len(kept) >= wanted:
            break
        kept.update(members[index])
    return kept


def _groups(member: Member) -> dict[str, str]:
    tasks = Tasks.from_dataset_json(member.dataset_json)
    if tasks.split_by is None:
        return {}
    return read_groups(side_file(member.name, tasks.groups_file), tasks.split_by)


def _require_all_classes(member: Member, kept: Sequence[str], cases: Sequence[str], chosen: Any) -> None:
    """Raise SettingsError where a class that the training cases have occurs in none of those that keep their labels."""
    missing = set(foreground(member)) - classes_of(member, kept)
    if missing:
        missing &= classes_of(member, cases)
    if missing:
        labels = member.dataset_json["labels"]
        names = {tuple(value) if isinstance(value, list) else value: name for name, value in labels.items()}
        wording = ", ".join(sorted(names.get(label, str(label)) for label in missing))
        advice = "Raise 'fraction' or change 'seed'" if isinstance(chosen, Labeled) else "Name more cases"
        raise SettingsError(
            f"None of the {len(kept)} cases of {member.name} that keep their labels has {wording}, so it could not be "
            f"learned. {advice} in 'labeled'."
        )


def foreground(member: Member) -> list[Any]:
    """Foreground labels, or regions where there are any, as nnU-Net's properties name them."""
    manager = member.label_manager
    return list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)


def classes_of(member: Member, cases: Sequence[str]) -> set[Any]:
    """Which of the foreground classes occur in any of the cases; read from what nnU-Net's preprocessing kept."""
    data, wanted = member.dataset_class(str(member.data_folder)), set(foreground(member))
    found: set[Any] = set()
    for case in cases:
        locations = data.load_case(case)[3]["class_locations"]
        found |= {label for label in wanted if len(locations.get(label, ()))}
        if found == wanted:
            break
    return found
