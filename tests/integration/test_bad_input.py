"""What bad input gets: an error that names the thing and the next step; and killed or repeated commands."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.integration

ALPHA, BETA, JOINT = "Dataset001_Alpha", "Dataset002_Beta", "Dataset900_Joint"
MODEL = f"{JOINT}/nnUNetTrainerKDTeacher__nnUNetKDPlans__3d_fullres"
ONE_STEP = {"num_epochs": 1, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1, "seed": 1}
CHECKPOINT = "checkpoint_final.pth"


def last_error(output: str) -> str:
    """The message of the error that ended the command."""
    return re.split(r"\n(?:nnunet_kd\.errors\.)?(?=\w*Error: )", output)[-1]


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=4))


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and content of every file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- planning ---------------------------------------------------------------------------------------------------------
def test_unknown_dataset(planned: Any) -> None:
    output = planned.plan("-d", "1", "77", "--joint", "920", check=False)
    assert "ERROR: There is no dataset with id 77" in output
    assert "Traceback" not in output
    assert "Could not find a dataset with the ID 77" in planned.train(77, "Student", check=False)


@pytest.mark.parametrize("images", [None, "empty"])
def test_member_without_images(planned: Any, images: str | None) -> None:
    folder = planned.raw / "Dataset070_Empty"
    (folder if images is None else folder / "imagesTr").mkdir(parents=True)
    description = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "a": 1}, "numTraining": 0}
    (folder / "dataset.json").write_text(json.dumps({**description, "file_ending": ".nii.gz"}))
    try:
        output = planned.plan("-d", "1", "70", "--joint", "920", check=False)
    finally:
        shutil.rmtree(folder)
    assert "ERROR: Dataset070_Empty has no training images" in output
    assert str(folder / "imagesTr") in output
    assert not (planned.preprocessed / "Dataset920_Joint").exists()


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"2": {"whole": "t", "core": "t"}}, "Dataset002_Beta"),
        ({"1": {"lesion": "t"}, "3": {"lesion": "t"}}, "'cyst'"),
        ({"1": {"lesion": "nothing"}}, "'nothing'"),
        ({"1": {"lesion": "t"}, "77": {}}, "77"),
    ],
)
def test_label_map_that_does_not_fit(planned: Any, tmp_path: Path, members: dict[str, Any], named: str) -> None:
    head = {"labels": {"background": 0, "t": 1}, "members": members}
    (tmp_path / "heads.json").write_text(json.dumps({"t": head}))
    flags = ("-c", "3d_fullres", "--heads", tmp_path / "heads.json")
    output = planned.plan("-d", "1", "2", "3", "--joint", "920", *flags, check=False)
    assert output.rstrip().splitlines()[-1].startswith("ERROR: ")
    assert named in output.rstrip().splitlines()[-1]
    assert not (planned.preprocessed / "Dataset920_Joint").exists()


def test_joint_id_of_a_real_dataset_is_refused(planned: Any) -> None:
    before = snapshot(planned.preprocessed)
    output = planned.plan("-d", "1", "2", "--joint", "3", "-c", "3d_fullres", check=False)
    assert "ERROR: Dataset003_Gamma is a dataset that is not a joint one" in output
    output = planned.plan("-d", "1", "2", "--joint", "3", "--joint_name", "New", "-c", "3d_fullres", check=False)
    assert "ERROR: The id 003 belongs to Dataset003_Gamma" in output
    output = planned.plan("-d", "1", "2", "--joint", "900", "--joint_name", "New", "-c", "3d_fullres", check=False)
    assert "ERROR: The id 900 belongs to Dataset900_Joint" in output
    assert snapshot(planned.preprocessed) == before


def test_channel_with_two_normalisations_is_refused(planned: Any, make_dataset: Callable[..., Path]) -> None:
    # CT in Gamma is normalised as CT; the same name elsewhere by z-score
    make_dataset(planned.raw, 71, "Zscored", channels=("CT",), shape=(12, 24, 24))
    try:
        planned.plan("-d", "71", "1", "--joint", "921", "-c", "3d_fullres")
        folder = planned.preprocessed / "Dataset071_Zscored"
        change_json(
            folder / "nnUNetPlans.json",
            lambda plans: plans["configurations"]["3d_fullres"].update(normalization_schemes=["ZScoreNormalization"]),
        )
        output = planned.plan("-d", "3", "71", "--joint", "922", "-c", "3d_fullres", check=False)
    finally:
        for name in ("Dataset071_Zscored", "Dataset921_Joint"):
            shutil.rmtree(planned.raw / name, ignore_errors=True)
            shutil.rmtree(planned.preprocessed / name, ignore_errors=True)
    message = output.rstrip().splitlines()[-1]
    for word in ("'CT'", "Dataset003_Gamma", "Dataset071_Zscored", "CTNormalization"):
        assert word in message


# --- planning again ---------------------------------------------------------------------------------------------------
def test_planning_again_changes_nothing_and_one_more_member_only_what_it_must(
    make_world: Callable[[], Any], make_dataset: Callable[..., Path]
) -> None:
    world = make_world()
    for dataset, name in ((1, "Alpha"), (2, "Beta"), (3, "Gamma")):
        make_dataset(world.raw, dataset, name, shape=(14, 16, 15 + dataset))
    world.plan("-d", "1", "2", "--joint", "900", "-c", "3d_fullres")
    raw, before = snapshot(world.raw), snapshot(world.preprocessed)
    assert any(name.endswith(".b2nd") for name in before)
    world.plan("-d", "1", "2", "--joint", "900", "-c", "3d_fullres")
    assert snapshot(world.preprocessed) == before
    world.plan("-d", "1", "2", "3", "--joint", "900", "-c", "3d_fullres")
    after = snapshot(world.preprocessed)
    of_members = [name for name in before if not name.startswith(JOINT)]
    assert {name: after[name] for name in of_members} == {name: before[name] for name in of_members}
    new = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert new == {"Dataset003_Gamma"}
    assert snapshot(world.raw) == raw
    members = json.loads((world.preprocessed / JOINT / "nnUNetKDPlans.json").read_text())["nnunet_kd"]["members"]
    assert list(members) == [ALPHA, BETA, "Dataset003_Gamma"]
    # and without raw data, as on a cluster
    shutil.rmtree(world.raw)
    world.raw.mkdir()
    world.plan("-d", "1", "2", "3", "--joint", "900", "-c", "3d_fullres")
    assert snapshot(world.preprocessed) == after


def test_killed_preprocessing_is_done_again_and_loses_nothing(
    make_world: Callable[[], Any], make_dataset: Callable[..., Path]
) -> None:
    world = make_world()
    make_dataset(world.raw, 1, "Alpha", num_cases=5, shape=(14, 16, 18))
    make_dataset(world.raw, 2, "Beta", num_cases=12, shape=(30, 32, 34))
    command = ("-d", "1", "2", "--joint", "900", "-c", "3d_fullres")
    started = world.start("nnUNetKD_plan_and_preprocess", *command, "-np", "1", "-npfp", "1", nnUNet_n_proc_DA="1")
    folder = world.preprocessed / BETA / "nnUNetPlans_3d_fullres"
    deadline = time.monotonic() + 120
    while not folder.is_dir() or len(list(folder.glob("*.pkl"))) < 2:
        assert started.poll() is None, started.output.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    started.kill()
    assert len(list(folder.glob("*.pkl"))) < 12, "it was killed too late for this test to say anything"
    alpha = snapshot(world.preprocessed / ALPHA)
    world.plan(*command)
    assert len(list(folder.glob("*.pkl"))) == 12
    assert not list(world.preprocessed.rglob("*unfinished*"))
    after = snapshot(world.preprocessed / ALPHA)
    assert {name: after[name] for name in alpha} == alpha
    assert set(after) - set(alpha) == {"nnUNetKDPlans.json", "splits_final.json"}
    splits = json.loads((world.preprocessed / JOINT / "splits_final.json").read_text())
    assert sum(len(split["val"]) for split in splits) == 17


# --- members that changed ---------------------------------------------------------------------------------------------
def replan(world: Any) -> None:
    change_json(
        world.preprocessed / ALPHA / "nnUNetPlans.json",
        lambda plans: plans["configurations"]["3d_fullres"].update(patch_size=[8, 8, 8]),
    )


def relabel(world: Any) -> None:
    change_json(world.preprocessed / ALPHA / "dataset.json", lambda content: content["labels"].update(new=2))


def lose_a_case(world: Any) -> None:
    for path in (world.preprocessed / ALPHA / "nnUNetPlans_3d_fullres").glob("alpha_000*"):
        path.unlink()


def resplit(world: Any) -> None:
    change_json(world.preprocessed / ALPHA / "splits_final.json", list.reverse)


@pytest.mark.parametrize(
    ("change", "named"),
    [(replan, "plans"), (relabel, "dataset.json"), (lose_a_case, "cases"), (resplit, "splits")],
)
def test_member_that_changed_since_the_joint_planning(copied: Any, change: Callable[[Any], None], named: str) -> None:
    change(copied)
    output = copied.train(900, "Teacher", "-p", "nnUNetKDPlans", fold=2, check=False)
    assert f"{ALPHA} changed since {JOINT} was planned ({named})" in output
    assert "nnUNetKD_plan_and_preprocess -d 001 002 003 --joint 900" in output
    assert not (copied.teacher / "fold_2").exists()


def test_teacher_does_not_continue_on_other_cases(copied: Any) -> None:
    resplit(copied)
    copied.plan("-d", "1", "2", "3", "--joint", "900", "-c", "3d_fullres", "--width", "0.25")
    settings = json.loads((copied.teacher / "fold_0" / "nnunet_kd_settings.json").read_text())
    output = copied.train(900, "Teacher", "-p", "nnUNetKDPlans", "--c", settings=settings, check=False)
    assert f"was trained on other cases of {ALPHA}" in last_error(output)


def test_preprocessed_data_that_is_gone(copied: Any) -> None:
    shutil.rmtree(copied.preprocessed / ALPHA / "nnUNetPlans_3d_fullres")
    output = copied.train(900, "Teacher", "-p", "nnUNetKDPlans", fold=2, check=False)
    assert f"{ALPHA} has no preprocessed images for 3d_fullres" in last_error(output)
    assert "nnUNetv2_preprocess -d 001 -plans_name nnUNetPlans -c 3d_fullres" in output


def test_training_needs_no_raw_data(copied: Any) -> None:
    shutil.rmtree(copied.raw)
    copied.raw.mkdir()
    copied.train(1, "Student", settings={"training": ONE_STEP})
    assert (copied.model(ALPHA, "Student") / "fold_0" / "validation" / "summary.json").is_file()


# --- teachers ---------------------------------------------------------------------------------------------------------
def test_no_joint_dataset_names_the_student(copied: Any) -> None:
    shutil.copytree(copied.preprocessed / ALPHA, copied.preprocessed / "Dataset080_Lonely")
    change_json(
        copied.preprocessed / "Dataset080_Lonely" / "nnUNetPlans.json",
        lambda plans: plans.update(dataset_name="Dataset080_Lonely"),
    )
    output = last_error(copied.train(80, "Student", check=False))
    assert "No teacher: no joint dataset names Dataset080_Lonely" in output
    assert "nnUNetKD_plan_and_preprocess -d 080 OTHER_ID --joint NEW_ID -c 3d_fullres" in output
    assert "nnUNetv2_train NEW_ID 3d_fullres 0 -tr nnUNetTrainerKDTeacher" in output


def test_no_teacher_for_this_fold(trained: Any) -> None:
    output = last_error(trained.train(1, "Student", fold=4, check=False))
    assert f"No trained teacher for {ALPHA} 3d_fullres fold 4" in output
    assert "nnUNetv2_train 900 3d_fullres 4 -tr nnUNetTrainerKDTeacher -p nnUNetKDPlans" in output
    assert not (trained.model(ALPHA, "Student") / "fold_4").exists()


def test_unknown_joint_dataset(trained: Any) -> None:
    output = last_error(trained.train(1, "Student", settings={"joint": "Dataset555_Nowhere"}, check=False))
    assert "Dataset555_Nowhere does not exist or does not name Dataset001_Alpha" in output


def test_named_teacher_that_is_not_trained(trained: Any) -> None:
    settings = {"teachers": {"joint": {"model": MODEL, "fold": 4}}}
    output = last_error(trained.train(1, "Student", settings=settings, check=False))
    assert "fold_4/checkpoint_final.pth does not exist" in output
    assert "nnUNetv2_train 900 3d_fullres 4 -tr nnUNetTrainerKDTeacher -p nnUNetKDPlans" in output


def test_teacher_of_another_fold_leaks(trained: Any) -> None:
    settings = {"teachers": {"joint": {"model": MODEL, "fold": 0}}, "training": ONE_STEP}
    output = last_error(trained.train(1, "Student", fold=4, settings=settings, check=False))
    assert f"was trained on 1 cases of {ALPHA} that are validation cases of fold 4" in output
    assert '"allow_leakage": true' in output


def test_leak_is_found_without_the_students_splits_file(copied: Any) -> None:
    (copied.preprocessed / ALPHA / "splits_final.json").unlink()
    settings = {"teachers": {"joint": {"model": MODEL, "fold": 0}}, "training": ONE_STEP}
    output = last_error(copied.train(1, "Student", fold=4, settings=settings, check=False))
    assert f"was trained on 1 cases of {ALPHA} that are validation cases of fold 4" in output


def test_several_joint_datasets_fit(copied: Any) -> None:
    for root, file in ((copied.preprocessed, "nnUNetKDPlans.json"), (copied.results, None)):
        other = Path(shutil.copytree(root / JOINT, root / "Dataset910_Other"))
        plans = other / file if file else next(other.glob("*/plans.json"))
        change_json(plans, lambda content: content.update(dataset_name="Dataset910_Other"))
    output = last_error(copied.train(1, "Student", check=False))
    assert f"Several joint teachers are trained for {ALPHA} 3d_fullres fold 0" in output
    assert MODEL in output
    assert MODEL.replace(JOINT, "Dataset910_Other") in output
    assert "nnUNetKD_settings=" in output
    fold = copied.model(ALPHA, "Student") / "fold_0"
    for joint in ("Dataset910_Other", "900"):  # the second time a finished training with the other teacher is there
        copied.train(1, "Student", settings={"joint": joint, "training": ONE_STEP})
        used = json.loads((fold / "nnunet_kd_settings.json").read_text())["teachers"]["joint"]["model"]
        assert used.startswith("Dataset910_Other" if joint == "Dataset910_Other" else "Dataset900_Joint")


def test_teacher_of_another_label_space(trained: Any) -> None:
    settings = {"teachers": {"joint": {"model": MODEL, "head": "Dataset003_Gamma", "labels": {"lesion": "tumour"}}}}
    output = last_error(trained.train(1, "Student", settings=settings, check=False))
    assert "'tumour'" in output
    settings["teachers"]["joint"] = {"model": MODEL, "head": BETA}
    output = last_error(trained.train(1, "Student", settings=settings, check=False))
    assert "'lesion' of the student has no counterpart in the teacher" in output
    assert "'whole', 'core'" in output
    settings["teachers"]["joint"] = {"model": MODEL, "head": "Dataset555_Nowhere"}
    output = last_error(trained.train(1, "Student", settings=settings, check=False))
    assert "has no head 'Dataset555_Nowhere'" in output


def truncate(file: Path, target: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def garble(file: Path, target: Path) -> None:
    file.write_bytes(os.urandom(5000))


class MakesFolder:
    """Foreign code."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def infect(file: Path, target: Path) -> None:
    content = torch.load(file, weights_only=False)
    content["logging"]["note"] = MakesFolder(target)
    torch.save(content, file, pickle_module=pickle)


