"""Groups stay on one side of a fold, and folds that cannot teach a class are found."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nnunet_kd.data.folds import Presence, keep_groups_together, shared_groups
from nnunet_kd.data.side_files import CaseBoxes
from nnunet_kd.errors import JointDatasetError
from nnunet_kd.tasks.classification import macro_auroc

CASES = [f"c{number:02d}" for number in range(20)]
PATIENT = {case: f"p{number // 2}" for number, case in enumerate(CASES)}


@pytest.fixture
def member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Twenty cases of ten patients, planned without folds."""
    folder = tmp_path / "Dataset001_A"
    folder.mkdir()
    rows = "".join(f"{case},{patient},a\n" for case, patient in PATIENT.items())
    (folder / "classification.csv").write_text(f"case,patient,grade\n{rows}")
    monkeypatch.setattr("nnunet_kd.data.side_files.nnUNet_preprocessed", FakePath(tmp_path))
    monkeypatch.setattr("nnunet_kd.data.side_files.nnUNet_raw", FakePath(tmp_path / "nowhere"))
    tasks = {"segmentation": False, "classification": {"column": "grade", "classes": ["a", "b"]}}
    dataset_json = {"labels": {"background": 0}, "nnunet_kd": {"tasks": tasks, "split_by": "patient"}}
    return SimpleNamespace(
        name="Dataset001_A",
        dataset_json=dataset_json,
        identifiers=CASES,
        splits_file=folder / "splits_final.json",
    )


class FakePath:
    """nnU-Net's variable, set to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_set(self) -> bool:
        return True

    def __str__(self) -> str:
        return str(self.folder)


def test_folds_are_made_by_group_before_nnunet_makes_its_own(member: Any) -> None:
    keep_groups_together(member, 3)
    splits = json.loads(member.splits_file.read_text())
    assert len(splits) == 5
    for split in splits:
        assert not {PATIENT[case] for case in split["train"]} & {PATIENT[case] for case in split["val"]}
        assert sorted([*split["train"], *split["val"]]) == CASES


def test_a_fold_that_divides_a_group_is_refused_and_the_file_is_left(member: Any) -> None:
    whole = {"train": CASES[4:], "val": CASES[:4]}
    member.splits_file.write_text(json.dumps([whole, {"train": CASES[3:], "val": CASES[:3]}]))
    before = member.splits_file.read_text()
    keep_groups_together(member, 0)
    with pytest.raises(JointDatasetError, match=r"Fold 1 of .* has 1 value\(s\) of 'patient' both .*: p1\."):
        keep_groups_together(member, "1")
    with pytest.raises(JointDatasetError, match="no fold 2, only 0 to 1"):
        keep_groups_together(member, 2)
    keep_groups_together(member, "all")
    assert member.splits_file.read_text() == before


def test_without_groups_nnunet_makes_the_folds(member: Any) -> None:
    del member.dataset_json["nnunet_kd"]["split_by"]
    keep_groups_together(member, 7)
    assert not member.splits_file.exists()


def test_cases_without_a_group_are_on_their_own() -> None:
    split = {"train": ["a", "b", "x"], "val": ["c", "y"]}
    assert shared_groups({"a": "1", "b": "2", "c": "2"}, split) == ["2"]
    assert shared_groups({"a": "1", "c": "2"}, split) == []


UNSCORED = "so that the {} is not defined and has no part in choosing checkpoint_best"


def test_what_training_cases_cannot_teach() -> None:
    nan = np.nan
    labels = {"a": [1, 0], "b": [0, 1], "c": [1, 0]}
    grade = Presence("grade", ("low", "high"), {case: np.array(own) for case, own in labels.items()})
    assert grade.lacks({"train": ["a", "c"], "val": ["a", "b"]}) == ["no training case of grade has high"]
    assert grade.lacks({"train": ["a", "b"], "val": ["a", "b"]}) == []
    findings = {"a": np.array([1, nan]), "b": np.array([1, 1]), "c": np.array([0, 0])}
    both = Presence("findings", ("dark", "bright"), findings, needs_negatives=True)
    assert both.lacks({"train": ["a", "b"], "val": ["b", "c"]}) == [
        "every labelled training case of findings has dark",
        "every labelled training case of findings has bright",
    ]
    assert both.lacks({"train": ["b", "c"], "val": ["b", "c"]}) == []


@pytest.mark.parametrize(
    ("validation", "why"),
    [
        (["a", "b"], None),
        (["a"], "every labelled validation case of findings has dark"),
        (["c", "x"], "no validation case of findings has dark, bright"),
        (["x"], "no validation case of findings is labelled"),
        ([], "no validation case of findings is labelled"),
        (["a", "c"], None),
        (["b", "d"], None),
        (["d", "e"], "every labelled validation case of findings has dark, bright"),
    ],
)
def test_a_validation_without_any_score_is_told(validation: list[str], why: str | None) -> None:
    nan = np.nan
    labels = {"a": [1, nan], "b": [0, 1], "c": [0, 0], "d": [1, 1], "e": [nan, 1]}
    both = Presence("findings", ("dark", "bright"), {case: np.array(own) for case, own in labels.items()})
    expected = [] if why is None else [f"{why}, {UNSCORED.format('AUROC')}"]
    assert both.lacks({"train": list(labels), "val": validation}) == expected
    scores = {case: np.random.default_rng(0).random(2) for case in labels}
    known = [case for case in validation if case in labels]
    score = macro_auroc(
        np.array([scores[case] for case in known]).reshape(-1, 2),
        np.array([labels[case] for case in known]).reshape(-1, 2),
    )
    assert np.isnan(score) == bool(expected)


def test_cases_without_boxes_count() -> None:
    boxes = {"a": CaseBoxes(np.array([1, 1]), np.zeros((2, 4))), "other": CaseBoxes(np.array([0]), np.zeros((1, 4)))}
    presence = Presence.of_boxes("boxes", ("stone", "cyst"), boxes, ["a", "b"])
    assert presence.counts(["a", "b"]) == {"stone": 0, "cyst": 1}
    assert presence.lacks({"train": ["b"], "val": ["a"]}) == ["no training case of boxes has cyst"]
    unscored = f"no validation case of boxes has stone, cyst, {UNSCORED.format('AP')}"
    assert presence.lacks({"train": ["a"], "val": ["b"]}) == [unscored]
    alike = Presence("grade", ("low", "high"), {case: np.array([1, 0]) for case in "ab"})
    assert alike.lacks({"train": ["a"], "val": ["b"]}) == []  # no fold has any, which is no news of one
    nothing = Presence.of_boxes("boxes", ("stone",), {}, ["a", "b"])  # verification says so once, not of every fold
    assert nothing.lacks({"train": ["a"], "val": ["b"]}) == []
