from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_kd.data.side_files import SideFileError
from nnunet_kd.data.splits import (
    fold_cases,
    join_key,
    join_splits,
    member_splits,
    read_groups,
    read_splits,
    split_key,
)
from nnunet_kd.errors import JointDatasetError

CASES = [f"case_{index:03d}" for index in range(23)]


def stock_split(folder: Path, identifiers: list[str], fold: int | str) -> tuple[list[str], list[str]]:
    """What stock nnU-Net's do_split returns for a dataset folder with these cases."""

    class Dataset:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.identifiers = identifiers

        @staticmethod
        def get_identifiers(folder: str) -> list[str]:
            return identifiers

    trainer = object.__new__(nnUNetTrainer)
    trainer.dataset_class = Dataset
    trainer.fold = fold
    trainer.preprocessed_dataset_folder = trainer.preprocessed_dataset_folder_base = str(folder)
    trainer.folder_with_segs_from_previous_stage = None
    trainer.print_to_log_file = lambda *args, **kwargs: None
    return trainer.do_split()


# --- one member -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fold", [0, 3, 4, 5, 11, "all"])
def test_folds_are_those_of_stock_nnunet(tmp_path: Path, fold: int | str) -> None:
    identifiers = CASES[::-1]
    training, validation = stock_split(tmp_path, identifiers, fold)
    splits = member_splits(identifiers, None, None)
    if fold != "all":
        assert splits == json.loads((tmp_path / "splits_final.json").read_text())
    assert fold_cases(splits, fold, identifiers) == (list(training), list(validation))


def test_existing_splits_are_left_as_they_are() -> None:
    existing = [{"train": ["b"], "val": ["a"]}]
    assert member_splits(["a", "b"], existing, {"a": "x"}) is existing


def test_folds_beyond_the_file_are_random_but_always_the_same() -> None:
    training, validation = fold_cases([], 2, CASES)
    assert sorted(training + validation) == CASES
    assert len(training) == 18
    assert fold_cases([], 2, CASES[::-1]) == (training, validation)
    assert fold_cases([], 3, CASES) != (training, validation)


@st.composite
def grouped_cases(draw: st.DrawFn) -> tuple[list[str], dict[str, str]]:
    cases = draw(st.permutations([f"c{index}" for index in range(draw(st.integers(8, 40)))]))
    groups = {case: f"c{draw(st.integers(0, 8))}" for case in cases if draw(st.integers(0, 9)) > 1}
    return cases, groups


@settings(deadline=None)
@given(grouped_cases(), st.integers(0, 1000), st.integers(2, 5))
def test_no_group_is_on_both_sides_of_a_fold(case: tuple[list[str], dict[str, str]], seed: int, num_folds: int) -> None:
    cases, groups = case
    own_group = {name: ("patient", groups[name]) if name in groups else ("alone", name) for name in cases}
    if not groups or len(set(own_group.values())) < num_folds:
        with pytest.raises(JointDatasetError):
            member_splits(cases, None, groups, seed=seed, num_folds=num_folds)
        return
    splits = member_splits(cases, None, groups, seed=seed, num_folds=num_folds)
    assert len(splits) == num_folds
    assert Counter(name for split in splits for name in split["val"]) == Counter(cases)
    for split in splits:
        assert sorted(split["train"] + split["val"]) == sorted(cases)
        assert split["val"]
        assert not {own_group[name] for name in split["train"]} & {own_group[name] for name in split["val"]}
    sizes = [len(split["val"]) for split in splits]
    assert max(sizes) - min(sizes) <= max(Counter(own_group.values()).values())
    assert splits == member_splits(sorted(cases), None, groups, seed=seed, num_folds=num_folds)


def test_the_seed_shuffles_the_groups() -> None:
    groups = {case: case[:-1] for case in CASES}
    alone = {case: case for case in CASES}
    assert member_splits(CASES, None, alone, seed=1) != member_splits(CASES, None, alone, seed=2)
    with pytest.raises(JointDatasetError, match="3 groups of cases, too few for 5 folds"):
        member_splits(CASES, None, groups)


def test_too_few_cases_and_foreign_groups_are_refused() -> None:
    with pytest.raises(JointDatasetError, match=r"4 cases, too few for 5 folds.*splits_final\.json.*'all'"):
        member_splits(CASES[:4], None, None)
    with pytest.raises(JointDatasetError, match="case_000, case_001"):
        member_splits(CASES, None, {f"{case}.nii.gz": "one" for case in CASES})


def test_groups_are_read_from_the_classification_file(tmp_path: Path) -> None:
    file = tmp_path / "classification.csv"
    file.write_text("\ufeffcase,label,patient\na,benign,P1\nb,malignant,P1\nc,benign,\n", encoding="utf-8")
    assert read_groups(file, "patient") == {"a": "P1", "b": "P1"}
    with pytest.raises(SideFileError, match=r"'group'.*case, label, patient"):
        read_groups(file, "group")