def drop_weights(file: Path, target: Path) -> None:
    content = torch.load(file, weights_only=False)
    del content["network_weights"]
    torch.save(content, file)


def other_network(file: Path, target: Path) -> None:
    content = torch.load(file, weights_only=False)
    content["network_weights"].popitem()
    torch.save(content, file)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "truncated or corrupted"),
        (garble, "truncated or corrupted"),
        (infect, "foreign code"),
        (drop_weights, "lacks network_weights"),
        (other_network, "do not fit the network"),
    ],
)
def test_broken_teacher(trained: Any, tmp_path: Path, damage: Callable[[Path, Path], None], named: str) -> None:
    root = tmp_path / MODEL
    shutil.copytree(trained.teacher, root)
    damage(root / "fold_0" / CHECKPOINT, tmp_path / "made")
    settings = {"teachers": {"joint": {"model": str(root)}}, "training": ONE_STEP}
    error = last_error(trained.train(1, "Student", settings=settings, check=False))
    assert named in error
    assert str(root / "fold_0" / CHECKPOINT) in error
    assert not (tmp_path / "made").exists()


# --- settings ---------------------------------------------------------------------------------------------------------
def term(**values: Any) -> dict[str, Any]:
    return {"terms": [{"schedule": {"kind": "constant"}, **values}]}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (term(loss="hinton"), ["terms[0]", "'hinton'", "kl"]),
        (term(on="pixels"), ["terms[0].on", "'pixels'", "'features'"]),
        (term(on="features", loss="mse", levels=["middle"]), ["'middle'", "bottleneck"]),
        (term(on="features", loss="mse"), ["terms[0].levels"]),
        (term(options={"balanse": "class"}), ["terms[0]", "'balanse'", "balance"]),
        (term(teacher="somebody"), ["terms[0].teacher", "'somebody'"]),
        ({"training": {"epochs": 3}}, ["'training.epochs'", "num_epochs"]),
        ({"guard": {"margin": -1}}, ["'guard.margin'"]),
        ({"terms": "kl"}, ["'terms'", "list"]),
        ({"terms": ["kl"]}, ["'terms[0]'"]),
        ({"teachers": ["x"]}, ["'teachers'"]),
        ({"teachers": {"joint": 3}}, ["'teachers.joint'"]),
        ({"joint": 900.5}, ["'joint'"]),
    ],
)
def test_settings_of_a_student(trained: Any, settings: dict[str, Any], named: list[str]) -> None:
    error = last_error(trained.train(1, "Student", settings=settings, check=False))
    assert error.startswith("SettingsError: ")
    for text in named:
        assert text in error, error


