"""Finding stock planners and datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_kd.data.member import dataset_name
from nnunet_kd.errors import JointDatasetError
from nnunet_kd.planners.members import default_plans_name, find_planner


@pytest.mark.parametrize(
    ("planner", "plans"),
    [("ExperimentPlanner", "nnUNetPlans"), ("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans")],
)
def test_stock_planners(planner: str, plans: str) -> None:
    assert default_plans_name(find_planner(planner)) == plans


def test_unknown_planner_names_the_usual_ones() -> None:
    with pytest.raises(JointDatasetError, match=r"no planner 'MyPlanner'.*ExperimentPlanner"):
        find_planner("MyPlanner")


def test_dataset_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(kind, str(tmp_path / kind))
        (tmp_path / kind).mkdir()
    (tmp_path / "nnUNet_raw" / "Dataset001_Alpha").mkdir()
    assert dataset_name(1) == dataset_name("1") == dataset_name("001") == "Dataset001_Alpha"
    assert dataset_name("Dataset001_Alpha") == "Dataset001_Alpha"
    with pytest.raises(JointDatasetError, match="no dataset with id 2"):
        dataset_name(2)
    with pytest.raises(JointDatasetError, match="'Alpha' is neither"):
        dataset_name("Alpha")
    (tmp_path / "nnUNet_preprocessed" / "Dataset001_Other").mkdir()
    with pytest.raises(JointDatasetError, match="Several datasets have the id 1"):
        dataset_name(1)
