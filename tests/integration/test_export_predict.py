"""Plan, train, export and predict through the real commands: a student, and one head of its teacher."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nnunet_kd.cli.export import main as export_command
from nnunet_kd.cli.predict import main as predict_command

pytestmark = pytest.mark.integration

ONE_STEP = {
    "training": {"num_epochs": 1, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1},
    "budget": "total",
}
SMALL = {"num_cases": 5, "num_test_cases": 1, "dimension": 2, "shape": (36, 40)}
FLAGS = ["-device", "cpu", "-npp", "0", "-nps", "0", "--disable_progress_bar"]
CASE = "alpha_005"

# Stock nnU-Net where nnunet_kd cannot be imported: triples of model folder, input folder, output folder.
STOCK_ONLY = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nnunet_kd":
            raise ImportError("nnunet_kd is not installed here")
        return None

sys.meta_path.insert(0, Refuse())
import os
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

os.environ.pop("nnUNet_extTrainer")
for model, source, target in zip(*[iter(sys.argv[1:])] * 3):
    os.makedirs(target)
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(model, None)
    predictor.predict_from_files_sequential(source, target, save_probabilities=True)
"""


@pytest.fixture(scope="module")
def trained(
    make_world: Callable[[], Any], make_dataset: Callable[..., Path], run_command: Callable[..., Any]
) -> SimpleNamespace:
    """A teacher of Alpha (T1, T2; two labels) and Beta (T2; one label), and a student of Alpha: one step each.

    Planning, the student and its stock prediction run in fresh processes, with workers that are spawned.
    """
    world = make_world()
    labels = {"background": 0, "core": 1, "rim": 2}
    alpha = make_dataset(world.raw, 1, "Alpha", channels=("T1", "T2"), labels=labels, **SMALL)
    make_dataset(world.raw, 2, "Beta", channels=("T2",), **SMALL)
    environment = {**world.environment, "nnUNetKD_settings": json.dumps(ONE_STEP), "nnUNet_n_proc_DA": "1"}

    def run_fresh(*args: str | Path) -> None:
        run_command(args, environment)

    run_fresh("nnUNetKD_plan_and_preprocess", "-d", "2", "1", "--joint", "900", "-c", "2d", "-np", "1", "-npfp", "1")
    world.train(900, "Teacher", "-p", "nnUNetKDPlans", configuration="2d", settings=ONE_STEP)
    run_fresh("nnUNetv2_train", "1", "2d", "0", "-tr", "nnUNetTrainerKDStudent", "-device", "cpu")
    return SimpleNamespace(
        run=world.run,
        run_fresh=run_fresh,
        environment=environment,
        alpha=alpha,
        teacher=world.model("Dataset900_Joint", "Teacher", "nnUNetKDPlans", "2d"),
        student=world.model("Dataset001_Alpha", "Student", configuration="2d"),
    )


