"""Plans for students: what they change, what they keep, and whose files they do not touch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from nnunet_kd.errors import JointDatasetError, SettingsError
from nnunet_kd.planners.student_planner import plan_student, read_settings_file, write_member_plans

DATASET = "Dataset001_Alpha"
PLANS: dict[str, Any] = {
    "dataset_name": DATASET,
    "plans_name": "nnUNetPlans",
    "configurations": {
        "3d_fullres": {
            "data_identifier": "nnUNetPlans_3d_fullres",
            "patch_size": [16, 16, 16],
            "architecture": {
                "network_class_name": "PlainConvUNet",
                "arch_kwargs": {"features_per_stage": [32, 64], "strides": [[1, 1, 1], [2, 2, 2]]},
                "_kw_requires_import": [],
            },
        },
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    (tmp_path / DATASET).mkdir()
    (tmp_path / DATASET / "nnUNetPlans.json").write_text(json.dumps(PLANS))
    return tmp_path / DATASET


def test_half_width_changes_the_features_and_the_name_only(folder: Path) -> None:
    written = json.loads(plan_student(DATASET, "nnUNetPlans", "Half", width=0.5).read_text())
    expected = copy.deepcopy(PLANS)
    expected["plans_name"] = "Half"
    expected["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [16, 32]
    expected["nnunet_kd"] = {"student": {"base": "nnUNetPlans", "width": 0.5, "min_features": 8}}
    assert written == expected
    assert json.loads((folder / "nnUNetPlans.json").read_text()) == PLANS


def test_settings_go_into_the_block_and_are_checked(folder: Path) -> None:
    settings = {"training": {"num_epochs": 5}, "terms": [{"teacher": "joint", "loss": "dkd"}]}
    block = json.loads(plan_student(DATASET, "nnUNetPlans", "Set", settings=settings).read_text())["nnunet_kd"]
    assert (block["training"], block["terms"]) == (settings["training"], settings["terms"])
    with pytest.raises(SettingsError, match=r"training\.epochs"):
        plan_student(DATASET, "nnUNetPlans", "Bad", settings={"training": {"epochs": 5}})
    assert not (folder / "Bad.json").exists()


@pytest.mark.parametrize("name", ["nnUNetPlans", "a__b"])
def test_names_that_are_not_possible(folder: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        plan_student(DATASET, "nnUNetPlans", name)


def test_plans_of_others_are_not_overwritten(folder: Path) -> None:
    (folder / "Mine.json").write_text(json.dumps({**PLANS, "plans_name": "Mine"}))
    for write in (
        lambda: plan_student(DATASET, "nnUNetPlans", "Mine"),
        lambda: write_member_plans(DATASET, "nnUNetPlans", "Mine", "Dataset900_Joint"),
    ):
        with pytest.raises(JointDatasetError, match=r"Mine\.json exists and was not made by nnunet_kd"):
            write()
    plan_student(DATASET, "nnUNetPlans", "Half", width=0.5)
    with pytest.raises(JointDatasetError, match="was made from nnUNetPlans, not from Mine"):
        plan_student(DATASET, "Mine", "Half")


def test_member_plans_are_the_stock_plans_and_remember_every_joint(folder: Path) -> None:
    write_member_plans(DATASET, "nnUNetPlans", "nnUNetKDPlans", "Dataset900_Joint")
    path = write_member_plans(DATASET, "nnUNetPlans", "nnUNetKDPlans", "Dataset901_Other")
    before = path.stat().st_mtime_ns
    write_member_plans(DATASET, "nnUNetPlans", "nnUNetKDPlans", "Dataset901_Other")
    assert path.stat().st_mtime_ns == before
    written = json.loads(path.read_text())
    assert written["configurations"] == PLANS["configurations"]
    assert written["nnunet_kd"]["member_of"] == ["Dataset900_Joint", "Dataset901_Other"]


def test_missing_or_broken_plans_say_what_to_do(folder: Path) -> None:
    with pytest.raises(JointDatasetError, match=r"Missing\.json does not exist.*nnUNetv2_plan_and_preprocess -d 001"):
        plan_student(DATASET, "Missing", "Half")
    (folder / "Broken.json").write_text("{")
    with pytest.raises(JointDatasetError, match=r"Broken\.json is not valid JSON"):
        plan_student(DATASET, "Broken", "Half")


@pytest.mark.parametrize(("content", "named"), [(None, "does not exist"), ("{", "not valid"), ("[1]", "JSON object")])
def test_settings_file(tmp_path: Path, content: str | None, named: str) -> None:
    file = tmp_path / "settings.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=named):
        read_settings_file(str(file))