def test_a_case_has_one_group(tmp_path: Path) -> None:
    file = tmp_path / "classification.csv"
    file.write_text("case,patient\na,P1\na,P2\n")
    with pytest.raises(JointDatasetError, match="a two values of 'patient', 'P1' and 'P2'"):
        read_groups(file, "patient")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"identifier,patient\na,P1\n", "no column 'case'"),
        (b"grade,patient,case\nlow,P1,a\nlow,P2\n", "line 3: 2 values, but the header has 3 columns"),
        (b"", "the file is empty"),
        (b"case,patient\na,\xff\n", "line 2 is not UTF-8"),
    ],
)
def test_groups_that_cannot_be_read_are_refused(tmp_path: Path, content: bytes, named: str) -> None:
    file = tmp_path / "classification.csv"
    file.write_bytes(content)
    with pytest.raises(SideFileError, match=named):
        read_groups(file, "patient")


# --- joint splits -----------------------------------------------------------------------------------------------------
@st.composite
def members(draw: st.DrawFn) -> tuple[dict[str, list[dict[str, list[str]]]], dict[str, list[str]]]:
    splits, identifiers = {}, {}
    for index in range(draw(st.integers(1, 4))):
        member = f"Dataset{index:03d}_M"
        # the same case names in every member: keys must keep them apart
        identifiers[member] = [f"case_{case}" for case in range(draw(st.integers(6, 20)))]
        num_folds = draw(st.integers(1 if index else 2, 6))
        splits[member] = member_splits(identifiers[member], None, None, num_folds=max(2, num_folds))[:num_folds]
    return splits, identifiers


@settings(deadline=None)
@given(members())
def test_no_validation_case_of_a_member_is_in_the_joint_training_fold(
    case: tuple[dict[str, list[dict[str, list[str]]]], dict[str, list[str]]],
) -> None:
    splits, identifiers = case
    joint = join_splits(splits, identifiers)
    assert len(joint) == max(len(own) for own in splits.values())
    everything = {join_key(member, name) for member, own in identifiers.items() for name in own}
    for fold, split in enumerate(joint):
        training, validation = set(split["train"]), set(split["val"])
        assert len(training) + len(validation) == len(split["train"]) + len(split["val"])
        assert not training & validation
        assert training | validation == everything
        for member, own in splits.items():
            student_training, student_validation = fold_cases(own, fold, identifiers[member])
            seen = [name for owner, name in map(split_key, split["train"]) if owner == member]
            assert not set(seen) & set(student_validation)
            assert seen == student_training
            assert [name for owner, name in map(split_key, split["val"]) if owner == member] == student_validation


def test_a_member_with_fewer_folds_gives_nnunets_random_split() -> None:
    splits = {"A": member_splits(CASES, None, None), "B": [{"train": ["x", "y"], "val": ["z"]}]}
    joint = join_splits(splits, {"A": CASES, "B": ["x", "y", "z"]})
    assert len(joint) == 5
    random = np.random.RandomState(seed=12345 + 1)
    chosen = random.choice(3, 2, replace=False)
    assert [key for key in joint[1]["train"] if key.startswith("B/")] == [f"B/{'xyz'[index]}" for index in chosen]


def test_splits_that_do_not_fit_the_cases_are_refused() -> None:
    splits = {"A": [{"train": CASES[2:], "val": CASES[:2]}]}
    with pytest.raises(JointDatasetError, match=r"of A names 18 .*: case_005, case_006, case_007, case_008, case_009,"):
        join_splits(splits, {"A": CASES[:5]})
    with pytest.raises(JointDatasetError, match=r"of A has 2 .*: case_000, case_001"):
        join_splits({"A": [{"train": CASES, "val": CASES[:2]}]}, {"A": CASES})


@pytest.mark.parametrize(
    "splits", [{}, "ab", [["a"]], [{"train": ["a"]}], [{"train": None, "val": ["a"]}], [{"train": ["a"], "val": [1]}]]
)
def test_splits_of_another_form_are_refused(splits: Any, tmp_path: Path) -> None:
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps(splits))
    with pytest.raises(JointDatasetError, match=r"splits_final\.json is not a list of folds .*Correct the file"):
        read_splits(file)
    good = [{"train": ["a"], "val": ["b"]}]
    file.write_text(json.dumps(good))
    assert read_splits(file) == good


def test_cases_outside_the_splits_take_no_part() -> None:
    joint = join_splits({"A": [{"train": ["a"], "val": ["b"]}]}, {"A": ["a", "b", "c"]})
    assert joint == [{"train": ["A/a"], "val": ["A/b"]}]


def test_keys_name_member_and_case() -> None:
    assert join_key("Dataset301_Hippocampus", "case_001") == "Dataset301_Hippocampus/case_001"
    assert split_key("Dataset301_Hippocampus/folder/case_001") == ("Dataset301_Hippocampus", "folder/case_001")
    with pytest.raises(JointDatasetError, match=r"'case_001'.*MEMBER/CASE"):
        split_key("case_001")
