"""Plan, train, export and predict through the real commands: a student, a head of its own and a shared head."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

pytestmark = pytest.mark.integration

ONE_STEP = {
    "training": {"num_epochs": 1, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1},
    "budget": "total",
}
SMALL = {"num_cases": 5, "num_test_cases": 1, "dimension": 2, "shape": (36, 40)}
FLAGS = ["-device", "cpu", "-npp", "0", "-nps", "0", "--disable_progress_bar"]

# stock nnU-Net in a process in which nnunet_kd cannot be imported; the one part of FLAGS it lacks are -npp and -nps 0
STOCK_ONLY = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nnunet_kd":
            raise ImportError("nnunet_kd is not installed here")
        return None

sys.meta_path.insert(0, Refuse())
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

model, source, target = sys.argv[1:]
predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
predictor.initialize_from_trained_model_folder(model, None)
predictor.predict_from_files_sequential(source, target, save_probabilities=True)
assert not any(name.split(".")[0] == "nnunet_kd" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def trained(nnunet_dirs: Any, make_dataset: Callable[..., Path], run_command: Callable[..., Any]) -> SimpleNamespace:
    """Members 1 (two channels, two labels) and 2, 3 (one channel, a shared head); a teacher; a student of 1."""
    two_labels = {"background": 0, "core": 1, "rim": 2}
    alpha = make_dataset(nnunet_dirs.raw, 1, "Alpha", channels=("T1", "T2"), labels=two_labels, **SMALL)
    beta = make_dataset(nnunet_dirs.raw, 2, "Beta", channels=("T2",), **SMALL)
    make_dataset(nnunet_dirs.raw, 3, "Gamma", channels=("T2",), labels={"background": 0, "tumor": 1}, **SMALL)
    members = {"2": {"lesion": "anything"}, "3": {"tumor": "anything"}}
    head = {"labels": {"background": 0, "anything": 1}, "members": members}
    heads = nnunet_dirs.raw / "heads.json"
    heads.write_text(json.dumps({"mass": head}))
    environment = {**nnunet_dirs.environment, "nnUNetKD_settings": json.dumps(ONE_STEP)}

    def run(*args: str | Path, check: bool = True) -> Any:
        return run_command(args, environment, check=check)

    run("nnUNetKD_plan_and_preprocess", "-d", "1", "2", "3", "--joint", "900", "-c", "2d", "-np", "1", "-npfp", "1",
        "--heads", heads)  # fmt: skip
    run("nnUNetv2_train", "900", "2d", "0", "-tr", "nnUNetTrainerKDTeacher", "-p", "nnUNetKDPlans", "-device", "cpu")
    run("nnUNetv2_train", "1", "2d", "0", "-tr", "nnUNetTrainerKDStudent", "-device", "cpu")
    results = nnunet_dirs.results
    return SimpleNamespace(
        run=run,
        alpha=alpha,
        beta=beta,
        preprocessed=nnunet_dirs.preprocessed,
        teacher=results / "Dataset900_Joint" / "nnUNetTrainerKDTeacher__nnUNetKDPlans__2d",
        student=results / "Dataset001_Alpha" / "nnUNetTrainerKDStudent__nnUNetPlans__2d",
    )


def files_of(folder: Path, ending: str = ".png") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob(f"*{ending}")}


def probabilities_of(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: np.load(file)["probabilities"] for file in folder.glob("*.npz")}


def predict_without_us(trained: SimpleNamespace, model: Path, source: Path, target: Path) -> None:
    trained.run(sys.executable, "-c", STOCK_ONLY, model, source, target)


def check_vanilla(model: Path, num_inputs: int, num_outputs: int) -> None:
    assert {path.name for path in model.iterdir()} == {
        "plans.json", "dataset.json", "dataset_fingerprint.json", "fold_0",
    }  # fmt: skip
    assert "nnunet_kd" not in (model / "plans.json").read_text()
    assert "nnunet_kd" not in (model / "dataset.json").read_text()
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert set(checkpoint) == {"network_weights", "trainer_name", "init_args", "inference_allowed_mirroring_axes"}
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["init_args"]["plans"] == json.loads((model / "plans.json").read_text())
    weights = checkpoint["network_weights"]
    assert weights["encoder.stages.0.0.convs.0.conv.weight"].shape[1] == num_inputs
    assert weights["decoder.seg_layers.0.weight"].shape[0] == num_outputs


def test_exported_student_predicts_the_same_files_without_nnunet_kd(trained: SimpleNamespace, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    result = trained.run("nnUNetKD_export", "-m", trained.student, "-o", exported)
    assert "fold 0: identical logits" in result.stdout
    check_vanilla(exported, num_inputs=2, num_outputs=3)

    source = trained.alpha / "imagesTs"
    trained.run("nnUNetv2_predict", "-d", "1", "-c", "2d", "-f", "0", "-tr", "nnUNetTrainerKDStudent", "-i", source,
                "-o", tmp_path / "stock", "--save_probabilities", *FLAGS)  # fmt: skip
    trained.run("nnUNetKD_predict", "-m", trained.student, "-i", source, "-o", tmp_path / "ours",
                "--save_probabilities", *FLAGS)  # fmt: skip
    predict_without_us(trained, exported, source, tmp_path / "exported_predictions")
    expected = files_of(tmp_path / "stock")
    assert list(expected) == ["alpha_005.png"]
    assert files_of(tmp_path / "ours") == expected
    assert files_of(tmp_path / "exported_predictions") == expected
    for folder in ("ours", "exported_predictions"):
        np.testing.assert_array_equal(
            probabilities_of(tmp_path / folder)["alpha_005.npz"], probabilities_of(tmp_path / "stock")["alpha_005.npz"]
        )


@pytest.mark.parametrize(
    ("head", "member", "images", "case", "channels", "labels"),
    [
        ("Dataset001_Alpha", None, "alpha", "alpha_005", 2, {"background": 0, "core": 1, "rim": 2}),
        ("mass", "Dataset002_Beta", "beta", "beta_005", 1, {"background": 0, "anything": 1}),
    ],
)
def test_exported_head_predicts_the_same_files_without_nnunet_kd(
    trained: SimpleNamespace,
    tmp_path: Path,
    head: str,
    member: str | None,
    images: str,
    case: str,
    channels: int,
    labels: dict[str, int],
) -> None:
    which = ["--head", head] + ([] if member is None else ["--member", member])
    exported = tmp_path / "exported"
    result = trained.run("nnUNetKD_export", "-m", trained.teacher, "-o", exported, *which)
    assert "fold 0: " in result.stdout
    check_vanilla(exported, channels, len(labels))
    assert json.loads((exported / "dataset.json").read_text())["labels"] == labels
    plans = json.loads((exported / "plans.json").read_text())
    assert plans["dataset_name"] == (member or head)

    source = getattr(trained, images) / "imagesTs"
    trained.run("nnUNetKD_predict", "-m", trained.teacher, *which, "-i", source, "-o", tmp_path / "ours",
                "--save_probabilities", *FLAGS)  # fmt: skip
    predict_without_us(trained, exported, source, tmp_path / "exported_predictions")
    expected = files_of(tmp_path / "ours")
    assert list(expected) == [f"{case}.png"]
    assert files_of(tmp_path / "exported_predictions") == expected
    probabilities = probabilities_of(tmp_path / "ours")[f"{case}.npz"]
    assert probabilities.shape == (len(labels), 1, *SMALL["shape"])
    np.testing.assert_array_equal(probabilities_of(tmp_path / "exported_predictions")[f"{case}.npz"], probabilities)
    segmentation = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "ours" / f"{case}.png")))
    np.testing.assert_array_equal(segmentation, probabilities.argmax(0)[0])


def test_head_predicts_what_the_teacher_s_own_validation_predicted(trained: SimpleNamespace, tmp_path: Path) -> None:
    validation = files_of(trained.teacher / "fold_0" / "Dataset001_Alpha" / "validation")
    for case in validation:
        for image in (trained.alpha / "imagesTr").glob(case.replace(".png", "_*.png")):
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / image.name).symlink_to(image)
    trained.run("nnUNetKD_predict", "-m", trained.teacher, "--head", "1", "-i", tmp_path / "in", "-o", tmp_path / "out",
                *FLAGS)  # fmt: skip
    assert validation
    assert files_of(tmp_path / "out") == validation


def test_mistakes_are_named(trained: SimpleNamespace, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    source = trained.beta / "imagesTs"
    export_student = ("nnUNetKD_export", "-m", trained.student, "-o")
    export_teacher = ("nnUNetKD_export", "-m", trained.teacher, "-o")
    predict_teacher = ("nnUNetKD_predict", "-m", trained.teacher, "-i", source, "-device", "cpu", "-o")
    new = tmp_path / "new"
    both = "Say with --member which one the images are like: Dataset002_Beta, Dataset003_Gamma"
    mistakes = [
        ((*export_student, full), "exists and is not an empty folder"),
        ((*export_student, new, "-f", "0", "3"), "fold_3. Folds that have it: 0"),
        ((*export_student, new, "--head", "mass"), "not a joint teacher"),
        ((*export_teacher, new), "say with --head"),
        ((*predict_teacher, new, "--head", "mass"), both),
    ]
    for command, message in mistakes:
        result = trained.run(*command, check=False)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert not new.exists()
    assert [file.name for file in full.iterdir()] == ["file"]
