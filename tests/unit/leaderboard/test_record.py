from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.leaderboard.execute import check_conflicts
from nnunet_kd.leaderboard.plan import Job, Plan
from nnunet_kd.leaderboard.record import State, changes, record_file, state_of, write_record

MakePlan = Callable[..., Plan]
NAME = "train_a_control_2d_f0_s3"
CHECKPOINT: dict[str, Any] = {"network_weights": {}, "init_args": {}, "trainer_name": "any"}


def job_of(plan: Plan, name: str = NAME) -> Job:
    return next(job for job in plan.jobs if job.name == name)


def told(job: Job, settings: dict[str, Any]) -> None:
    """Leave the checkpoint of a training that was told these settings."""
    torch.save({**CHECKPOINT, "nnunet_kd": {"given_settings": settings}}, job.outputs[0])


def test_a_run_is_missing_then_half_finished_then_finished(make_small_plan: MakePlan) -> None:
    plan = make_small_plan()
    job = job_of(plan)
    checkpoint, summary = job.outputs
    assert state_of(job, plan.out) is State.MISSING
    write_record(record_file(job, plan.out), job)
    assert state_of(job, plan.out) is State.MISSING
    (checkpoint.parent / "checkpoint_latest.pth").touch()
    assert state_of(job, plan.out) is State.HALF
    checkpoint.touch()
    assert state_of(job, plan.out) is State.HALF  # its validation is missing
    summary.parent.mkdir()
    summary.touch()
    assert state_of(job, plan.out) is State.FINISHED


def test_a_teacher_outside_the_table_needs_no_validation(make_small_plan: MakePlan) -> None:
    plan = make_small_plan()
    job = job_of(plan, "train_both_teacher_2d_f0_s3")
    write_record(record_file(job, plan.out), job)
    job.outputs[0].touch()
    assert state_of(job, plan.out) is State.FINISHED


def test_a_run_with_other_settings_is_never_taken_nor_continued(make_small_plan: MakePlan) -> None:
    plan = make_small_plan()
    job = job_of(plan)
    write_record(record_file(job, plan.out), job)
    changed = make_small_plan(("num_epochs: 2", "num_epochs: 5"))
    assert state_of(job_of(changed), changed.out) is State.OTHER
    assert changes(job_of(changed), changed.out) == "settings.training.num_epochs was 2, is 5"
    with pytest.raises(
        NnUNetKDError, match=r"other settings \(settings.training.num_epochs was 2, is 5\). Give another"
    ):
        check_conflicts(changed)
    check_conflicts(plan)


def test_predictions_of_a_test_set_are_never_replaced_by_those_of_another(make_small_plan: MakePlan) -> None:
    plan = make_small_plan()
    job = next(job for job in plan.jobs if job.evaluation is not None)
    for output in job.outputs:
        output.mkdir(parents=True)
    write_record(record_file(job, plan.out), job, finished=True)
    assert state_of(job, plan.out) is State.FINISHED
    changed = make_small_plan(("cases: validation", "cases: all"))
    other = next(own for own in changed.jobs if own.name == job.name)
    assert state_of(other, changed.out) is State.OTHER
    with pytest.raises(NnUNetKDError, match="a test set that was defined otherwise"):
        check_conflicts(changed)
    for output in job.outputs:
        output.rmdir()  # moved away, as the message says
    assert state_of(other, changed.out) is State.MISSING


def test_what_a_command_by_hand_left_counts_if_its_settings_are_those_of_the_recipe(make_small_plan: MakePlan) -> None:
    plan = make_small_plan()
    job = job_of(plan)
    assert job.run is not None
    job.run.fold_folder.mkdir(parents=True)
    torch.save(CHECKPOINT, job.outputs[0])  # a stock trainer's
    assert state_of(job, plan.out) is State.UNKNOWN
    training = {"num_epochs": 2, "seed": 3}
    for more in ({"seed": 4}, {"initial_lr": 0.1}):  # another value, and something that the recipe does not ask for
        told(job, {"training": {**training, **more}})
        assert state_of(job, plan.out) is State.UNKNOWN
    told(job, {"training": {**training, "num_threads": 8}})  # which changes no result
    assert state_of(job, plan.out) is State.HALF
    assert json.loads(record_file(job, plan.out).read_text())["hash"] == job.hash


def test_terms_of_a_run_by_hand_are_compared(make_small_plan: MakePlan) -> None:
    terms = "settings: {terms: [{on: logits, loss: kl}]}, teachers"
    plan = make_small_plan(("nnUNetTrainerKDStudent, teachers", f"nnUNetTrainerKDStudent, {terms}"))
    job = job_of(plan, "train_a_student_2d_f0_s3")
    assert job.run is not None
    job.run.fold_folder.mkdir(parents=True)
    asked = job.run.full_settings
    told(job, {**asked, "terms": [{**asked["terms"][0], "weight": 0.5}]})
    assert state_of(job, plan.out) is State.UNKNOWN
    told(job, asked)
    assert state_of(job, plan.out) is State.HALF


def test_a_broken_record_says_what_to_do(make_small_plan: MakePlan) -> None:
    plan = make_small_plan()
    file = record_file(job_of(plan), plan.out)
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(NnUNetKDError, match="Move its folder away"):
        state_of(job_of(plan), plan.out)


def test_other_commands_are_finished_when_they_have_succeeded(make_small_plan: MakePlan) -> None:
    plan = make_small_plan()
    job = job_of(plan, "plan_joint_both")
    file = record_file(job, plan.out)
    write_record(file, job, finished=False)
    assert state_of(job, plan.out) is State.MISSING
    write_record(file, job, finished=True)
    assert state_of(job, plan.out) is State.FINISHED
    wider = make_small_plan(("members: [a, b]}", "members: [a, b], width: 2}"))
    assert state_of(job_of(wider, "plan_joint_both"), wider.out) is State.MISSING
