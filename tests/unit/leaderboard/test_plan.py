from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_kd.leaderboard.plan import Machine, Plan, make_plan
from nnunet_kd.leaderboard.recipe import read_recipe, settings_of
from nnunet_kd.settings import ENVIRONMENT_VARIABLE

RECIPES = sorted((Path(__file__).parents[3] / "examples" / "leaderboards").glob("*.yaml"))
MakePlan = Callable[..., Plan]


def positions(plan: Plan) -> dict[str, int]:
    return {job.name: index for index, job in enumerate(plan.jobs)}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_shipped_recipe_has_a_plan(file: Path, tmp_path: Path) -> None:
    recipe = read_recipe(file)
    assert recipe.name == file.stem
    plan = make_plan(recipe, file, tmp_path / "out", Machine())
    place = positions(plan)
    assert len(place) == len(plan.jobs)
    assert all(place[needed] < place[job.name] for job in plan.jobs for needed in job.needs)
    # nothing is written twice: neither models of two runs nor predictions of two tests meet
    assert len({run.fold_folder for run in plan.runs}) == len(plan.runs)
    assert len({evaluation.predictions for evaluation in plan.evaluations}) == len(plan.evaluations)
    lines = {(evaluation.dataset, evaluation.run.method) for evaluation in plan.evaluations}
    assert {method for _, method in lines} == {name for name, own in recipe.methods.items() if own.in_table}


def test_the_recipes_that_are_promised_are_there() -> None:
    promised = {"cross_domain_kd", "cross_domain_kd_tasks", "sikd", "dino_mix", "adain_cxr", "real_small"}
    assert promised <= {file.stem for file in RECIPES}


def test_dino_mix_keeps_the_rows_and_the_labelled_cases_of_its_protocol() -> None:
    file = next(file for file in RECIPES if file.stem == "dino_mix")
    recipe = read_recipe(file)
    rows = {
        (own.datasets[0].partition("_")[0], name): row for own in recipe.reference for name, row in own.rows.items()
    }
    assert len(rows) == 14 + 1 + 13 + 1  # methods of Synapse and AMOS, and V-Net with all labels
    assert rows["synapse", "DHC"] == [[31.64, 21.82], [48.61, 10.71], [57.13, 11.66]]
    assert rows["synapse", "DINO-Mix (paper)"] == [None, [66.45, None], None]
    assert rows["amos", "CReST"] == [[34.13, 20.15], [46.55, 14.62], [60.74, 4.65]]
    for name, num_training, num_labeled in (
        *(("synapse_10", 20, 2), ("synapse_40", 20, 8)),
        *(("amos_2", 216, 4), ("amos_5", 216, 10), ("amos_10", 216, 21)),
    ):
        settings = settings_of(recipe, recipe.datasets[name], recipe.methods["control"], 666)
        assert settings["labeled"]["seed"] == settings["training"]["seed"] == 666
        assert int(settings["labeled"]["fraction"] * num_training) == num_labeled
    assert len(recipe.datasets["synapse_20"].settings["labeled"]) == 4
    for name, dataset in recipe.datasets.items():
        assert len(dataset.labels) == (14 if name.startswith("synapse") else 16)


def test_students_are_told_the_folder_of_their_teacher_on_the_same_fold_and_seed(make_small_plan: MakePlan) -> None:
    plan = make_small_plan(device="cpu", num_threads=2)
    jobs = {job.name: job for job in plan.jobs}
    job = jobs["train_b_student_2d_f1_s3"]
    assert "train_both_teacher_2d_f1_s3" in job.needs
    assert job.command[:6] == ("nnUNetv2_train", "2", "2d", "1", "-tr", "nnUNetTrainerKDStudent")
    settings = json.loads(job.environment[ENVIRONMENT_VARIABLE])
    model = plan.out / "results/both/teacher/seed_3/Dataset900_Joint/nnUNetTrainerKDTeacher__nnUNetKDPlans__2d"
    assert settings == {
        "teachers": {"joint": {"model": str(model)}},
        "training": {"num_epochs": 2, "seed": 3, "num_threads": 2},
    }
    assert job.environment["nnUNet_results"] == str(plan.out / "results/b/student/seed_3")
    assert jobs["train_both_teacher_2d_f1_s3"].environment["nnUNet_results"] == str(model.parents[1])


def test_each_dataset_is_planned_once_and_joined_before_training(make_small_plan: MakePlan) -> None:
    plan = make_small_plan()
    planning = [job for job in plan.jobs if job.command[0] == "nnUNetKD_plan_and_preprocess"]
    assert [job.name for job in planning] == ["plan_joint_both"]
    assert planning[0].command[1:6] == ("-d", "1", "2", "--joint", "900")
    assert all("plan_joint_both" in job.needs for job in plan.jobs if job.run is not None)


def test_a_test_on_another_dataset_takes_its_validation_cases_of_the_fold(make_small_plan: MakePlan) -> None:
    plan = make_small_plan()
    job = next(job for job in plan.jobs if job.name == "predict_b_with_a_student_2d_f1_s3")
    folder = plan.out / "inputs/Dataset002_Beta/fold_1"
    assert job.command[:5] == ("nnUNetv2_predict", "-d", "1", "-c", "2d")
    assert job.command[job.command.index("-i") + 1] == str(folder)
    assert set(job.needs) == {"train_a_student_2d_f1_s3", "inputs_Dataset002_Beta_fold_1"}
    inputs = next(job for job in plan.jobs if job.name == "inputs_Dataset002_Beta_fold_1")
    assert inputs.command[-4:] == ("--dataset", "b", "--inputs", "fold_1")


