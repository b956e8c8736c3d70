"""Finding stock planners and datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_kd.data.member import dataset_name
from nnunet_kd.errors import JointDatasetError
from nnunet_kd.planners.members import check_planner, default_plans_name, find_planner


@pytest.mark.parametrize(
    ("planner", "plans"),
    [("ExperimentPlanner", "nnUNetPlans"), ("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans")],
)
def test_stock_planners(planner: str, plans: str) -> None:
    assert default_plans_name(find_planner(planner)) == plans


@pytest.mark.parametrize("name", ["MyPlanner", "DatasetFingerprintExtractor"])
def test_unknown_planner_names_the_usual_ones(name: str) -> None:
    with pytest.raises(JointDatasetError, match=rf"no planner '{name}'.*-pl.*ExperimentPlanner"):
        find_planner(name)


@pytest.mark.parametrize(
    ("plans", "planner", "named"),
    [
        ("nnUNetResEncUNetMPlans", None, "-pl nnUNetPlannerResEncM"),
        ("nnUNetResEncUNetMPlans", "nnUNetPlannerResEncL", "-pl nnUNetPlannerResEncM"),
        ("nnUNetPlans", "nnUNetPlannerResEncL", "-pl ExperimentPlanner"),
        ("Own", None, "-pl PLANNER -overwrite_plans_name Own"),
    ],
)
def test_plans_are_not_made_by_another_planner_than_their_name_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plans: str, planner: str | None, named: str
) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    with pytest.raises(JointDatasetError, match=rf"has no {plans}.*nnUNetv2_plan_experiment -d 001 {named}"):
        check_planner("Dataset001_A", plans, planner)
    (tmp_path / "Dataset001_A").mkdir()
    (tmp_path / "Dataset001_A" / f"{plans}.json").touch()
    check_planner("Dataset001_A", plans, planner)


def test_missing_plans_may_be_made_under_their_own_or_a_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    for plans, planner in (
        ("nnUNetPlans", None),
        ("nnUNetResEncUNetMPlans", "nnUNetPlannerResEncM"),
        ("Own", "nnUNetPlannerResEncM"),
    ):
        check_planner("Dataset001_A", plans, planner)


def test_dataset_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(kind, str(tmp_path / kind))
        (tmp_path / kind).mkdir()
    (tmp_path / "nnUNet_raw" / "Dataset001_Alpha").mkdir()
    assert dataset_name(1) == dataset_name("1") == dataset_name("001") == "Dataset001_Alpha"
    assert dataset_name("Dataset001_Alpha") == "Dataset001_Alpha"
    with pytest.raises(JointDatasetError, match="no dataset with id 2"):
        dataset_name(2)
    for text in ("Alpha", "Datasetxyz", "Dataset001", "1234"):
        with pytest.raises(JointDatasetError, match=f"'{text}' is neither"):
            dataset_name(text)
    (tmp_path / "nnUNet_preprocessed" / "Dataset001_Other").mkdir()
    with pytest.raises(JointDatasetError, match="Several datasets have the id 1"):
        dataset_name(1)
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(JointDatasetError, match=r"not set: nnUNet_results\)"):
        dataset_name(2)
