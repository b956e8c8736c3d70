"""Teacher, students and control through the real commands."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_kd.teachers.checkpoint import load_checkpoint

pytestmark = pytest.mark.integration

ALPHA, BETA, GAMMA = "Dataset001_Alpha", "Dataset002_Beta", "Dataset003_Gamma"
NAMES = {1: ALPHA, 2: BETA, 3: GAMMA}
ONE_STEP = {"num_epochs": 1, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1, "seed": 1}
TERMS = [
    {"on": "logits", "loss": "kl", "temperature": 2.0, "schedule": {"kind": "constant"}},
    {"on": "features", "loss": "mse", "levels": ["bottleneck", "decoder@1/2"], "weight": 0.5},
]
STUDENT = {"training": {**ONE_STEP, "num_epochs": 2, "num_iterations_per_epoch": 2}, "terms": TERMS}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def logs(fold: Path) -> str:
    return "".join(path.read_text() for path in sorted(fold.glob("training_log_*.txt")))


def stock_keys(model: Path) -> dict[str, torch.Size]:
    """Keys and shapes of the stock network of a model's plans."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans, dataset_json = PlansManager(read(model / "plans.json")), read(model / "dataset.json")
    configuration = plans.get_configuration(model.name.split("__")[-1])
    network = nnUNetTrainer.build_network_architecture(
        plans,
        configuration,
        determine_num_input_channels(plans, configuration, dataset_json),
        plans.get_label_manager(dataset_json).num_segmentation_heads,
        True,
    )
    return {key: value.shape for key, value in network.state_dict().items()}


def shapes(checkpoint: dict[str, Any]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in checkpoint["network_weights"].items()}