@pytest.fixture
def in_process(trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call a command's entry point here, because a process of its own costs seconds."""
    for name, value in trained.environment.items():
        monkeypatch.setenv(name, value)

    def call(command: Callable[[Sequence[str]], None], *args: str | Path) -> None:
        command([str(argument) for argument in args])

    return call


def probabilities_of(folder: Path, case: str) -> np.ndarray:
    return np.load(folder / f"{case}.npz")["probabilities"]


def check_vanilla(model: Path) -> None:
    assert {path.name for path in model.iterdir()} == {
        "plans.json", "dataset.json", "dataset_fingerprint.json", "fold_0",
    }  # fmt: skip
    plans = json.loads((model / "plans.json").read_text())
    dataset_json = json.loads((model / "dataset.json").read_text())
    assert plans["dataset_name"] == "Dataset001_Alpha"
    assert "nnunet_kd" not in plans
    assert dataset_json["labels"] == {"background": 0, "core": 1, "rim": 2}
    assert dataset_json["channel_names"] == {"0": "T1", "1": "T2"}
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert checkpoint.pop("nnunet_kd")["training_cases"]["Dataset001_Alpha"]  # so that it cannot teach across a leak
    assert set(checkpoint) == {"network_weights", "trainer_name", "init_args", "inference_allowed_mirroring_axes"}
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["init_args"] == {"plans": plans, "configuration": "2d", "fold": 0, "dataset_json": dataset_json}
    weights = checkpoint["network_weights"]
    assert weights["encoder.stages.0.0.convs.0.conv.weight"].shape[1] == 2
    assert weights["decoder.seg_layers.0.weight"].shape[0] == 3


def test_exports_predict_the_same_files_without_nnunet_kd(
    trained: SimpleNamespace, in_process: Callable[..., None], tmp_path: Path
) -> None:
    run, source = trained.run, trained.alpha / "imagesTs"
    head = ["--head", "Dataset001_Alpha"]
    output = run("nnUNetKD_export", "-m", trained.student, "-o", tmp_path / "student")
    assert "fold 0: identical logits" in output
    elsewhere = str(tmp_path / "elsewhere")  # a teacher predicts without its members
    output = run("nnUNetKD_export", "-m", trained.teacher, "-o", tmp_path / "head", *head)
    assert "fold 0: " in output
    check_vanilla(tmp_path / "student")
    check_vanilla(tmp_path / "head")

    trained.run_fresh("nnUNetv2_predict", "-d", "1", "-c", "2d", "-f", "0", "-tr", "nnUNetTrainerKDStudent",
                      "-i", source, "-o", tmp_path / "student_stock", "--save_probabilities", *FLAGS)  # fmt: skip
    run("nnUNetKD_predict", "-m", trained.teacher, *head, "-i", source,
        "-o", tmp_path / "head_ours", "--save_probabilities", *FLAGS, nnUNet_preprocessed=elsewhere)  # fmt: skip
    in_process(predict_command, "-m", trained.student, "-i", source, "-o", tmp_path / "student_ours",
               "--save_probabilities", *FLAGS)  # fmt: skip
    trained.run_fresh(sys.executable, "-c", STOCK_ONLY, tmp_path / "student", source, tmp_path / "student_exported",
                      tmp_path / "head", source, tmp_path / "head_exported")  # fmt: skip

    compared = {"student_stock": ("student_ours", "student_exported"), "head_ours": ("head_exported",)}
    for expected, others in compared.items():
        probabilities = probabilities_of(tmp_path / expected, CASE)
        assert probabilities.shape == (3, 1, *SMALL["shape"])
        segmentation = np.asarray(Image.open(tmp_path / expected / f"{CASE}.png"))
        np.testing.assert_array_equal(segmentation, probabilities.argmax(0)[0])
        for other in others:
            assert [file.name for file in (tmp_path / other).glob("*.png")] == [f"{CASE}.png"]
            assert (tmp_path / other / f"{CASE}.png").read_bytes() == (tmp_path / expected / f"{CASE}.png").read_bytes()
            np.testing.assert_array_equal(probabilities_of(tmp_path / other, CASE), probabilities)


def test_head_predicts_what_the_teacher_s_own_validation_predicted(
    trained: SimpleNamespace, in_process: Callable[..., None], tmp_path: Path
) -> None:
    validated = list((trained.teacher / "fold_0" / "Dataset001_Alpha" / "validation").glob("*.png"))
    (tmp_path / "in").mkdir()
    for file in validated:
        for image in (trained.alpha / "imagesTr").glob(f"{file.stem}_*.png"):
            (tmp_path / "in" / image.name).symlink_to(image)
    in_process(predict_command, "-m", trained.teacher, "--head", "1", "-i", tmp_path / "in", "-o", tmp_path / "out",
               *FLAGS)  # fmt: skip
    assert validated
    for file in validated:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_mistakes_are_named(
    trained: SimpleNamespace, in_process: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, new = tmp_path / "full", tmp_path / "new"
    full.mkdir()
    (full / "file").touch()
    images = ["-i", trained.alpha / "imagesTs", "-device", "cpu"]
    mistakes: list[tuple[Callable[..., None], list[str | Path], str]] = [
        (export_command, ["-m", trained.student, "-o", full], "exists and is not an empty folder"),
        (export_command, ["-m", trained.student, "-o", new, "-f", "0", "3"], "fold_3. Folds that have it: 0"),
        (export_command, ["-m", trained.student, "-o", new, "--head", "x"], "not a joint teacher"),
        (export_command, ["-m", trained.teacher, "-o", new], "say with --head"),
        (predict_command, ["-m", trained.teacher, "-o", new, "--head", "x", *images], "Heads: Dataset002_Beta"),
        (predict_command, ["-m", trained.student, "-o", new, "--head", "x", *images], "not a joint teacher"),
        (predict_command, ["-m", tmp_path / "no", "-o", new, *images], "There is no trained model"),
    ]
    for command, arguments, message in mistakes:
        with pytest.raises(SystemExit) as stopped:
            in_process(command, *arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not new.exists()
    assert [file.name for file in full.iterdir()] == ["file"]
