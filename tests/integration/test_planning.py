"""Planning: again, in another order, for other configurations, without data, after a kill, and with wrong arguments."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

ALPHA, BETA, GAMMA, JOINT = "Dataset001_Alpha", "Dataset002_Beta", "Dataset003_Gamma", "Dataset900_Joint"
DATA = "nnUNetPlans_3d_fullres"
FLAGS = ("-c", "3d_fullres", "--width", "0.25")
AGAIN = ("-d", "1", "2", "3", "--joint", "900", "--width", "0.25")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = read(path)
    change(content)
    path.write_text(json.dumps(content, indent=4))


def snapshot(folder: Path) -> dict[str, str]:
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


def joint_plans(world: Any) -> Any:
    return read(world.preprocessed / JOINT / "nnUNetKDPlans.json")


def error_of(world: Any, *args: str | Path) -> str:
    """The message of a planning that must fail, without a traceback and without a change of preprocessed data."""
    before = snapshot(world.preprocessed)
    output = world.plan(*args, check=False)
    assert "Traceback" not in output
    assert snapshot(world.preprocessed) == before
    return output[output.index("ERROR: ") :]


@pytest.fixture
def world(planned: Any, tmp_path: Path) -> Iterator[Any]:
    """A copy of the planned world that a test may change."""
    yield planned.copy(tmp_path)
    shutil.rmtree(tmp_path)


# --- planning again ---------------------------------------------------------------------------------------------------
def test_order_of_members_does_not_change_what_is_planned(world: Any, make_dataset: Callable[..., Path]) -> None:
    before = snapshot(world.preprocessed)
    output = world.plan("-d", "3", "1", "2", "--joint", "900", *FLAGS)
    assert snapshot(world.preprocessed) == before
    for head, channels in ((ALPHA, 2), (BETA, 2), (GAMMA, 3)):
        assert f"{head} ({channels} channels)" in output
    make_dataset(world.raw, 4, "Delta", channels=("T2",), shape=(14, 16, 18))
    world.plan("-d", "4", "3", "1", "2", "--joint", "900", *FLAGS)
    block = joint_plans(world)["nnunet_kd"]
    assert list(block["members"]) == list(block["heads"]) == [ALPHA, BETA, GAMMA, "Dataset004_Delta"]
    assert block["channels"] == ["T1", "FLAIR", "CT", "T2"]


def test_order_of_shared_heads_does_not_change_what_is_planned(world: Any, tmp_path: Path) -> None:
    labels = {"background": 0, "lesion": 1}
    one, two = {"1": {"lesion": "lesion"}}, {"3": {"lesion": "lesion", "cyst": "lesion"}}
    file = tmp_path / "heads.json"
    before = []
    for heads in ((("a", one), ("b", two)), (("b", two), ("a", one))):
        file.write_text(json.dumps({name: {"labels": labels, "members": members} for name, members in heads}))
        output = world.plan("-d", "1", "2", "3", "--joint", "901", *FLAGS, "--heads", file)
        assert "b (2 channels, shared)" in output
        before.append(snapshot(world.preprocessed))
    assert before[0] == before[1]


def test_trained_teacher_that_does_not_fit_any_more_is_named(copied: Any) -> None:
    assert "WARNING" not in copied.plan(*AGAIN, "-c", "3d_fullres")
    output = copied.plan(*AGAIN[:-1], "0.5", "-c", "3d_fullres")
    assert output.index("WARNING: Dataset900_Joint changed") > output.index("Next:")
    assert str(copied.teacher) in output
    assert "another -plans_name or another --joint id" in output
    assert "WARNING" not in copied.plan(*AGAIN, "-c", "3d_fullres")
    assert str(copied.teacher) in copied.plan("-d", "1", "2", "--joint", "900", *FLAGS)


def test_other_configurations_are_kept_while_they_fit(world: Any) -> None:
    before = joint_plans(world)
    world.plan(*AGAIN, "-c", "2d")
    after = joint_plans(world)
    assert list(after["configurations"]) == ["3d_fullres", "2d"]
    assert after["configurations"]["3d_fullres"] == before["configurations"]["3d_fullres"]
    for name, entry in after["nnunet_kd"]["members"].items():
        old = before["nnunet_kd"]["members"][name]
        for key in ("batch_sizes", "state"):
            assert set(entry[key]) == {"3d_fullres", "2d"}
            assert entry[key]["3d_fullres"] == old[key]["3d_fullres"]
    plans = world.preprocessed / ALPHA / "nnUNetPlans.json"
    change_json(plans, lambda content: content["configurations"]["3d_fullres"].update(patch_size=[8, 8, 8]))
    output = world.plan(*AGAIN, "-c", "2d")
    assert "INFO: 3d_fullres of the existing joint plans does not fit the members any more" in output
    assert list(joint_plans(world)["configurations"]) == ["2d"]
    assert set(joint_plans(world)["nnunet_kd"]["members"][ALPHA]["state"]) == {"2d"}


def test_settings_of_the_user_are_kept(world: Any) -> None:
    files = [world.preprocessed / name / "nnUNetKDPlans.json" for name in (JOINT, ALPHA)]
    for file in files:
        change_json(file, lambda content: content["nnunet_kd"].update(training={"num_epochs": 7}))
    world.plan(*AGAIN, "-c", "3d_fullres")
    assert [read(file)["nnunet_kd"]["training"] for file in files] == [{"num_epochs": 7}] * 2
    files[0].write_text(files[0].read_text()[:-2])  # a slip of the editor is no reason to lose them
    assert f"{files[0]} is not valid JSON" in error_of(world, *AGAIN, "-c", "3d_fullres")


def test_everything_is_checked_before_anything_is_written(world: Any) -> None:
    for member in (ALPHA, BETA, GAMMA):
        plans = read(world.preprocessed / member / "nnUNetPlans.json")
        (world.preprocessed / member / "Other.json").write_text(json.dumps({**plans, "plans_name": "Other"}))
    error = error_of(world, *AGAIN, "-c", "3d_fullres", "-p", "Other")
    assert "was made from nnUNetPlans, not from Other. Choose another -plans_name" in error


def test_foreign_files_beside_the_plans_do_no_harm(world: Any) -> None:
    for member in (ALPHA, JOINT):
        (world.preprocessed / member / "notes.json").write_bytes(b"\xff\xfe nnunet_kd")
        (world.preprocessed / member / "list.json").write_text("[]")
    world.plan(*AGAIN, "-c", "3d_fullres")


def test_broken_splits(world: Any) -> None:
    splits = world.preprocessed / ALPHA / "splits_final.json"
    for content in ("[{", "[1]"):
        splits.write_text(content)
        error = error_of(world, *AGAIN, "-c", "3d_fullres")
        assert "splits_final.json" in error
        assert "Correct the file, or move it away" in error


def test_plans_of_one_joint_dataset_have_the_same_members(world: Any) -> None:
    error = error_of(world, "-d", "1", "2", "--joint", "900", *FLAGS, "-plans_name", "Second")
    assert "nnUNetKDPlans of Dataset900_Joint joins other members" in error
    assert "--joint another id" in error
    world.plan("-d", "3", "2", "1", "--joint", "900", *FLAGS, "-plans_name", "Second")
    second = read(world.preprocessed / JOINT / "Second.json")["nnunet_kd"]
    assert list(second["members"]) == [ALPHA, BETA, GAMMA]


# --- planning that stopped --------------------------------------------------------------------------------------------
def test_failed_or_killed_first_planning_does_not_block_its_id(world: Any) -> None:
    splits = world.preprocessed / ALPHA / "splits_final.json"
    right = splits.read_text()
    change_json(splits, lambda content: content[0]["train"].append("alpha_999"))
    command = ("-d", "1", "2", "--joint", "910", *FLAGS)
    assert "alpha_999" in error_of(world, *command)
    splits.write_text(right)
    world.plan(*command)
    folder = world.preprocessed / "Dataset910_Joint"
    whole = snapshot(folder)
    for file in folder.iterdir():  # what a kill leaves: the first file, and one that was being written
        if file.name != "dataset.json":
            file.unlink()
    (folder / ".nnUNetKDPlans.json.1.tmp").touch()
    world.plan(*command)
    assert whole.items() <= snapshot(folder).items()
    for file in folder.iterdir():
        file.unlink()
    (folder / ".dataset.json.1.tmp").touch()
    world.plan(*command)
    assert whole.items() <= snapshot(folder).items()


@pytest.mark.parametrize("with_raw", [True, False])
def test_half_finished_preprocessing_is_refused(world: Any, with_raw: bool) -> None:
    for file in (world.preprocessed / ALPHA / DATA).glob("alpha_003*"):
        file.unlink()
    (world.preprocessed / ALPHA / DATA / "alpha_004.pkl").unlink()  # written last, so this case is not finished
    (world.preprocessed / ALPHA / "splits_final.json").unlink()
    if not with_raw:
        shutil.rmtree(world.raw / ALPHA)
    error = error_of(world, *AGAIN, "-c", "3d_fullres")
    assert f"{ALPHA} has only 3 of its 5 cases" in error
    assert "nnUNetv2_preprocess -d 001 -plans_name nnUNetPlans -c 3d_fullres" in error


def test_stale_marker_of_an_unfinished_run(world: Any) -> None:
    marker = world.preprocessed / ALPHA / f".{DATA}.nnunet_kd_unfinished"
    marker.touch()
    shutil.rmtree(world.raw / ALPHA)
    data = snapshot(world.preprocessed / ALPHA / DATA)
    world.plan(*AGAIN, "-c", "3d_fullres")
    assert not marker.exists()
    assert snapshot(world.preprocessed / ALPHA / DATA) == data
    marker.touch()
    (world.preprocessed / ALPHA / DATA / "alpha_000.pkl").unlink()
    assert str(marker) in error_of(world, *AGAIN, "-c", "3d_fullres")


# --- what is preprocessed ---------------------------------------------------------------------------------------------
def test_without_preprocessing(make_world: Callable[[], Any], make_dataset: Callable[..., Path]) -> None:
    world = make_world()
    for dataset, name in ((1, "Alpha"), (2, "Beta")):
        make_dataset(world.raw, dataset, name, shape=(14, 16, 18))
    command = ("-d", "1", "2", "--joint", "900", *FLAGS)
    output = world.plan(*command, "--no_pp")
    assert not list(world.preprocessed.rglob("*.b2nd"))
    planned = snapshot(world.preprocessed)
    preprocess = [f"nnUNetv2_preprocess -d 00{i} -plans_name nnUNetPlans -c 3d_fullres" for i in (1, 2)]
    assert all(line in output[output.index("Next:") :] for line in preprocess)
    output = world.train(900, "Teacher", "-p", "nnUNetKDPlans", check=False)
    assert f"{ALPHA} has no preprocessed images for 3d_fullres" in output
    for line in preprocess:
        world.run(*line.split(), "-np", "1")
    training = {"num_epochs": 1, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1}
    world.train(900, "Teacher", "-p", "nnUNetKDPlans", settings={"training": training, "budget": "total"})
    assert "nnUNetv2_preprocess" not in world.plan(*command)
    assert planned.items() <= snapshot(world.preprocessed).items()


def test_cascade_gets_the_data_that_it_needs(world: Any) -> None:
    for member in (ALPHA, BETA):
        plans = world.preprocessed / member / "nnUNetPlans.json"
        configurations = read(plans)["configurations"]
        low = {**configurations["3d_fullres"], "data_identifier": "nnUNetPlans_3d_lowres"}
        low |= {"spacing": [2.0, 2.0, 2.0], "patch_size": [8, 8, 8], "next_stage": "3d_cascade_fullres"}
        cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        new = {"3d_lowres": low, "3d_cascade_fullres": cascade}
        change_json(plans, lambda content, new=new: content["configurations"].update(new))
        shutil.rmtree(world.preprocessed / member / DATA)
    cascade = ("-c", "3d_lowres", "3d_cascade_fullres")
    world.plan("-d", "1", "2", "--joint", "910", *cascade, "--width", "0.25")
    for member in (ALPHA, BETA):
        for data in (DATA, "nnUNetPlans_3d_lowres"):
            assert len(list((world.preprocessed / member / data).glob("*.pkl"))) == 5
        assert not (world.preprocessed / member / "nnUNetPlans_2d").exists()


# --- arguments and plans that do not fit ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("-p", "nnUNetResEncUNetMPlans"), f"{ALPHA} has no nnUNetResEncUNetMPlans"),
        (("-p", "Own"), f"{ALPHA} has no Own"),
        (("-p", "nnUNetResEncUNetMPlans", "-pl", "ExperimentPlanner"), "Give -pl nnUNetPlannerResEncM"),
        (("-pl", "DatasetFingerprintExtractor"), "no planner 'DatasetFingerprintExtractor'"),
        (("--heads", "/nowhere.json"), "/nowhere.json (--heads) does not exist"),
        (("-d", "900", "1"), "Give --joint an id that no dataset has"),
        (("-d", "900", "1", "--joint", "910"), f"{JOINT} is a joint dataset and cannot be a member"),
        (("-d", "Datasetxyz", "2"), "'Datasetxyz' is neither a dataset id (301) nor a dataset name"),
    ],
)
def test_arguments_that_do_not_fit(planned: Any, args: tuple[str, ...], named: str) -> None:
    assert named in error_of(planned, *AGAIN, "-c", "3d_fullres", *args)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--width", "0"), "argument --width: '0' is not possible. Give a number greater than 0."),
        (("--width", "nan"), "argument --width: 'nan' is not possible"),
        (("--width", "wide"), "argument --width: 'wide' is not possible"),
        (("--joint", "1234"), "argument --joint: '1234' is no dataset id"),
    ],
)
def test_numbers_that_are_not_possible(planned: Any, args: tuple[str, ...], named: str) -> None:
    output = planned.plan(*AGAIN, "-c", "3d_fullres", *args, check=False)
    assert named in output
    assert "Traceback" not in output


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_folder_that_is_not_set(planned: Any, variable: str) -> None:
    environment = {name: value for name, value in planned.environment.items() if name != variable}
    world = dataclasses.replace(planned, environment=environment)
    assert f"{variable} is not set. Name nnU-Net's folder: export {variable}=" in error_of(world, *AGAIN)
    output = world.run("nnUNetKD_plan_student", "-d", ALPHA, "-plans_name", "X", check=variable == "nnUNet_raw")
    assert "Traceback" not in output


def test_plans_of_a_planner_that_is_not_installed(world: Any) -> None:
    for member in (ALPHA, BETA, GAMMA):
        plans = world.preprocessed / member / "nnUNetPlans.json"
        change_json(plans, lambda content: content.update(experiment_planner_used="MyPlanner"))
    error = error_of(world, *AGAIN, "-c", "3d_fullres")
    assert "nnU-Net has no planner 'MyPlanner'. Name one with -pl" in error
    world.plan(*AGAIN, "-c", "3d_fullres", "-pl", "ExperimentPlanner")


def test_member_with_few_cases(world: Any, make_dataset: Callable[..., Path]) -> None:
    make_dataset(world.raw, 5, "Few", num_cases=4, shape=(14, 16, 18))
    output = world.plan("-d", "1", "5", "--joint", "910", *FLAGS, check=False)
    assert "ERROR: Dataset005_Few: There are 4 cases, too few for 5 folds. Write splits_final.json by hand" in output
    assert not (world.preprocessed / "Dataset910_Joint").exists()
    split = {"train": ["few_000", "few_001", "few_002"], "val": ["few_003"]}
    (world.preprocessed / "Dataset005_Few" / "splits_final.json").write_text(json.dumps([split]))
    world.plan("-d", "1", "5", "--joint", "910", *FLAGS)


def test_channels_of_one_name(world: Any, make_dataset: Callable[..., Path]) -> None:
    make_dataset(world.raw, 5, "Same", channels=("noNorm", "noNorm"), shape=(14, 16, 18))
    output = world.plan("-d", "1", "5", "--joint", "910", *FLAGS, check=False)
    assert "ERROR: Dataset005_Same has more than one channel named 'noNorm'" in output
    assert "leave Dataset005_Same out" in output
