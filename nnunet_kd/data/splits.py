"""Cross-validation splits: a member's own, by nnU-Net's rules, and the joint ones with keys MEMBER/CASE.

A joint fold holds the same fold of every member, so that no validation case of a member is ever trained on in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_kd.data.member import read_json
from nnunet_kd.data.side_files import Problem, SideFileError, read_rows
from nnunet_kd.errors import JointDatasetError

Split = dict[str, list[str]]
DEFAULT_SEED = 12345  # nnU-Net's
MAX_NAMED_CASES = 5
REPAIR_SPLITS = "Correct the file, or move it away so that a new one is made."


def member_splits(
    identifiers: Sequence[str],
    existing: list[Split] | None,
    groups: Mapping[str, str] | None,
    *,
    seed: int = DEFAULT_SEED,
    num_folds: int = 5,
) -> list[Split]:
    """The splits of one member: those that exist, else nnU-Net's, else grouped ones.

    Args:
        identifiers: All preprocessed cases.
        existing: Content of the member's splits_final.json; returned unchanged.
        groups: Case to group, for example a patient: no group is on both sides of a fold. A case without a group is a
            group of its own. None splits by case, exactly as nnU-Net.
        seed: Of the shuffling; the default is nnU-Net's.
        num_folds: Number of folds.

    Returns:
        Per fold ``{"train": cases, "val": cases}``; every case is validated exactly once.

    Raises:
        JointDatasetError: Fewer cases or groups than folds, or groups that name none of the cases.
    """
    if existing is not None:
        return existing
    cases = [str(case) for case in np.sort(list(identifiers))]
    if groups is None:
        from nnunetv2.utilities.crossval_split import generate_crossval_split

        _need_enough(len(cases), num_folds, "cases")
        splits = generate_crossval_split(cases, seed=seed, n_splits=num_folds)
        return [{side: [str(case) for case in split[side]] for side in ("train", "val")} for split in splits]
    if not any(case in groups for case in cases):
        raise JointDatasetError(
            f"None of the {len(cases)} cases has a group, for example {', '.join(cases[:MAX_NAMED_CASES])}. The case "
            f"column of the file that names the groups must hold case names without channel number and file ending."
        )
    return _grouped_splits(cases, groups, seed, num_folds)


def _grouped_splits(cases: Sequence[str], groups: Mapping[str, str], seed: int, num_folds: int) -> list[Split]:
    """Shuffled groups, largest first, each to the fold that validates the fewest cases so far."""
    together: dict[tuple[str, ...], list[str]] = {}
    for case in cases:
        # a tuple of one or two parts, so that a case without group cannot meet a group of the same name
        together.setdefault(("group", groups[case]) if case in groups else (case,), []).append(case)
    _need_enough(len(together), num_folds, "groups of cases")
    members = list(together.values())
    order = np.random.RandomState(seed).permutation(len(members))
    shuffled = sorted((members[index] for index in order), key=len, reverse=True)
    validation: list[set[str]] = [set() for _ in range(num_folds)]
    for group in shuffled:
        min(validation, key=len).update(group)
    return [
        {"train": [case for case in cases if case not in own], "val": [case for case in cases if case in own]}
        for own in validation
    ]


def fold_cases(splits: Sequence[Split], fold: int | str, identifiers: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and validation cases of a fold, by the rule of nnU-Net's ``do_split``.

    Args:
        splits: Content of splits_final.json.
        fold: "all" trains and validates on all cases; a fold that ``splits`` does not have is a random, seeded 80:20
            split.
        identifiers: All preprocessed cases.
    """
    if fold == "all":
        return list(identifiers), list(identifiers)
    fold = int(fold)
    if fold < len(splits):
        return list(splits[fold]["train"]), list(splits[fold]["val"])
    random = np.random.RandomState(seed=DEFAULT_SEED + fold)
    cases = [str(case) for case in np.sort(list(identifiers))]
    training = random.choice(len(cases), int(len(cases) * 0.8), replace=False)
    chosen = set(training.tolist())
    return [cases[index] for index in training], [case for index, case in enumerate(cases) if index not in chosen]