def kill_when(started: Any, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not reached():
        code = started.poll()
        assert code is None, f"ended by itself with {code}:\n{started.output.read_text()}"
        assert time.monotonic() < deadline, started.output.read_text()
        time.sleep(0.01)
    started.kill()


@pytest.fixture(scope="module")
def trained(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy of the trained world: what is planned and trained here would change what the tests of other files find."""
    return trained.copy(tmp_path_factory.mktemp("train"))


# --- the teacher ------------------------------------------------------------------------------------------------------
def test_teacher_logs_every_member(trained: Any) -> None:
    lines = re.findall(r"Pseudo dice per member: (.*)", logs(trained.teacher / "fold_0"))
    assert len(lines) == 2
    for line in lines:
        values = re.findall(r"(Dataset\w+) (\d\.\d+) \((\d+) steps\)", line)
        assert [name for name, _, _ in values] == list(NAMES.values())
        assert all(0 <= float(dice) <= 1 for _, dice, _ in values)
    assert sum(int(steps) for steps in re.findall(r"\((\d+) steps\)", lines[-1])) == 4
    logged = load_checkpoint(trained.teacher / "fold_0" / "checkpoint_final.pth")["logging"]
    means = [np.mean([float(v) for v in re.findall(r"\w (\d\.\d+) \(", line)]) for line in lines]
    assert logged["mean_fg_dice"] == pytest.approx(means, abs=1e-4)  # what chooses checkpoint_best
    assert [len(classes) for classes in logged["dice_per_class_or_region"]] == [5, 5]


def test_teacher_validates_every_member_and_sums_up(trained: Any) -> None:
    fold = trained.teacher / "fold_0"
    overall = read(fold / "validation" / "summary.json")
    means = []
    for name in NAMES.values():
        (case,) = read(trained.preprocessed / name / "splits_final.json")[0]["val"]
        assert {path.name for path in (fold / name / "validation").iterdir()} == {f"{case}.nii.gz", "summary.json"}
        own = read(fold / name / "validation" / "summary.json")
        assert len(own["metric_per_case"]) == 1
        assert overall["members"][name] == own["foreground_mean"]
        means.append(own["foreground_mean"]["Dice"])
    assert overall["foreground_mean"]["Dice"] == pytest.approx(np.nanmean(means))
    assert [case["member"] for case in overall["metric_per_case"]] == list(NAMES.values())
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(next((fold / GAMMA / "validation").glob("*.nii.gz")))))
    assert set(np.unique(predicted)) <= {0, 1, 2}


def test_teacher_records_its_training_cases_and_settings(trained: Any) -> None:
    fold = trained.teacher / "fold_0"
    extra = load_checkpoint(fold / "checkpoint_final.pth")["nnunet_kd"]
    for name in NAMES.values():
        split = read(trained.preprocessed / name / "splits_final.json")[0]
        assert sorted(extra["training_cases"][name]) == sorted(split["train"])
        assert not set(extra["training_cases"][name]) & set(split["val"])
    assert sum(extra["steps"].values()) == 4
    settings = read(fold / "nnunet_kd_settings.json")
    assert settings == extra["settings"]
    assert (settings["budget"], settings["training"]["num_epochs"]) == ("total", 2)


def test_nothing_of_ours_is_in_the_raw_and_stock_folders(trained: Any) -> None:
    for name in NAMES.values():
        assert {path.name for path in (trained.raw / name).iterdir()} <= {
            "dataset.json", "imagesTr", "labelsTr", "imagesTs", "labelsTs",
        }  # fmt: skip
        stock = read(trained.preprocessed / name / "nnUNetPlans.json")
        ours = read(trained.preprocessed / name / "nnUNetKDPlans.json")
        assert "nnunet_kd" not in stock
        assert "Dataset900_Joint" in ours["nnunet_kd"]["member_of"]
        assert ours["configurations"] == stock["configurations"]
    assert not list((trained.preprocessed / "Dataset900_Joint").rglob("*.b2nd"))


# --- students and control ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def students(trained: Any) -> Any:
    for dataset in NAMES:
        trained.train(dataset, "Student", *(["--npz"] if dataset == 1 else []), settings=STUDENT)
    return trained


@pytest.mark.parametrize("dataset", [1, 2, 3])
def test_student(students: Any, dataset: int) -> None:
    model = students.model(NAMES[dataset], "Student")
    fold = model / "fold_0"
    checkpoint = load_checkpoint(fold / "checkpoint_final.pth")
    assert shapes(checkpoint) == stock_keys(model), "a student's network is its plans' stock network"
    extra = checkpoint["nnunet_kd"]
    assert sorted(extra["projector_shapes"]) == ["joint bottleneck", "joint decoder@1/2"]
    assert len(checkpoint["optimizer_state"]["param_groups"]) == 2
    assert extra["teachers"]["joint"]["files"] == [str(students.teacher / "fold_0" / "checkpoint_final.pth")]
    assert extra["teachers"]["joint"]["leaked_cases"] == []
    log = logs(fold)
    for term in ("joint.logits.kl", "joint.features.mse"):
        assert len(re.findall(rf"{re.escape(term)}: [\d.]+, weighted [\d.]+", log)) == 2
        for key in (term, f"{term} weighted"):
            values = checkpoint["logging"][key]
            assert len(values) == 2
            assert all(np.isfinite(values))
            assert all(value > 0 for value in values)
    summary = read(fold / "validation" / "summary.json")
    assert len(summary["metric_per_case"]) == 1
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1
    settings = read(fold / "nnunet_kd_settings.json")
    assert settings["joint"] == "Dataset900_Joint"
    assert (fold / "progress.png").is_file()


def test_npz(students: Any) -> None:
    validation = students.model(ALPHA, "Student") / "fold_0" / "validation"
    (file,) = validation.glob("*.npz")
    probabilities = np.load(file)["probabilities"].astype(float)
    assert probabilities.shape[0] == 2
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-2)


def test_stock_prediction_with_a_student(students: Any, tmp_path: Path) -> None:
    source = students.raw / BETA / "imagesTs"
    students.run(
        "nnUNetv2_predict", "-d", "2", "-c", "3d_fullres", "-f", "0", "-tr", "nnUNetTrainerKDStudent",
        "-i", source, "-o", tmp_path, "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta",
    )  # fmt: skip
    (file,) = tmp_path.glob("*.nii.gz")
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    assert predicted.shape == sitk.GetArrayFromImage(sitk.ReadImage(str(next(source.glob("*.nii.gz"))))).shape
    assert set(np.unique(predicted)) <= {0, 1, 2}


def test_find_best_configuration(students: Any) -> None:
    output = students.run(
        "nnUNetv2_find_best_configuration", "1", "-c", "3d_fullres", "-f", "0", "-tr", "nnUNetTrainerKDStudent",
        "--disable_ensembling", "-np", "1",
    )  # fmt: skip
    assert "nnUNetv2_predict" in output
    assert (students.results / ALPHA / "inference_information.json").is_file()


def test_validation_needs_no_teacher_and_gives_the_same_result(students: Any) -> None:
    validation = students.model(ALPHA, "Student") / "fold_0" / "validation"
    before = read(validation / "summary.json")
    (validation / "summary.json").unlink()
    hidden = students.teacher.rename(students.teacher.with_name("away"))
    try:
        students.train(1, "Student", "--val", settings=STUDENT)
    finally:
        hidden.rename(students.teacher)
    assert read(validation / "summary.json")["foreground_mean"] == before["foreground_mean"]


def test_finished_training_is_not_repeated(students: Any) -> None:
    fold = students.model(BETA, "Student") / "fold_0"
    before = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    output = students.train(2, "Student", "--c", settings=STUDENT)
    assert "Epoch 0" not in output
    after = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert after["current_epoch"] == before["current_epoch"] == 2
    for key, value in before["network_weights"].items():
        assert torch.equal(value, after["network_weights"][key])


def test_other_settings_do_not_continue_a_training(students: Any) -> None:
    other = {**STUDENT, "terms": [{**TERMS[0], "weight": 2.0}, TERMS[1]]}
    output = students.train(2, "Student", "--c", settings=other, check=False)
    assert "was trained with other settings" in output
    assert "nnunet_kd_settings.json" in output


# --- killed and continued ---------------------------------------------------------------------------------------------
LONG = {**ONE_STEP, "num_epochs": 5, "save_every": 1}


def test_teacher_refuses_to_spoil_folds_of_other_joint_plans(copied: Any) -> None:
    """All folds share one plans.json; heads in another order would be read from the wrong channels."""
    recorded = (copied.teacher / "plans.json").read_bytes()
    file = copied.preprocessed / "Dataset900_Joint" / "nnUNetKDPlans.json"
    plans = read(file)
    heads = plans["nnunet_kd"]["heads"]
    plans["nnunet_kd"]["heads"] = {name: heads[name] for name in reversed(heads)}
    file.write_text(json.dumps(plans))
    settings = {"training": ONE_STEP, "budget": "total"}
    for fold, more in ((1, ()), (0, ("--c",))):
        output = copied.train(900, "Teacher", "-p", "nnUNetKDPlans", *more, fold=fold, settings=settings, check=False)
        assert "were trained under other joint plans (heads changed since)" in output
        assert "--joint NEW_ID" in output
    assert (copied.teacher / "plans.json").read_bytes() == recorded
    assert not (copied.teacher / "fold_1").exists()


def test_killed_student_of_a_smaller_network_continues(trained: Any) -> None:
    trained.run("nnUNetKD_plan_student", "-d", "1", "--width", "0.25", "-plans_name", "nnUNetKDPlansW25")
    settings = {"training": LONG, "terms": TERMS, "guard": {"margin": 0.1}}
    fold = trained.model(ALPHA, "Student", "nnUNetKDPlansW25") / "fold_0"
    command = trained.train_command(1, "Student", "-p", "nnUNetKDPlansW25")
    kill_when(
        trained.start(*command, settings=settings),
        lambda: (fold / "checkpoint_latest.pth").is_file() and "Epoch 2" in logs(fold),
    )
    assert not (fold / "checkpoint_final.pth").exists()
    trained.run(*command, "--c", settings=settings)
    epochs = [int(epoch) for epoch in re.findall(r": Epoch (\d+)", logs(fold))]
    assert set(epochs) == set(range(5))
    second = epochs[len(epochs) - epochs[::-1].index(min(epochs[3:])) - 1 :]
    assert second == list(range(second[0], 5)), "the second run goes on without a gap"
    assert second[0] >= 1
    checkpoint = load_checkpoint(fold / "checkpoint_final.pth")
    assert checkpoint["current_epoch"] == 5
    one_per_epoch = [
        "train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs", "epoch_end_timestamps",
        "joint.logits.kl", "joint.logits.kl weighted", "joint.features.mse", "joint.features.mse weighted",
    ]  # fmt: skip
    assert {key: len(checkpoint["logging"][key]) for key in one_per_epoch} == dict.fromkeys(one_per_epoch, 5)
    assert checkpoint["nnunet_kd"]["competence"]["joint"] is not None
    assert not (fold / "checkpoint_latest.pth").exists()
    assert not list(fold.glob(".*.tmp"))
    assert checkpoint["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"].shape[0] == 8


def test_killed_teacher_continues_with_its_classifier_of_members(trained: Any) -> None:
    settings = {"training": {**LONG, "num_epochs": 4}, "budget": "total", "alignment": "dann"}
    fold = trained.teacher / "fold_1"
    command = trained.train_command(900, "Teacher", "-p", "nnUNetKDPlans", fold=1)
    kill_when(trained.start(*command, settings=settings), lambda: (fold / "checkpoint_latest.pth").is_file())
    trained.run(*command, "--c", settings=settings)
    checkpoint = load_checkpoint(fold / "checkpoint_final.pth")
    assert checkpoint["current_epoch"] == 4
    extra = checkpoint["nnunet_kd"]
    assert sum(extra["steps"].values()) == 4
    assert any(key.startswith("member_classifier") for key in extra["auxiliary"])
    assert not any("classifier" in key for key in checkpoint["network_weights"])
    splits = read(trained.preprocessed / ALPHA / "splits_final.json")
    assert sorted(extra["training_cases"][ALPHA]) == sorted(splits[1]["train"])


# --- the control ------------------------------------------------------------------------------------------------------
def in_process_training(trainer: str, prepare: Callable[[Any], None]) -> dict[str, Any]:
    from nnunetv2.run.run_training import get_trainer_from_args

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    built = get_trainer_from_args("1", "3d_fullres", 2, trainer, "nnUNetPlans", False, torch.device("cpu"))
    prepare(built)
    built.run_training()
    return torch.load(Path(built.output_folder) / "checkpoint_final.pth", weights_only=False)


def test_control_is_stock_nnunet_step_for_step(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in planned.environment.items():
        monkeypatch.setenv(name, value)
    budget = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
    monkeypatch.setenv("nnUNetKD_settings", json.dumps({"training": budget}))

    def shorten(trainer: Any) -> None:
        for name, value in budget.items():
            setattr(trainer, name, value)

    stock = in_process_training("nnUNetTrainer", shorten)
    control = in_process_training("nnUNetTrainerKDControl", lambda trainer: None)
    assert list(control["network_weights"]) == list(stock["network_weights"])
    for key, value in stock["network_weights"].items():
        assert torch.equal(control["network_weights"][key], value), key
    state, own = stock["optimizer_state"], control["optimizer_state"]
    assert own["param_groups"] == state["param_groups"]
    for index, values in state["state"].items():
        assert torch.equal(own["state"][index]["momentum_buffer"], values["momentum_buffer"])
    for key in ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs"):
        assert control["logging"][key] == stock["logging"][key], key
    assert set(control) - set(stock) == {"nnunet_kd"}


# --- any nnU-Net as the teacher ---------------------------------------------------------------------------------------
def test_any_nnunet_teaches_and_settings_may_be_a_file(trained: Any, tmp_path: Path) -> None:
    for fold in (0, 3):
        trained.train(1, "Control", settings={"training": ONE_STEP}, fold=fold)
    control = trained.model(ALPHA, "Control")
    (tmp_path / "settings.yaml").write_text(
        f"training: {json.dumps(ONE_STEP)}\n"
        f"teachers:\n  own: {{model: {control.relative_to(trained.results)}, fold: [0, 3], allow_leakage: true}}\n"
        "terms:\n- {teacher: own, loss: dist, schedule: {kind: constant}}\n"
    )
    output = trained.train(1, "Student", fold=3, nnUNetKD_settings=str(tmp_path / "settings.yaml"))
    assert "LEAKAGE ACCEPTED" in output
    checkpoint = load_checkpoint(trained.model(ALPHA, "Student") / "fold_3" / "checkpoint_final.pth")
    taught = checkpoint["nnunet_kd"]["teachers"]["own"]
    assert len(taught["files"]) == 2
    (leaked,) = read(trained.preprocessed / ALPHA / "splits_final.json")[3]["val"]
    assert taught["leaked_cases"] == [leaked]
    assert checkpoint["logging"]["own.logits.dist"][0] > 0
    fold = trained.model(ALPHA, "Student") / "fold_3"
    assert read(fold / "validation" / "summary.json")["nnunet_kd"] == {"accepted_leakage": {"own": [leaked]}}
    splits = read(trained.preprocessed / ALPHA / "splits_final.json")
    seen = {*splits[0]["train"], *splits[3]["train"]}
    assert set(checkpoint["nnunet_kd"]["training_cases"][ALPHA]) == seen  # its own, and through its teachers all others


# --- other configurations, architectures and heads --------------------------------------------------------------------
def test_two_dimensional_images_and_volumes_meet_in_2d(trained: Any, make_dataset: Callable[..., Path]) -> None:
    make_dataset(trained.raw, 4, "Delta", dimension=2, shape=(24, 28))
    message = trained.plan("-d", "1", "4", "--joint", "901", "-c", "3d_fullres", check=False)
    assert "Dataset004_Delta has no configuration 3d_fullres" in message
    output = trained.plan("-d", "1", "4", "--joint", "901", "--joint_name", "Flat", "--width", "0.25")
    assert "no joint 3d_fullres, because it is not planned for Dataset004_Delta" in output
    settings = {"training": ONE_STEP, "budget": "total"}
    trained.train(901, "Teacher", "-p", "nnUNetKDPlans", configuration="2d", settings=settings)
    for dataset in (1, 4):
        trained.train(dataset, "Student", configuration="2d", settings={**STUDENT, "training": ONE_STEP})
    student = trained.model("Dataset004_Delta", "Student", configuration="2d")
    assert read(student / "fold_0" / "nnunet_kd_settings.json")["joint"] == "Dataset901_Flat"
    assert len(list((student / "fold_0" / "validation").glob("*.png"))) == 1
    teacher = trained.model("Dataset901_Flat", "Teacher", "nnUNetKDPlans", "2d")
    assert len(list((teacher / "fold_0" / "Dataset004_Delta" / "validation").glob("*.png"))) == 1
    assert len(list((teacher / "fold_0" / ALPHA / "validation").glob("*.nii.gz"))) == 1


def test_residual_encoders_on_the_same_preprocessed_data(trained: Any) -> None:
    data = {p: p.stat().st_mtime_ns for p in (trained.preprocessed / ALPHA / "nnUNetPlans_3d_fullres").iterdir()}
    planner = ("-pl", "nnUNetPlannerResEncM", "-gpu_memory_target", "1", "--width", "0.25")
    trained.plan("-d", "1", "2", "--joint", "902", "-c", "3d_fullres", "-plans_name", "nnUNetKDResEncPlans", *planner)
    assert {path: path.stat().st_mtime_ns for path in data} == data
    settings = {"training": ONE_STEP, "budget": "total"}
    trained.train(902, "Teacher", "-p", "nnUNetKDResEncPlans", settings=settings)
    student = {**STUDENT, "training": ONE_STEP, "joint": "Dataset902_Joint"}
    trained.train(2, "Student", "-p", "nnUNetResEncUNetMPlans", settings=student)
    model = trained.model(BETA, "Student", "nnUNetResEncUNetMPlans")
    checkpoint = load_checkpoint(model / "fold_0" / "checkpoint_final.pth")
    assert shapes(checkpoint) == stock_keys(model)
    assert "encoder.stem.convs.0.conv.weight" in checkpoint["network_weights"]
    assert "Dataset902_Joint" in checkpoint["nnunet_kd"]["teachers"]["joint"]["files"][0]


def test_shared_head(trained: Any, tmp_path: Path) -> None:
    heads = {
        "tumour": {
            "labels": {"background": 0, "tumour": 1},
            "members": {"1": {"lesion": "tumour"}, "3": {"lesion": "tumour", "cyst": "tumour"}},
        }
    }
    (tmp_path / "heads.json").write_text(json.dumps(heads))
    trained.plan(
        "-d", "1", "2", "3", "--joint", "903", "-c", "3d_fullres", "--width", "0.25", "--heads", tmp_path / "heads.json"
    )
    settings = {"training": {**ONE_STEP, "num_iterations_per_epoch": 3}, "budget": "total"}
    trained.train(903, "Teacher", "-p", "nnUNetKDPlans", settings=settings)
    fold = trained.model("Dataset903_Joint", "Teacher", "nnUNetKDPlans") / "fold_0"
    assert list(read(fold / ALPHA / "validation" / "summary.json")["mean"]) == ["1"]
    assert list(read(fold / GAMMA / "validation" / "summary.json")["mean"]) == ["(1, 2)"]
    weights = load_checkpoint(fold / "checkpoint_final.pth")["network_weights"]
    assert weights["decoder.seg_layers.0.weight"].shape[0] == 2 + 2  # the shared head, and Beta's regions
    trained.train(3, "Student", fold=0, settings={**STUDENT, "training": ONE_STEP, "joint": "903"}, check=True)
    student = load_checkpoint(trained.model(GAMMA, "Student") / "fold_0" / "checkpoint_final.pth")
    assert student["network_weights"]["decoder.seg_layers.0.weight"].shape[0] == 3
    assert student["logging"]["joint.logits.kl"][0] > 0

    case = next((fold / GAMMA / "validation").glob("*.nii.gz"))
    source = tmp_path / "images"
    source.mkdir()
    for image in (trained.raw / GAMMA / "imagesTr").glob(f"{case.name.split('.')[0]}_*"):
        (source / image.name).symlink_to(image)
    common = ["-m", fold.parent, "--head", "tumour", "--member", "3"]
    trained.run("nnUNetKD_predict", *common, "-i", source, "-o", tmp_path / "out", "-device", "cpu",
                "-npp", "0", "-nps", "0")  # fmt: skip
    files = (tmp_path / "out" / case.name, case)
    predicted, validated = (sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in files)
    np.testing.assert_array_equal(predicted, validated > 0)  # the validation shows the head as the member's first label
    trained.run("nnUNetKD_export", *common, "-o", tmp_path / "export")
    assert read(tmp_path / "export" / "dataset.json")["labels"]["tumour"] == 1
    trained.run("nnUNetKD_predict", "-m", fold.parent, "--head", "3", "-i", source, "-o", tmp_path / "own",
                "-device", "cpu", "-npp", "0", "-nps", "0")  # fmt: skip
    own = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "own" / case.name)))
    np.testing.assert_array_equal(own, validated)  # in Gamma's labels, as the validation


# --- cascade ----------------------------------------------------------------------------------------------------------
def add_low_resolution(plans_file: Path) -> None:
    """What nnU-Net plans for large images: half the resolution, and a cascade on top of it."""
    plans = read(plans_file)
    full = plans["configurations"]["3d_fullres"]
    plans["configurations"]["3d_lowres"] = {
        **full,
        "data_identifier": "nnUNetPlans_3d_lowres",
        "spacing": [2 * step for step in full["spacing"]],
        "patch_size": [8, 12, 12],
        "next_stage": "3d_cascade_fullres",
    }
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans_file.write_text(json.dumps(plans))


def test_cascade(make_world: Callable[[], Any], make_dataset: Callable[..., Path]) -> None:
    world = make_world()
    make_dataset(world.raw, 5, "Epsilon", shape=(16, 18, 20), labels={"background": 0, "a": 1, "b": 2})
    make_dataset(world.raw, 6, "Zeta", shape=(18, 16, 20))
    names = ["Dataset005_Epsilon", "Dataset006_Zeta"]
    joint = ("-d", "5", "6", "--joint", "900", "--width", "0.25")
    world.plan(*joint, "-c", "3d_fullres")
    for name in names:
        add_low_resolution(world.preprocessed / name / "nnUNetPlans.json")
    world.plan(*joint, "-c", "3d_lowres", "3d_fullres", "3d_cascade_fullres")
    settings = {"training": {**ONE_STEP, "num_iterations_per_epoch": 3}, "budget": "total"}
    student = {**STUDENT, "training": ONE_STEP}
    for configuration in ("3d_lowres", "3d_cascade_fullres"):
        where = {"configuration": configuration, "fold": "all"}  # the next stage needs predictions of every case
        world.train(900, "Teacher", "-p", "nnUNetKDPlans", settings=settings, **where)
        world.train(5, "Student", settings=student, **where)
    low = world.model("Dataset900_Joint", "Teacher", "nnUNetKDPlans", "3d_lowres")
    for name in names:
        assert len(list((low / name / "predicted_next_stage" / "3d_cascade_fullres").glob("*.b2nd"))) == 5
    full = world.model("Dataset900_Joint", "Teacher", "nnUNetKDPlans", "3d_cascade_fullres")
    weights = load_checkpoint(full / "fold_all" / "checkpoint_final.pth")["network_weights"]
    assert weights["encoder.stages.0.0.convs.0.conv.weight"].shape[1] == 1 + 2 + 1  # T1, and both members' labels
    model = world.model(names[0], "Student", configuration="3d_cascade_fullres")
    checkpoint = load_checkpoint(model / "fold_all" / "checkpoint_final.pth")
    assert shapes(checkpoint) == stock_keys(model)
    assert checkpoint["logging"]["joint.logits.kl"][0] > 0
    assert len(read(model / "fold_all" / "validation" / "summary.json")["metric_per_case"]) == 5


def test_merged_labels_cannot_pass_a_cascade(
    make_world: Callable[[], Any], make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    world = make_world()
    make_dataset(world.raw, 5, "Epsilon", shape=(16, 18, 20), labels={"background": 0, "a": 1, "b": 2})
    make_dataset(world.raw, 6, "Zeta", shape=(18, 16, 20))
    world.plan("-d", "5", "6", "--joint", "900", "-c", "3d_fullres")
    for name in ("Dataset005_Epsilon", "Dataset006_Zeta"):
        add_low_resolution(world.preprocessed / name / "nnUNetPlans.json")
    head = {"labels": {"background": 0, "x": 1}, "members": {"5": {"a": "x", "b": "x"}, "6": {"lesion": "x"}}}
    (tmp_path / "heads.json").write_text(json.dumps({"x": head}))
    world.plan(
        "-d", "5", "6", "--joint", "900", "-c", "3d_fullres", "3d_cascade_fullres", "--heads", tmp_path / "heads.json"
    )
    output = world.train(
        900, "Teacher", "-p", "nnUNetKDPlans", configuration="3d_cascade_fullres", fold="all", check=False
    )
    assert "NotImplementedError: Dataset005_Epsilon has labels that its shared head 'x' merges" in output
