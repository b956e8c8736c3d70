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
    (tmp_path / DATASET / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "lesion": 1}}))
    return tmp_path / DATASET


def test_half_width_changes_the_features_and_the_name_only(folder: Path) -> None:
    written = json.loads(plan_student(DATASET, "nnUNetPlans", "Half", width=0.5).read_text())
    expected = copy.deepcopy(PLANS)
    expected["plans_name"] = "Half"
    expected["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [16, 32]
    expected["nnunet_kd"] = {"student": {"base": "nnUNetPlans", "width": 0.5, "min_features": 8}}
    assert written == expected
    assert json.loads((folder / "nnUNetPlans.json").read_text()) == PLANS


def test_declared_tasks_get_heads_of_their_own(folder: Path) -> None:
    target = {"column": "grade", "classes": ["II", "III", "IV"]}
    dataset_json = {"labels": {"background": 0, "lesion": 1}, "nnunet_kd": {"tasks": {"classification": target}}}
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    written = json.loads(plan_student(DATASET, "nnUNetPlans", "Half", width=0.5).read_text())
    arguments = written["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert arguments["classification"] == {"targets": [["grade", 3]]}
    assert arguments["detection"] is None
    assert (arguments["backbone"], arguments["features_per_stage"]) == ("PlainConvUNet", [16, 32])


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


def test_the_same_call_twice_changes_nothing_and_another_one_is_refused(folder: Path) -> None:
    settings = {"training": {"num_epochs": 5}}
    path = plan_student(DATASET, "nnUNetPlans", "Half", width=0.5, settings=settings)
    before = path.read_text(), path.stat().st_mtime_ns
    plan_student(DATASET, "nnUNetPlans", "Half", width=0.5, settings=settings)
    others: list[dict[str, Any]] = [
        {"width": 0.25, "settings": settings},
        {"width": 0.5, "settings": settings, "min_features": 4},
        {"width": 0.5, "settings": {"training": {"num_epochs": 6}}},
        {"width": 0.5},
    ]
    for other in others:
        with pytest.raises(JointDatasetError, match=r"another student .*Choose another -plans_name"):
            plan_student(DATASET, "nnUNetPlans", "Half", **other)
    assert (path.read_text(), path.stat().st_mtime_ns) == before


def test_plans_of_a_joint_dataset_and_of_a_smaller_student_do_not_replace_each_other(folder: Path) -> None:
    path = write_member_plans(DATASET, "nnUNetPlans", "nnUNetKDPlans", "Dataset900_Joint")
    with pytest.raises(JointDatasetError, match=r"belongs to Dataset900_Joint .*width 1\.0, now 0\.5.*-plans_name"):
        plan_student(DATASET, "nnUNetPlans", "nnUNetKDPlans", width=0.5)
    plan_student(DATASET, "nnUNetPlans", "nnUNetKDPlans")
    assert json.loads(path.read_text())["nnunet_kd"]["member_of"] == ["Dataset900_Joint"]
    plan_student(DATASET, "nnUNetPlans", "Half", width=0.5)
    with pytest.raises(JointDatasetError, match=r"student of width 0\.5. Choose another -plans_name"):
        write_member_plans(DATASET, "nnUNetPlans", "Half", "Dataset900_Joint")


def test_member_plans_keep_the_settings_in_their_block(folder: Path) -> None:
    path = write_member_plans(DATASET, "nnUNetPlans", "nnUNetKDPlans", "Dataset900_Joint")
    plans = json.loads(path.read_text())
    plans["nnunet_kd"]["training"] = {"num_epochs": 7}
    path.write_text(json.dumps(plans))
    write_member_plans(DATASET, "nnUNetPlans", "nnUNetKDPlans", "Dataset901_Other")
    block = json.loads(path.read_text())["nnunet_kd"]
    assert block["training"] == {"num_epochs": 7}
    assert block["member_of"] == ["Dataset900_Joint", "Dataset901_Other"]


def test_settings_file_may_be_yaml(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("nnunet_kd:\n  training:\n    num_epochs: 5\n")
    assert read_settings_file(str(file)) == {"training": {"num_epochs": 5}}


@pytest.mark.parametrize(("content", "named"), [(None, "does not exist"), ("{", "not valid"), ("[1]", "an object")])
def test_settings_file(tmp_path: Path, content: str | None, named: str) -> None:
    file = tmp_path / "settings.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingsError, match=named):
        read_settings_file(str(file))