@pytest.mark.parametrize("trainer", ["Teacher", "Control"])
def test_settings_of_the_others(trained: Any, trainer: str) -> None:
    dataset, plans = (900, "nnUNetKDPlans") if trainer == "Teacher" else (1, "nnUNetPlans")
    output = trained.train(dataset, trainer, "-p", plans, fold=4, settings={"trainin": {}}, check=False)
    assert last_error(output).startswith("SettingsError: Unknown setting 'trainin'")
    output = trained.train(dataset, trainer, "-p", plans, fold=4, check=False, nnUNetKD_settings="/nowhere.json")
    assert "/nowhere.json, which does not exist" in last_error(output)


def test_joint_teacher_on_plans_that_join_nothing(trained: Any) -> None:
    error = last_error(trained.train(1, "Teacher", check=False))
    assert "nnUNetPlans of Dataset001_Alpha does not describe a joint dataset" in error
    assert "nnUNetKD_plan_and_preprocess" in error


def test_student_of_the_joint_dataset_itself(trained: Any) -> None:
    error = last_error(trained.train(900, "Student", "-p", "nnUNetKDPlans", check=False))
    assert JOINT in error
    assert "joint dataset" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_several_gpus_where_there_are_none(planned: Any) -> None:
    # torch refuses before nnU-Net looks for a trainer
    command = ("nnUNetv2_train", "1", "3d_fullres", "0", "-tr", "nnUNetTrainerKDControl", "-num_gpus", "2")
    output = planned.run(*command, check=False)
    assert re.search(r"Error: .*(CUDA|GPU)", output), output
