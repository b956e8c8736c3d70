"""A joint teacher of members with segmentation, classes and boxes, by the real commands."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.integration

EVERYTHING, CLASSES, BOXES, MASKS = (
    "Dataset021_Everything",
    "Dataset022_Classes",
    "Dataset023_Boxes",
    "Dataset024_Masks",
)
MEMBERS = (EVERYTHING, CLASSES, BOXES, MASKS)
JOINT = "Dataset920_Joint"
SIZES = {"file": "classification.csv", "column": "size", "classes": ["small", "large"]}
FINDINGS = {"file": "classification.csv", "columns": ["dark", "bright"]}
LESIONS = {"file": "boxes.json", "classes": ["lesion"]}
SETTINGS = {
    "training": {"num_epochs": 2, "num_iterations_per_epoch": 6, "num_val_iterations_per_epoch": 4, "seed": 1},
    "budget": "total",
    "sampling_exponent": 0.0,
}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as file:
        return {row["case"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def planned(
    make_world: Callable[[], Any], make_dataset: Callable[..., Path], write_side_files: Callable[[Path], None]
) -> Any:
    """2D members: all tasks; classes without masks; boxes without masks; masks alone. Joined as 920."""
    world = make_world()
    tasks: dict[str, dict[str, Any] | None] = {
        EVERYTHING: {"classification": [SIZES, FINDINGS], "detection": LESIONS},
        CLASSES: {"segmentation": False, "classification": SIZES},
        BOXES: {"segmentation": False, "detection": LESIONS},
        MASKS: None,
    }
    for name, own in tasks.items():
        extra = None if own is None else {"nnunet_kd": {"tasks": own, "split_by": "patient"}}
        arguments = {"num_cases": 10, "num_test_cases": 2, "dimension": 2, "extra": extra}
        folder = make_dataset(world.raw, int(name[7:10]), name[11:], **arguments)
        if own is not None:
            write_side_files(folder)
        if own is not None and not own.get("segmentation", True):
            shutil.rmtree(folder / "labelsTr")
    world.plan("-d", "21", "22", "23", "24", "--joint", "920", "-c", "2d", "--width", "0.25")
    return world


@pytest.fixture(scope="module")
def trained(planned: Any) -> Any:
    """The joint teacher after two epochs."""
    planned.train(920, "Teacher", "-p", "nnUNetKDPlans", configuration="2d", settings=SETTINGS)
    return planned


def teacher(world: Any) -> Path:
    return world.model(JOINT, "Teacher", "nnUNetKDPlans", "2d")


def test_planned_heads_are_those_of_the_members_plans(planned: Any) -> None:
    plans = read(planned.preprocessed / JOINT / "nnUNetKDPlans.json")
    block, heads = plans["nnunet_kd"], plans["configurations"]["2d"]["task_heads"]
    assert set(heads) == {EVERYTHING, CLASSES, BOXES}
    assert {name: entry["head"] for name, entry in block["members"].items()} == {
        EVERYTHING: EVERYTHING,
        CLASSES: None,
        BOXES: None,
        MASKS: MASKS,
    }
    assert set(block["heads"]) == {EVERYTHING, MASKS}
    assert heads[EVERYTHING]["classification"] == {"targets": [["size", 2], ["findings", 2]]}
    for name in (EVERYTHING, BOXES):
        own = read(planned.preprocessed / name / "nnUNetKDPlans.json")["configurations"]["2d"]["architecture"]
        assert heads[name]["detection"] == own["arch_kwargs"]["detection"]


def test_every_member_is_validated_in_all_its_tasks(trained: Any) -> None:
    fold = teacher(trained) / "fold_0"
    summary = read(fold / "validation" / "summary.json")
    assert set(summary["members"]) == {EVERYTHING, MASKS}
    tasks = summary["nnunet_kd"]["members"]
    assert set(tasks) == {EVERYTHING, CLASSES, BOXES}
    assert set(tasks[EVERYTHING]["classification"]) == {"size", "findings"}
    for name in (EVERYTHING, BOXES):
        cases = read(trained.preprocessed / name / "splits_final.json")[0]["val"]
        assert tasks[name]["detection"]["num_images"] == len(cases)
    cases = read(trained.preprocessed / CLASSES / "splits_final.json")[0]["val"]
    assert set(rows_of(fold / CLASSES / "validation" / "classification.csv")) == set(cases)
    assert {file.name for file in (fold / BOXES / "validation").iterdir()} == {"boxes.json", "summary.json"}
    (log,) = fold.glob("training_log_*.txt")
    assert f"Pseudo scores of {CLASSES}: AUROC size" in log.read_text()
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert len(checkpoint["logging"][f"{BOXES} AP"]) == 2
    assert all(steps > 0 for steps in checkpoint["nnunet_kd"]["steps"].values())


def test_heads_of_every_member_were_trained(trained: Any, tmp_path: Path) -> None:
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "initial_lr": 1e-30, "weight_decay": 0.0}}
    world = trained.copy(tmp_path)
    shutil.rmtree(teacher(world))
    world.train(920, "Teacher", "-p", "nnUNetKDPlans", configuration="2d", settings=settings)
    weights = [
        torch.load(teacher(own) / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
        for own in (world, trained)
    ]
    own = [key for key in weights[0] if key.startswith("task_heads.")]
    for name, part in ((EVERYTHING, "classification"), (EVERYTHING, "detection"), (CLASSES, "classification"),
                       (BOXES, "detection")):  # fmt: skip
        keys = [key for key in own if key.startswith(f"task_heads.{name}.{part}.") and key.endswith("weight")]
        assert keys
        assert any(not torch.equal(weights[0][key], weights[1][key]) for key in keys)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_is_predicted_as_its_validation_said(trained: Any, tmp_path: Path, name: str) -> None:
    cases = read(trained.preprocessed / name / "splits_final.json")[0]["val"]
    images = tmp_path / "images"
    images.mkdir()
    for case in cases:
        shutil.copy(trained.raw / name / "imagesTr" / f"{case}_0000.png", images)
    flags = ("-device", "cpu", "-npp", "0", "-nps", "0")
    trained.run(
        "nnUNetKD_predict", "-m", teacher(trained), "--head", name, "-i", images, "-o", tmp_path / "out", *flags
    )
    validation = teacher(trained) / "fold_0" / name / "validation"
    # the validation pads a patch with zeros, prediction makes the patch larger; these images are one patch
    written = {file.name for file in validation.iterdir()} - {"summary.json"}
    assert written <= {file.name for file in (tmp_path / "out").iterdir()}
    for case in cases if name in (EVERYTHING, MASKS) else ():
        masks = [np.array(Image.open(folder / f"{case}.png")) for folder in (validation, tmp_path / "out")]
        assert (masks[0] == masks[1]).mean() > 0.9
    if name in (EVERYTHING, CLASSES):
        found, expected = (rows_of(folder / "classification.csv") for folder in (tmp_path / "out", validation))
        assert list(found) == list(expected)
        for case, row in expected.items():
            for column in set(row) - {"case"}:
                assert float(found[case][column]) == pytest.approx(float(row[column]), abs=0.1)


def test_single_files_are_predicted_as_the_folder_is(trained: Any, tmp_path: Path) -> None:
    images = sorted((trained.raw / EVERYTHING / "imagesTs").iterdir())
    flags = ("-device", "cpu", "-npp", "0", "-nps", "0")
    for given, output in (([images[0].parent], "folder"), (images[:1], "file")):
        command = ("nnUNetKD_predict", "-m", teacher(trained), "--head", "21", "-i", *given, "-o", tmp_path / output)
        trained.run(*command, *flags)
    name = images[0].name.replace("_0000", "")
    assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()
    found, expected = (rows_of(tmp_path / output / "classification.csv") for output in ("file", "folder"))
    assert list(found) == [Path(name).stem]
    assert found[Path(name).stem] == expected[Path(name).stem]


def test_only_segmentations_are_exported(trained: Any, tmp_path: Path) -> None:
    trained.run("nnUNetKD_export", "-m", teacher(trained), "--head", EVERYTHING, "-o", tmp_path / "plain")
    plans = read(tmp_path / "plain" / "plans.json")
    assert plans["configurations"]["2d"]["architecture"]["network_class_name"].endswith("PlainConvUNet")
    output = trained.run(
        "nnUNetKD_export", "-m", teacher(trained), "--head", CLASSES, "-o", tmp_path / "classes", check=False
    )
    assert f"{CLASSES} has no segmentation" in output
    assert "Traceback" not in output


def test_folds_that_divide_groups_of_a_member_are_warned_of_and_refused(planned: Any, tmp_path: Path) -> None:
    world = planned.copy(tmp_path)
    splits_file = world.preprocessed / BOXES / "splits_final.json"
    splits_file.write_text(json.dumps(read(splits_file)[:1]))  # the others have five
    output = world.plan("-d", "21", "22", "23", "24", "--joint", "920", "-c", "2d", "--width", "0.25")
    patient = {case: row["patient"] for case, row in rows_of(world.raw / BOXES / "classification.csv").items()}
    divided = []
    for fold, split in enumerate(read(world.preprocessed / JOINT / "splits_final.json")):
        sides = [{patient.get(key.removeprefix(f"{BOXES}/")) for key in split[side]} for side in ("train", "val")]
        divided += [fold] if (sides[0] & sides[1]) - {None} else []
    assert divided
    assert 0 not in divided
    assert f"WARNING: fold(s) {', '.join(map(str, divided))} of {JOINT} divide groups of {BOXES}" in output
    arguments = {"configuration": "2d", "settings": SETTINGS, "fold": divided[0], "check": False}
    output = world.train(920, "Teacher", "-p", "nnUNetKDPlans", **arguments)
    assert f"Fold {divided[0]} of {JOINT} has" in output
    assert f"{BOXES}'s 'split_by' both in training and in validation" in output
    shutil.rmtree(tmp_path)


def test_planning_again_changes_nothing(trained: Any, tmp_path: Path) -> None:
    world = trained.copy(tmp_path)
    file = world.preprocessed / JOINT / "nnUNetKDPlans.json"
    before = read(file)
    output = world.plan("-d", "21", "22", "23", "24", "--joint", "920", "-c", "2d", "--width", "0.25")
    assert read(file) == before
    warnings = [line for line in output.splitlines() if "WARNING" in line]
    assert all("splits_final.json, fold" in line and "AUROC is not defined" in line for line in warnings), warnings
    shutil.rmtree(tmp_path)


def test_a_target_that_was_declared_later_is_noticed(trained: Any, tmp_path: Path) -> None:
    world = trained.copy(tmp_path)
    file = world.preprocessed / CLASSES / "dataset.json"
    declared = read(file)
    declared["nnunet_kd"]["tasks"]["classification"] = [SIZES, FINDINGS]
    file.write_text(json.dumps(declared))
    output = world.train(22, "Control", "-p", "nnUNetKDPlans", configuration="2d", settings=SETTINGS, check=False)
    assert "nnUNetKD_plan_and_preprocess" in output
    assert "have a head for" in output
    shutil.rmtree(tmp_path)


def test_reordered_classes_are_noticed_by_the_teacher_and_by_a_resumed_control(trained: Any, tmp_path: Path) -> None:
    world = trained.copy(tmp_path)
    small = {**SETTINGS, "training": {**SETTINGS["training"], "num_iterations_per_epoch": 1}}
    arguments: dict[str, Any] = {"configuration": "2d", "settings": small}
    world.train(22, "Control", "-p", "nnUNetKDPlans", **arguments)
    for root in (world.raw, world.preprocessed):
        file = root / CLASSES / "dataset.json"
        declared = read(file)
        declared["nnunet_kd"]["tasks"]["classification"]["classes"] = ["large", "small"]
        file.write_text(json.dumps(declared))
    output = world.train(22, "Control", "-p", "nnUNetKDPlans", "--val", check=False, **arguments)
    assert "order of the classes" in output
    arguments["settings"] = SETTINGS
    output = world.train(920, "Teacher", "-p", "nnUNetKDPlans", "--c", check=False, **arguments)
    assert f"{CLASSES} changed since {JOINT} was planned (dataset.json)" in output
    output = world.plan("-d", "21", "22", "23", "24", "--joint", "920", "-c", "2d", "--width", "0.25")
    assert "do not fit nnUNetKDPlans any more" in " ".join(output.split())
    shutil.rmtree(tmp_path)


def test_members_without_any_segmentation_are_joined(planned: Any, tmp_path: Path) -> None:
    world = planned.copy(tmp_path)
    output = world.plan("-d", "22", "23", "--joint", "921", "-c", "2d", "--width", "0.25")
    assert "no segmentation" in output
    world.train(921, "Teacher", "-p", "nnUNetKDPlans", configuration="2d", settings=SETTINGS)
    fold = world.model("Dataset921_Joint", "Teacher", "nnUNetKDPlans", "2d") / "fold_0"
    assert set(read(fold / "validation" / "summary.json")["nnunet_kd"]["members"]) == {CLASSES, BOXES}
    shutil.rmtree(tmp_path)
