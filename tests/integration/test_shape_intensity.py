"""SIKD through the real commands, on stock plans: teacher on averaged images, student, stock prediction, export."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_kd.teachers.checkpoint import load_checkpoint

pytestmark = pytest.mark.integration

ALPHA, BETA, GAMMA = "Dataset001_Alpha", "Dataset002_Beta", "Dataset003_Gamma"
NAMES = {1: ALPHA, 2: BETA, 3: GAMMA}
SHORT = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "seed": 1}
SETTINGS: dict[str, Any] = {"training": SHORT}
TERM = "shape.features.mse"


def train(world: Any, dataset: int, trainer: str, *args: str, settings: Any = SETTINGS, check: bool = True) -> str:
    command = ("nnUNetv2_train", str(dataset), "3d_fullres", "0", "-tr", trainer, "-device", "cpu", *args)
    output: str = world.run(*command, settings=settings, check=check)
    return output


def kill_when(started: Any, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not reached():
        assert started.poll() is None, started.output.read_text()
        assert time.monotonic() < deadline, started.output.read_text()
        time.sleep(0.01)
    started.kill()


def model(world: Any, dataset: str, trainer: str, plans: str = "nnUNetPlans") -> Path:
    folder: Path = world.results / dataset / f"{trainer}__{plans}__3d_fullres"
    return folder


@pytest.fixture(scope="module")
def taught(planned: Any) -> Any:
    """SIKD teachers of plain labels, of regions with two channels, and of labels with an ignore label."""
    for dataset in NAMES:
        train(planned, dataset, "nnUNetTrainerSIKDTeacher")
    return planned


@pytest.mark.parametrize("dataset", NAMES)
def test_the_teacher_has_no_skip_connections_and_says_what_it_saw(taught: Any, dataset: int) -> None:
    folder = model(taught, NAMES[dataset], "nnUNetTrainerSIKDTeacher")
    checkpoint = load_checkpoint(folder / "fold_0" / "checkpoint_final.pth")
    assert checkpoint["nnunet_kd"]["class_average"] == {"scope": "patch"}
    splits = json.loads((taught.preprocessed / NAMES[dataset] / "splits_final.json").read_text())
    assert checkpoint["nnunet_kd"]["training_cases"] == {NAMES[dataset]: sorted(splits[0]["train"])}
    weights = checkpoint["network_weights"]
    up, first = (weights[f"decoder.{name}.weight"] for name in ("transpconvs.0", "stages.0.convs.0.conv"))
    assert first.shape[1] == up.shape[1]  # what comes up, and nothing else
    assert not (folder / "fold_0" / "validation" / "summary.json").exists()
    log = "".join(file.read_text() for file in (folder / "fold_0").glob("training_log_*.txt"))
    assert "No final validation: this teacher sees images averaged by their labels" in log


def test_stock_prediction_loads_the_teacher(taught: Any) -> None:
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    folder = model(taught, ALPHA, "nnUNetTrainerSIKDTeacher")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in taught.environment.items():
            patch.setenv(name, value)
        predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    weights = load_checkpoint(folder / "fold_0" / "checkpoint_final.pth")["network_weights"]
    predictor.network.load_state_dict(weights)


@pytest.mark.parametrize("dataset", NAMES)
def test_a_student_learns_from_it_on_stock_plans(taught: Any, dataset: int, tmp_path: Path) -> None:
    output = train(taught, dataset, "nnUNetTrainerSIKDStudent")
    folder = model(taught, NAMES[dataset], "nnUNetTrainerSIKDStudent")
    values = [float(value) for value in re.findall(rf"{re.escape(TERM)}: (\S+), weighted", output)]
    assert len(values) == 2
    assert all(value > 0 for value in values)
    checkpoint = load_checkpoint(folder / "fold_0" / "checkpoint_final.pth")
    assert checkpoint["nnunet_kd"]["projector_shapes"] == {}  # equal widths
    assert checkpoint["nnunet_kd"]["settings"]["teachers"]["shape"]["kind"] == "class_average"
    assert (folder / "fold_0" / "validation" / "summary.json").is_file()
    exported = taught.run("nnUNetKD_export", "-m", folder, "-o", tmp_path / "plain")
    assert "fold 0: identical logits" in exported


def test_the_paper_recipe_is_a_preset(taught: Any) -> None:
    settings = {"training": SHORT, "sikd": {"recipe": "paper"}}
    plans = taught.preprocessed / ALPHA / "nnUNetPlans.json"
    renamed = {**json.loads(plans.read_text()), "plans_name": "Paper"}
    (plans.parent / "Paper.json").write_text(json.dumps(renamed))
    train(taught, 1, "nnUNetTrainerSIKDTeacher", "-p", "Paper", settings=settings)
    output = train(taught, 1, "nnUNetTrainerSIKDStudent", "-p", "Paper", settings=settings)
    for trainer in ("nnUNetTrainerSIKDTeacher", "nnUNetTrainerSIKDStudent"):
        resolved = json.loads(
            (model(taught, ALPHA, trainer, "Paper") / "fold_0" / "nnunet_kd_settings.json").read_text()
        )
        assert resolved["training"]["loss"] == "ce"
    assert resolved["guard"] == {"margin": None, "exponent": 0.0}
    (term,) = resolved["terms"]
    assert (term["weight"], term["levels"], term["options"]) == (2.0, ["decoder@1"], {"standardise": False})
    raw, weighted = map(float, re.findall(rf"{re.escape(TERM)}: (\S+), weighted (\S+)", output)[-1])
    assert weighted == pytest.approx(2 * raw, rel=1e-3, abs=2e-4)  # no ramp, no guard
    assert "Dice on training batches" not in output
    # cross entropy alone is never negative; Dice + cross entropy starts near 0 and falls below it
    assert all(float(value) > 0 for value in re.findall(r"train_loss (\S+)", output))


def test_joint_teacher_and_shape_teacher_in_one_student(taught: Any, copied: Any) -> None:
    del taught  # its teachers are in the copy
    settings = {
        "training": SHORT,
        "teachers": {"shape": {"kind": "class_average"}},
        "terms": [
            {"on": "logits", "loss": "kl", "schedule": {"kind": "constant"}},
            {"teacher": "shape", "on": "features", "loss": "mse", "levels": ["decoder@1"], "weight": 2.0,
             "foreground_only": True},
        ],
    }  # fmt: skip
    output = train(copied, 1, "nnUNetTrainerKDStudent", settings=settings)
    found = {name: float(value) for name, value in re.findall(r"(\w+\.\w+\.\w+): (\S+), weighted", output)}
    assert set(found) == {"joint.logits.kl", TERM}
    assert all(value > 0 for value in found.values())


def test_means_of_whole_cases_are_measured_once(copied: Any) -> None:
    settings = {"training": SHORT, "sikd": {"scope": "case"}}
    train(copied, 2, "nnUNetTrainerSIKDTeacher", settings=settings)
    (file,) = (copied.preprocessed / BETA / "nnunet_kd_class_means").glob("*.json")
    written = file.stat().st_mtime_ns
    means = json.loads(file.read_text())["means"]
    data = copied.preprocessed / BETA / file.stem
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    dataset = nnUNetDatasetBlosc2(str(data))
    for case in dataset.identifiers:
        image, labels, _, _ = dataset.load_case(case)
        image, labels = np.asarray(image[:]), np.maximum(np.asarray(labels[0]), 0)
        for channel, label in ((0, 0), (1, 1), (1, 2)):
            expected = image[channel][labels == label].mean()
            assert means[case][channel][label] == pytest.approx(float(expected), abs=1e-5)
    output = train(copied, 2, "nnUNetTrainerSIKDStudent")
    assert float(re.findall(rf"{re.escape(TERM)}: (\S+), weighted", output)[-1]) > 0
    assert file.stat().st_mtime_ns == written
    checkpoint = load_checkpoint(model(copied, BETA, "nnUNetTrainerSIKDTeacher") / "fold_0" / "checkpoint_final.pth")
    assert checkpoint["nnunet_kd"]["class_average"] == {"scope": "case"}


def test_training_goes_on_where_it_stopped(copied: Any) -> None:
    longer = {"training": {**SHORT, "num_epochs": 3, "save_every": 1}}
    for trainer in ("nnUNetTrainerSIKDTeacher", "nnUNetTrainerSIKDStudent"):
        fold = model(copied, ALPHA, trainer) / "fold_0"
        shutil.rmtree(fold.parent, ignore_errors=True)
        words = ("nnUNetv2_train", "1", "3d_fullres", "0", "-tr", trainer, "-device", "cpu")
        started = copied.start(*words, settings=longer)
        kill_when(started, lambda fold=fold: (fold / "checkpoint_latest.pth").is_file())
        before = load_checkpoint(fold / "checkpoint_latest.pth")
        output = train(copied, 1, trainer, "--c", settings=SETTINGS, check=False)
        assert "trained with other settings: training.num_epochs was 3, is 2" in output
        output = train(copied, 1, trainer, "--c", settings=longer)
        assert "Epoch 0" not in output
        assert f"Epoch {before['current_epoch']}" in output
        after = load_checkpoint(fold / "checkpoint_final.pth")
        assert any(
            not torch.equal(after["network_weights"][key], own) for key, own in before["network_weights"].items()
        )
    train(copied, 1, "nnUNetTrainerSIKDStudent", "--val", settings=longer)
    assert (fold / "validation" / "summary.json").is_file()


def test_2d_with_residual_encoder_and_a_smaller_student(copied: Any) -> None:
    copied.run("nnUNetv2_plan_experiment", "-d", "1", "-pl", "nnUNetPlannerResEncM", "-overwrite_plans_name", "ResEnc",
               nnUNet_n_proc_DA="1")  # fmt: skip
    copied.run("nnUNetv2_preprocess", "-d", "1", "-plans_name", "ResEnc", "-c", "2d", "-np", "1",
               nnUNet_n_proc_DA="1")  # fmt: skip
    narrow = ("-d", "1", "-p", "ResEnc", "--width", "0.5", "--min_features", "4", "-plans_name", "Narrow")
    copied.run("nnUNetKD_plan_student", *narrow)
    words = ("nnUNetv2_train", "1", "2d", "0", "-device", "cpu", "-tr")
    copied.run(*words, "nnUNetTrainerSIKDTeacher", "-p", "ResEnc", settings=SETTINGS)
    output = copied.run(*words, "nnUNetTrainerSIKDStudent", "-p", "Narrow", settings=SETTINGS)
    assert "nnUNetTrainerSIKDTeacher__ResEnc__2d" in output
    assert float(re.findall(rf"{re.escape(TERM)}: (\S+), weighted", output)[-1]) > 0
    folder = copied.results / ALPHA / "nnUNetTrainerSIKDStudent__Narrow__2d"
    checkpoint = load_checkpoint(folder / "fold_0" / "checkpoint_final.pth")
    ((dimension, own, other),) = checkpoint["nnunet_kd"]["projector_shapes"].values()
    assert (dimension, 2 * own) == (2, other)


# --- bad input --------------------------------------------------------------------------------------------------------
def test_errors_name_the_next_step(copied: Any) -> None:
    shutil.rmtree(model(copied, GAMMA, "nnUNetTrainerSIKDTeacher"), ignore_errors=True)
    output = train(copied, 3, "nnUNetTrainerSIKDStudent", check=False)
    assert "nnUNetv2_train 003 3d_fullres 0 -tr nnUNetTrainerSIKDTeacher -p nnUNetPlans" in output
    train(copied, 1, "nnUNetTrainerKDControl")
    images = f"{ALPHA}/nnUNetTrainerKDControl__nnUNetPlans__3d_fullres"
    settings = {"training": SHORT, "teachers": {"shape": {"model": images}}}
    output = train(copied, 1, "nnUNetTrainerSIKDStudent", settings=settings, check=False)
    assert "was trained on images and not on averaged ones" in output
    train(copied, 1, "nnUNetTrainerSIKDTeacher")
    averages = f"{ALPHA}/nnUNetTrainerSIKDTeacher__nnUNetPlans__3d_fullres"
    settings = {"training": SHORT, "teachers": {"joint": {"model": averages}}}
    output = train(copied, 1, "nnUNetTrainerKDStudent", settings=settings, check=False)
    assert 'Give it "kind": "class_average" in the settings' in output
    file = copied.preprocessed / ALPHA / "dataset.json"
    dataset_json = json.loads(file.read_text())
    file.write_text(json.dumps({**dataset_json, "labels": {"background": 0, "tumour": 1}}))
    output = train(copied, 1, "nnUNetTrainerSIKDStudent", check=False)
    assert re.search(r"Error: Teacher 'shape' in .*'?tumour'?", output)


def test_a_class_that_never_occurs_is_refused(copied: Any) -> None:
    for folder in (copied.preprocessed / ALPHA,):
        plans = json.loads((folder / "dataset.json").read_text())
        labels = {**plans["labels"], "unicorn": max(plans["labels"].values()) + 1}
        (folder / "dataset.json").write_text(json.dumps({**plans, "labels": labels}))
    output = train(copied, 1, "nnUNetTrainerSIKDTeacher", check=False)
    assert f"of {ALPHA} occur in no training case of fold 0" in output
    shutil.rmtree(model(copied, ALPHA, "nnUNetTrainerSIKDTeacher"))


def test_unknown_recipes_are_refused(planned: Any) -> None:
    output = train(planned, 1, "nnUNetTrainerSIKDTeacher", settings={"sikd": {"recipe": "soup"}}, check=False)
    assert "'sikd.recipe' is 'soup'. Allowed: 'nnunet', 'paper'" in output


def test_plans_with_heads_are_refused(copied: Any, write_side_files: Callable[[Path], None]) -> None:
    raw = copied.raw / ALPHA
    write_side_files(raw)
    target = {"file": "classification.csv", "column": "size", "classes": ["small", "large"]}
    declared = {"tasks": {"segmentation": True, "classification": target}}
    dataset_json = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**dataset_json, "nnunet_kd": declared}))
    copied.plan("-d", "1", "-c", "3d_fullres", "-plans_name", "WithHeads")
    output = train(copied, 1, "nnUNetTrainerSIKDTeacher", "-p", "WithHeads", check=False)
    assert "SIKD trains segmentation only, but WithHeads has heads for classes or boxes" in output