def read_groups(csv_path: Path, column: str) -> dict[str, str]:
    """Case to group from one column of classification.csv; cases with an empty value are left out.

    Args:
        csv_path: A file with the header ``case,...``.
        column: The column whose values must not be on both sides of a fold.

    Raises:
        SideFileError: The file cannot be read, a column is missing, or a row has another number of values.
        JointDatasetError: A case has two groups.
    """
    problems: list[Problem] = []
    rows = read_rows(csv_path, (column,), problems)
    if problems:
        raise SideFileError.listing(problems)
    groups: dict[str, str] = {}
    for row in rows:
        (group,) = row.values
        if group and groups.setdefault(row.case, group) != group:
            raise JointDatasetError(
                f"{csv_path} gives {row.case} two values of '{column}', '{groups[row.case]}' and '{group}'. Leave one."
            )
    return groups


def read_splits(path: Path) -> list[Split]:
    """The content of a splits_final.json.

    Raises:
        JointDatasetError: The file is missing, broken or of another form.
    """
    splits = read_json(path, REPAIR_SPLITS)
    folds = splits if isinstance(splits, list) else [None]
    if not all(
        isinstance(fold, dict) and all(_is_cases(fold.get(side)) for side in ("train", "val")) for fold in folds
    ):
        raise JointDatasetError(
            f"{path} is not a list of folds that have 'train' and 'val', each a list of cases. {REPAIR_SPLITS}"
        )
    own: list[Split] = splits
    return own


def _is_cases(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(case, str) for case in value)


def join_splits(members: Mapping[str, list[Split]], identifiers: Mapping[str, Sequence[str]]) -> list[Split]:
    """Joint folds with keys MEMBER/CASE: fold f holds fold f of every member.

    There are as many folds as the member with the most has; a member with fewer gives the random 80:20 split that
    nnU-Net makes for folds beyond its file, which is also what its student then trains with.

    Args:
        members: Member to the content of its splits_final.json.
        identifiers: Member to all of its preprocessed cases.

    Raises:
        JointDatasetError: A split names cases that are not preprocessed, or validates on its own training cases.
    """
    for member, splits in members.items():
        _check_splits(member, splits, identifiers[member])
    joint: list[Split] = []
    for fold in range(max((len(splits) for splits in members.values()), default=0)):
        joint.append({"train": [], "val": []})
        for member, splits in members.items():
            training, validation = fold_cases(splits, fold, identifiers[member])
            joint[-1]["train"] += [join_key(member, case) for case in training]
            joint[-1]["val"] += [join_key(member, case) for case in validation]
    return joint


def _check_splits(member: str, splits: Sequence[Split], identifiers: Sequence[str]) -> None:
    existing = set(identifiers)
    for fold, split in enumerate(splits):
        missing = sorted({*split["train"], *split["val"]} - existing)
        if missing:
            raise JointDatasetError(
                f"splits_final.json of {member} names {len(missing)} cases in fold {fold} that are not preprocessed: "
                f"{some(missing)}. Preprocess {member} again, or correct its splits_final.json."
            )
        shared = sorted(set(split["train"]) & set(split["val"]))
        if shared:
            raise JointDatasetError(
                f"splits_final.json of {member} has {len(shared)} cases in fold {fold} that are both trained and "
                f"validated on: {some(shared)}. A joint teacher must not see validation cases. {REPAIR_SPLITS}"
            )


def join_key(member: str, case: str) -> str:
    """The key of a member's case in joint splits: MEMBER/CASE."""
    return f"{member}/{case}"


def split_key(key: str) -> tuple[str, str]:
    """Member and case of a joint key.

    Raises:
        JointDatasetError: The key names no member.
    """
    member, separator, case = key.partition("/")
    if not separator:
        raise JointDatasetError(
            f"'{key}' in the joint splits_final.json is not of the form MEMBER/CASE. Plan the joint dataset again; its "
            f"splits come from those of its members, which may be edited."
        )
    return member, case


def _need_enough(available: int, num_folds: int, what: str) -> None:
    if available < num_folds:
        raise JointDatasetError(
            f"There are {available} {what}, too few for {num_folds} folds. Write splits_final.json by hand into the "
            f'dataset\'s folder in nnUNet_preprocessed, for example with one fold: [{{"train": [CASE, ...], "val": '
            f"[CASE]}}]. Planning needs this file even if you train with fold 'all' only."
        )


def some(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:MAX_NAMED_CASES]) + (", ..." if len(names) > MAX_NAMED_CASES else "")