def test_several_gpus_and_nodes(make_small_plan: MakePlan) -> None:
    name = "train_a_control_2d_f0_s3"
    job = next(job for job in make_small_plan(num_gpus=4).jobs if job.name == name)
    assert job.command[-2:] == ("-num_gpus", "4")
    jobs = make_small_plan(num_gpus=4, nodes=2).jobs
    job = next(job for job in jobs if job.name == name)
    found = re.search(
        r"torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_id (\w+) "
        r"--rdzv_endpoint \$MASTER_ADDR:(\d+) "
        r"-m nnunet_kd.train 1 2d 0 -tr nnUNetTrainerKDControl -p nnUNetPlans -device cuda --c$",
        job.shell(),
    )
    assert found is not None
    assert 29500 <= int(found[2]) < 30000
    # trainings that share a machine must not meet
    ids = [own.command[own.command.index("--rdzv_id") + 1] for own in jobs if own.run is not None]
    assert found[1] in ids
    assert len(set(ids)) == len(ids) > 4


def test_the_hash_is_that_of_what_a_result_depends_on(make_small_plan: MakePlan) -> None:
    def hashes(plan: Plan) -> dict[str, str]:
        return {job.name: job.hash for job in plan.jobs if job.run or job.evaluation}

    before = hashes(make_small_plan())
    assert len(set(before.values())) == len(before)
    assert hashes(make_small_plan(out="elsewhere", device="cpu", num_gpus=2, nodes=3)) == before
    assert (
        hashes(make_small_plan(("title: A & B", "title: other"), ("metrics: [dice, hd95]", "metrics: [nsd]"))) == before
    )
    # another teacher changes its students and what they predict, but not the control
    teacher = ("on_joints: [both],", "on_joints: [both], settings: {sampling_exponent: 1.0},")
    changed = {name for name, value in hashes(make_small_plan(teacher)).items() if before[name] != value}
    assert changed == {name for name in before if "student" in name or "teacher" in name}
    name = "train_both_teacher_2d_f0_s3"
    for replacement in (("num_epochs: 2", "num_epochs: 3"), ("members: [a, b]}", "members: [a, b], width: 0.5}")):
        assert hashes(make_small_plan(replacement))[name] != before[name]


def test_datasets_with_classes_are_trained_with_the_plans_that_have_heads(make_small_plan: MakePlan) -> None:
    tasks = ("b: {id: 2, name: Beta}", "b: {id: 2, name: Beta, tasks: [segmentation, classification]}")
    plans = {run.group: run.plans for run in make_small_plan(tasks).runs}
    assert plans == {"a": "nnUNetPlans", "b": "nnUNetKDPlans", "both": "nnUNetKDPlans"}
    student = ("configurations: [2d]", "configurations: [2d]\nplans: {student: {name: Small, width: 0.5}}")
    plan = make_small_plan(tasks, student)
    assert {run.group: run.plans for run in plan.runs} == {"a": "Small", "b": "Small", "both": "nnUNetKDPlans"}
    assert [job.name for job in plan.jobs if job.command[0] == "nnUNetKD_plan_student"] == [
        "plan_student_Dataset001_Alpha",
        "plan_student_Dataset002_Beta",
    ]


def test_a_recipe_with_raw_data_of_its_own_leaves_the_users_folders_alone(make_small_plan: MakePlan) -> None:
    plan = make_small_plan(("name: small", "name: small\nraw: $SOMEWHERE"))
    for job in plan.jobs:
        assert job.environment["nnUNet_raw"] == str(plan.out / "nnUNet_raw")
        assert job.environment["nnUNet_preprocessed"] == str(plan.out / "nnUNet_preprocessed")
    assert [job.name for job in plan.jobs[:2]] == ["prepare_Dataset001_Alpha", "prepare_Dataset002_Beta"]


def test_a_plan_is_made_again_when_its_data_changes(make_small_plan: Callable[..., Plan]) -> None:
    """Else a run would be recorded under splits or a raw folder that it was not trained with."""

    def hashes(*replacements: tuple[str, str]) -> dict[str, str]:
        one_fold = ("folds: [0, 1]", "folds: [0]")
        plan = make_small_plan(("title: A & B", "title: A & B\nraw: /first"), one_fold, *replacements)
        return {job.name: job.hash for job in plan.jobs if job.run is None and job.evaluation is None}

    before = hashes()
    assert before == hashes()
    moved = hashes(("raw: /first", "raw: /second"))
    assert all(moved[name] != before[name] for name in before if name.startswith(("prepare_", "plan_")))
    divided = hashes(("b: {id: 2, name: Beta}", "b: {id: 2, name: Beta, splits: {validation: [x]}}"))
    assert divided["prepare_Dataset001_Alpha"] == before["prepare_Dataset001_Alpha"]
    assert divided["prepare_Dataset002_Beta"] != before["prepare_Dataset002_Beta"]
    assert divided["plan_joint_both"] != before["plan_joint_both"]


def test_a_validation_is_finished_with_all_of_its_tasks(make_small_plan: Callable[..., Plan]) -> None:
    tasks = "b: {id: 2, name: Beta, tasks: [segmentation, classification, detection]}"
    plan = make_small_plan(("b: {id: 2, name: Beta}", tasks), ("dice, hd95", "dice, auroc"))
    outputs = {job.name: {file.name for file in job.outputs} for job in plan.jobs if job.run is not None}
    stock = {"checkpoint_final.pth", "summary.json"}
    assert outputs["train_a_control_2d_f0_s3"] == stock
    assert outputs["train_b_control_2d_f0_s3"] == {*stock, "classification.csv", "boxes.json"}
