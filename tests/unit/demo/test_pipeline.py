"""The steps of a demo: which commands, on which folders, and what is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_kd.cli.demo import parse
from nnunet_kd.demo.pipeline import METHODS, STUDENT, TEACHER, Demo, find_dataset
from nnunet_kd.errors import NnUNetKDError


def lines(demo: Demo) -> list[str]:
    return [" ".join(command.arguments) for step in demo.steps() for command in step.commands]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for name in ("Dataset301_A", "Dataset302_B", "Dataset970_Taken"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        description = {"labels": {"background": 0, "x": 1}, "file_ending": ".png"}
        (tmp_path / "raw" / name / "dataset.json").write_text(json.dumps(description))
    return tmp_path / "raw"


def test_commands_of_the_synthetic_demo(tmp_path: Path) -> None:
    commands = lines(Demo(parse(["-o", str(tmp_path / "out"), "-c", "2d", "--fold", "1"])))
    assert commands[0].startswith("nnUNetKD_plan_and_preprocess -d 971 972 973 --joint 970 ")
    teacher = "nnUNetv2_train 970 2d 1 -tr nnUNetTrainerKDTeacher -p nnUNetKDPlans -device cpu"
    assert any(command.startswith(teacher) for command in commands)
    for dataset in ("971", "972", "973"):
        for trainer in ("Control", "Student"):
            train = f"nnUNetv2_train {dataset} 2d 1 -tr nnUNetTrainerKD{trainer} -p nnUNetKDPlansDemo -device cpu"
            assert sum(command.startswith(train) for command in commands) == 1
    predictions = [command for command in commands if "predict" in command.split()[0]]
    assert len(predictions) == 9
    assert all("imagesTs" in command for command in predictions)
    assert len({command.split(" -o ")[1].split()[0] for command in predictions}) == 9


def test_stock_command_predicts_segmentations_and_ours_all_other_tasks(tmp_path: Path) -> None:
    commands = lines(Demo(parse(["-o", str(tmp_path / "out")])))
    stock = [command for command in commands if command.startswith("nnUNetv2_predict")]
    assert {command.split()[2] for command in stock} == {"972"}
    assert len(stock) == 2
    for name in ("Dataset971_DemoCT", "Dataset973_DemoMR"):
        for trainer in ("Control", "Student"):
            model = f"{name}/nnUNetTrainerKD{trainer}__nnUNetKDPlansDemo__3d_fullres -f 0"
            assert sum(command.startswith("nnUNetKD_predict") and model in command for command in commands) == 1


def test_2d_images_of_the_user_are_trained_in_2d(raw: Path, tmp_path: Path) -> None:
    given = ["-o", str(tmp_path / "out"), "--raw", str(raw), "-d", "301", "302"]
    assert parse(given).configuration == "2d"
    assert parse([*given, "-c", "3d_fullres"]).configuration == "3d_fullres"
    assert parse(["-o", str(tmp_path / "out")]).configuration == "3d_fullres"


def test_names_of_logs_are_unique(tmp_path: Path) -> None:
    demo = Demo(parse(["-o", str(tmp_path)]))
    names = [command.name for step in demo.steps() for command in step.commands]
    assert len(set(names)) == len(names)


def test_own_datasets_are_read_only_and_tested_on_the_validation_cases(raw: Path, tmp_path: Path) -> None:
    demo = Demo(parse(["-o", str(tmp_path / "out"), "--raw", str(raw), "-d", "301", "302", "--fold", "2"]))
    commands = lines(demo)
    assert commands[0].startswith("nnUNetKD_plan_and_preprocess -d 301 302 --joint 971 ")  # 970 is taken
    assert not any("predict" in command.split()[0] for command in commands)
    environment = demo.environment()
    assert environment["nnUNet_raw"] == str(raw)
    assert environment["nnUNet_preprocessed"].startswith(str(tmp_path / "out"))
    splits = [{"train": ["a"], "val": ["b"]}] * 2 + [{"train": ["b"], "val": ["a", "c"]}]
    folder = tmp_path / "out" / "nnUNet_preprocessed" / "Dataset301_A"
    folder.mkdir(parents=True)
    (folder / "splits_final.json").write_text(json.dumps(splits))
    dataset = demo.datasets()[0]
    assert dataset.cases == ("a", "c")
    assert dataset.reference_folder == folder / "gt_segmentations"
    assert dataset.side_folder == raw / "Dataset301_A"
    assert dataset.dimension == 2
    results = tmp_path / "out" / "nnUNet_results"
    student = results / "Dataset301_A" / "nnUNetTrainerKDStudent__nnUNetKDPlansDemo__2d" / "fold_2"
    assert dataset.predictions[STUDENT] == student / "validation"
    teacher = results / "Dataset971_DemoJoint" / "nnUNetTrainerKDTeacher__nnUNetKDPlans__2d" / "fold_2"
    assert dataset.predictions[TEACHER] == teacher / "Dataset301_A" / "validation"
    assert dataset.fold_folders[TEACHER] == teacher
    assert set(dataset.predictions) == set(dataset.fold_folders) == set(METHODS)


def test_budget_reaches_all_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNetKD_settings", '{"sampling_exponent": 0.0, "training": {"num_epochs": 5}}')
    demo = Demo(parse(["-o", str(tmp_path), "--epochs", "3", "--iterations", "7"]))
    settings = json.loads(demo.environment()["nnUNetKD_settings"])
    assert settings["training"] == {
        "num_epochs": 3,
        "num_iterations_per_epoch": 7,
        "num_val_iterations_per_epoch": 2,
        "initial_lr": 0.02,
        "seed": 0,
        "num_threads": 1,
    }
    assert settings["sampling_exponent"] == 0.0


def test_two_trainings_share_the_cores_but_synthetic_images_get_one_thread_each(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    synthetic = Demo(parse(["-o", str(tmp_path / "one")]))
    own = Demo(parse(["-o", str(tmp_path / "two"), "--raw", str(raw), "-d", "301", "302"]))
    for demo, num_threads, num_workers in ((synthetic, 1, 0), (own, 4, 4)):
        environment = demo.environment()
        assert json.loads(environment["nnUNetKD_settings"])["training"]["num_threads"] == num_threads
        assert environment["OMP_NUM_THREADS"] == str(num_threads)
        assert environment["nnUNet_n_proc_DA"] == str(num_workers)


def test_nothing_runs_before_what_it_needs(tmp_path: Path) -> None:
    demo = Demo(parse(["-o", str(tmp_path)]))
    step_of = {command.name: number for number, step in enumerate(demo.steps()) for command in step.commands}
    for dataset in ("971", "972", "973"):
        assert step_of[f"plan_student_{dataset}"] < step_of[f"train_control_{dataset}"]
        assert step_of["train_teacher_head_970"] < step_of[f"train_student_{dataset}"]
        assert step_of["train_teacher_head_970"] < step_of[f"predict_teacher_head_{dataset}"]
        for method in ("control", "student"):
            assert step_of[f"train_{method}_{dataset}"] < step_of[f"predict_{method}_{dataset}"]


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: str) -> None:
        Demo(parse(["-o", str(tmp_path / "out"), *arguments]))._remember_settings()

    start()
    start()
    with pytest.raises(NnUNetKDError, match=r"another num_epochs, nnunet_kd \(\d+, now 3\)\. Give another folder"):
        start("--epochs", "3")
    monkeypatch.setenv("nnUNetKD_settings", '{"sampling_exponent": 0.0}')
    with pytest.raises(NnUNetKDError, match="another nnunet_kd"):
        start()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "301", "302"], "go together"),
        (["--raw", "."], "go together"),
        (["--raw", ".", "-d", "301", "301"], "at least two"),
        (["--raw", "no_such_folder", "-d", "301", "302"], "not a folder"),
        (["--epochs", "0"], "at least 1"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], message: str) -> None:
    with pytest.raises(NnUNetKDError, match=message):
        parse(arguments)


def test_unknown_dataset(raw: Path) -> None:
    assert find_dataset(raw, 301) == "Dataset301_A"
    with pytest.raises(NnUNetKDError, match="no dataset with id 303"):
        find_dataset(raw, 303)
    (raw / "Dataset301_Twin").mkdir()
    with pytest.raises(NnUNetKDError, match="several with id 301: Dataset301_A, Dataset301_Twin"):
        find_dataset(raw, 301)
