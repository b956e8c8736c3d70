"""The executor, on shell commands in the place of nnU-Net's."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.leaderboard.commands import Commands
from nnunet_kd.leaderboard.execute import execute
from nnunet_kd.leaderboard.plan import Job, Machine, Plan
from nnunet_kd.leaderboard.recipe import check_data
from nnunet_kd.leaderboard.run import run_plan
from nnunet_kd.leaderboard.yaml_lines import RecipeError

MakePlan = Callable[..., Plan]


def shell(name: str, line: str, *needs: str, outputs: tuple[Path, ...] = ()) -> Job:
    return Job(name, ("sh", "-c", line), needs, {"GREETING": "hello"}, outputs=outputs)


@pytest.fixture
def plan_of(make_small_plan: MakePlan) -> Callable[..., Plan]:
    def make(*jobs: Job) -> Plan:
        return replace(make_small_plan(), jobs=list(jobs), runs=[], evaluations=[])

    return make


def test_jobs_run_after_what_they_need_and_once(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    order = tmp_path / "order"
    jobs = [
        shell(name, f"echo $GREETING {name} >> {order}", *needs) for name, needs in (("a", ""), ("b", "a"), ("c", "b"))
    ]
    plan, said = plan_of(*jobs), []
    run_plan(plan, Machine(), 2, said.append)
    assert order.read_text().split() == ["hello", "a", "hello", "b", "hello", "c"]
    said.clear()
    run_plan(plan, Machine(), 2, said.append)
    assert said == ["3 of 3 jobs are finished."]
    assert len(order.read_text().split()) == 6
    # a command that asks for something else is another one
    run_plan(plan_of(jobs[0], shell("b", f"echo again >> {order}", "a"), jobs[2]), Machine(), 1, said.append)
    assert order.read_text().split()[6:] == ["again"]


def test_a_failure_stops_what_needs_it_and_nothing_else(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_of(
        shell("bad", "echo it is broken; exit 3"),
        shell("needs_bad", "touch never", "bad"),
        shell("needs_that", "touch never", "needs_bad"),
        shell("good", f"touch {tmp_path / 'done'}"),
        shell("forgetful", "true", outputs=(tmp_path / "nothing",)),
    )
    with pytest.raises(NnUNetKDError) as error:
        run_plan(plan, Machine(), 1, lambda _: None)
    message = str(error.value)
    assert "bad returned 3. The end of" in message
    assert "it is broken" in message
    assert f"forgetful succeeded but did not write {tmp_path / 'nothing'}" in message
    assert "2 jobs need these and were not run." in message
    assert (tmp_path / "done").is_file()


def test_a_job_that_another_process_runs_is_left_to_it(plan_of: Callable[..., Plan]) -> None:
    job = shell("a", "true")
    plan = plan_of(job)
    (plan.out / "jobs").mkdir(parents=True)
    with FileLock(plan.out / "jobs/a.lock"):
        assert execute(job, plan, Machine()) == "runs elsewhere"
    assert execute(job, plan, Machine()).endswith(" s")
    assert execute(job, plan, Machine()) == "done before"


def test_a_command_that_outlives_its_executor_is_not_started_again(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    started = tmp_path / "started"
    job = shell("long", f"echo $$ >> {started}; exec sleep 60")
    plan = plan_of(job)
    executor = multiprocessing.get_context("fork").Process(target=execute, args=(job, plan, Machine()))
    executor.start()
    while not started.is_file() or not started.read_text().endswith("\n"):
        time.sleep(0.01)
    executor.kill()
    executor.join()
    assert execute(job, plan, Machine()) == "runs elsewhere"
    os.kill(int(started.read_text()), signal.SIGKILL)
    end = replace(job, command=("true",))
    deadline = time.monotonic() + 10
    while (result := execute(end, plan, Machine())) == "runs elsewhere" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert result.endswith(" s")


def test_other_nodes_leave_outputs_to_the_main_one_and_repeat_nothing(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    calls, output = tmp_path / "calls", tmp_path / "written_by_the_main_node"
    job = shell("a", f"echo . >> {calls}", outputs=(output,))
    plan = plan_of(job)
    (plan.out / "jobs").mkdir(parents=True)
    assert execute(job, plan, Machine(), is_main=False).endswith(" s")
    output.touch()
    execute(job, plan, Machine())
    assert execute(job, plan, Machine(), is_main=False) == "done before"
    assert calls.read_text().split() == [".", "."]


def test_interrupted_commands_end_with_their_workers(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    job = shell("long", f"sh -c 'while true; do echo . >> {beats}; sleep 0.02; done' & wait")
    results: list[BaseException] = []
    commands = Commands()

    def run() -> None:
        try:
            execute(job, plan_of(job), Machine(), commands=commands)
        except NnUNetKDError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not beats.is_file():
        time.sleep(0.01)
    commands.end_all()
    thread.join(10)
    assert len(results) == 1
    count = beats.stat().st_size
    time.sleep(0.3)
    assert beats.stat().st_size == count


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_leaderboard_that_is_ended_ends_its_commands(
    plan_of: Callable[..., Plan], tmp_path: Path, number: signal.Signals
) -> None:
    beats = tmp_path / "beats"
    plan = plan_of(shell("long", f"while true; do echo . >> {beats}; sleep 0.02; done"))
    process = multiprocessing.get_context("fork").Process(target=run_plan, args=(plan, Machine(), 1))
    before = signal.signal(number, signal.SIG_DFL)  # nohup, under which tests may run, ignores SIGHUP
    process.start()
    signal.signal(number, before)
    while not beats.is_file():
        time.sleep(0.01)
    os.kill(process.pid or 0, number)
    process.join(10)
    assert process.exitcode == 128 + number
    count = beats.stat().st_size
    time.sleep(0.3)
    assert beats.stat().st_size == count


def test_a_missing_command_is_named(plan_of: Callable[..., Plan]) -> None:
    with pytest.raises(NnUNetKDError, match="nnUNetv2_nothing is not on the PATH"):
        run_plan(plan_of(Job("a", ("nnUNetv2_nothing",))), Machine(), 1, lambda _: None)


def test_datasets_must_exist_to_run(make_small_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, file = make_small_plan(), tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"line 4: Dataset001_Alpha is not in nnUNet_raw, which is not set"):
        check_data(plan.recipe, file)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    (tmp_path / "Dataset001_Alpha").mkdir()
    with pytest.raises(RecipeError, match=r"line 5: Dataset002_Beta is not in"):
        check_data(plan.recipe, file)
    (tmp_path / "Dataset002_Beta").mkdir()
    check_data(plan.recipe, file)
    seven = make_small_plan(("folds: [0, 1]", "folds: [0, 7]"))  # nnU-Net would divide the cases at random
    with pytest.raises(RecipeError, match=r"line \d+: Dataset001_Alpha has the folds 0 to 4, not 7"):
        check_data(seven.recipe, file)
    for name in ("Dataset001_Alpha", "Dataset002_Beta"):
        (tmp_path / name / "splits_final.json").write_text(json.dumps([{}] * 8))
    check_data(seven.recipe, file)


def test_datasets_must_be_in_the_raw_folder_of_the_recipe(
    make_small_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, file = make_small_plan(("name: small", "name: small\nraw: $SOMEWHERE")), tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"line 2: 'raw' of the recipe is \$SOMEWHERE, and that variable is not set"):
        check_data(plan.recipe, file)
    monkeypatch.setenv("SOMEWHERE", str(tmp_path / "raw"))
    (tmp_path / "raw" / "Dataset001_Alpha").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"line 6: Dataset002_Beta is not in .*raw\."):
        check_data(plan.recipe, file)
    (tmp_path / "raw" / "Dataset002_Beta").mkdir()
    check_data(plan.recipe, file)
