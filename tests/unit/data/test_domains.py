"""Which cases belong to source and target, by name, by class and by fold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nnunet_kd.data.domains import domain_cases, refuse_shared_cases, source_cases, target_name
from nnunet_kd.data.member import Member
from nnunet_kd.data.side_files import SideFileError
from nnunet_kd.errors import AdaptationError, JointDatasetError
from nnunet_kd.settings import Adaptation, Domain, check_types

SOURCE, TARGET = "Dataset001_Source", "Dataset002_Target"
CLASSES = {"file": "classification.csv", "column": "finding", "classes": ["normal", "ill"]}
DATASET: dict[str, Any] = {"nnunet_kd": {"tasks": {"classification": CLASSES}}}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (SOURCE, TARGET):
        (tmp_path / name).mkdir()
    for module in ("data.domains", "data.side_files", "data.member"):
        monkeypatch.setattr(f"nnunet_kd.{module}.nnUNet_preprocessed", Root(tmp_path))
    monkeypatch.setattr(
        "nnunet_kd.data.member.find_candidate_datasets",
        lambda number: [path.name for path in tmp_path.iterdir() if path.name.startswith(f"Dataset{number:03d}_")],
    )
    (tmp_path / SOURCE / "classification.csv").write_text("case,finding,sex\na,normal,f\nb,ill,f\nc, ill ,m\nd,,m\n")
    return tmp_path


class Root:
    """nnU-Net's path variables are objects that know whether they are set."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def is_set(self) -> bool:
        return True


def adaptation(**domains: Any) -> Adaptation:
    return check_types({"adaptation": domains}).adaptation


def test_the_target_is_another_dataset_or_another_part_of_this_one(folders: Path) -> None:
    for given in (2, "2", "002", TARGET):
        assert target_name(SOURCE, adaptation(target={"dataset": given})) == TARGET
    parts = {"source": {"label": "normal"}, "target": {"label": "ill"}}
    assert target_name(SOURCE, adaptation(**parts)) == SOURCE
    parts["source"]["dataset"] = 1
    assert target_name(SOURCE, adaptation(**parts)) == SOURCE


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({}, "not told apart"),
        ({"target": {"label": "ill"}}, "not told apart"),
        ({"source": {"label": "ill"}, "target": {"label": "ill"}}, "Give them two labels"),
        ({"source": {"label": 1}, "target": {"label": "1"}}, "Give them two labels"),
        ({"source": {"dataset": 2}, "target": {"dataset": 2}}, f"but {SOURCE} is trained. Train {TARGET}"),
    ],
)
def test_domains_that_are_none(folders: Path, domains: dict[str, Any], message: str) -> None:
    with pytest.raises(AdaptationError, match=message):
        target_name(SOURCE, adaptation(**domains))
    with pytest.raises(JointDatasetError, match="no dataset with id 77"):
        target_name(SOURCE, adaptation(target={"dataset": 77}))


def test_cases_of_a_domain_keep_their_order(folders: Path) -> None:
    def of(domain: Domain) -> list[str]:
        return domain_cases(SOURCE, DATASET, domain, ["d", "c", "b", "a", "unknown"])

    assert of(Domain()) == ["d", "c", "b", "a", "unknown"]
    assert of(Domain(label="ill")) == ["c", "b"]
    assert of(Domain(column="sex", label="m")) == ["d", "c"]


def test_columns_and_labels_that_are_not_there(folders: Path) -> None:
    with pytest.raises(AdaptationError, match=r"No case of .* has .flu. in the column .finding.; its values are ill"):
        domain_cases(SOURCE, DATASET, Domain(label="flu"), ["a"])
    with pytest.raises(SideFileError, match="no column 'age'"):
        domain_cases(SOURCE, DATASET, Domain(column="age", label="1"), ["a"])
    with pytest.raises(AdaptationError, match=r"declares no columns .* Say with 'column'"):
        domain_cases(SOURCE, {}, Domain(label="ill"), ["a"])
    findings = {"nnunet_kd": {"tasks": {"classification": {"file": "classification.csv", "columns": ["x", "y"]}}}}
    with pytest.raises(AdaptationError, match=r"declares 2 columns .*: x, y"):
        domain_cases(SOURCE, findings, Domain(label="1"), ["a"])
    with pytest.raises(SideFileError, match="which is not in"):
        domain_cases(TARGET, DATASET, Domain(label="ill"), ["a"])


def test_cases_of_both_domains_are_refused(folders: Path) -> None:
    plans = {"dataset_name": SOURCE, "plans_name": "p", "configurations": {}}
    member = Member(SOURCE, "p", "2d", {"plans": plans, "dataset_json": DATASET})
    for source, target, shared in (
        ({"column": "finding", "label": "ill"}, {"label": "ill"}, "2 cases .*(b, c)"),
        ({"column": "sex", "label": "m"}, {"label": "ill"}, "1 cases .*(c)"),
    ):
        with pytest.raises(AdaptationError, match=shared):
            refuse_shared_cases(member, adaptation(source=source, target=target), ["a", "b", "c", "d"])
    apart = adaptation(source={"label": "normal"}, target={"label": "ill"})
    refuse_shared_cases(member, apart, ["a", "b", "c", "d"])


def test_an_empty_source_says_in_which_fold(folders: Path) -> None:
    plans = {"dataset_name": SOURCE, "plans_name": "p", "configurations": {}}
    member = Member(SOURCE, "p", "2d", {"plans": plans, "dataset_json": json.loads(json.dumps(DATASET))})
    assert source_cases(member, Domain(label="ill"), ["a", "b"], 3) == ["b"]
    with pytest.raises(AdaptationError, match=r"fold 3 of .* has no case with the label 'ill' among 1"):
        source_cases(member, Domain(label="ill"), ["a"], 3)
