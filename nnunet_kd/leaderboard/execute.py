"""Run one job to its end: never twice, never over another result, with a log and a record."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from threading import Lock
from typing import IO, Any

from filelock import FileLock, Timeout

from nnunet_kd.environment import TRAINERS_VARIABLE, add_trainers_folder
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.leaderboard.commands import Commands, JobError
from nnunet_kd.leaderboard.plan import Job, Machine, Plan
from nnunet_kd.leaderboard.record import State, changes, read_record, record_file, state_of, write_record
from nnunet_kd.leaderboard.runs import Run, trained_datasets
from nnunet_kd.leaderboard.scores import case_scores

TAIL_LINES = 25
DONE, ELSEWHERE = "done before", "runs elsewhere"
_measuring = Lock()  # nnU-Net finds trainers through sys.path and sys.modules, which threads share


def execute(job: Job, plan: Plan, machine: Machine, *, commands: Commands | None = None, is_main: bool = True) -> str:
    """Run a job if it is not finished, and measure a training that has finished.

    Args:
        job: The job.
        plan: Where it belongs.
        machine: Where it runs.
        commands: Among which the job's command is ended; None where nothing here ends it.
        is_main: Of several nodes that train together, only one writes records.

    Returns:
        "done before", "runs elsewhere", or how long it took.

    Raises:
        JobError: The command failed or did not write its outputs, or the run was made with other settings.
    """
    commands = commands or Commands()
    if not is_main:  # the others would wait for a main node that has nothing to do
        if _refuse_or_finished(job, plan.out):
            return DONE
        seconds, _ = _call(job, plan, machine, commands, alone=False)
        return f"{seconds:.0f} s"
    locks = plan.out / "jobs"
    locks.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(locks / f"{job.name}.lock", timeout=0):
            result = DONE if _refuse_or_finished(job, plan.out) else _call_and_record(job, plan, machine, commands)
            measure_once(job, plan)
            return result
    except Timeout:
        return ELSEWHERE


def _refuse_or_finished(job: Job, out: Path) -> bool:
    """Whether there is nothing left to do; raises JobError where something else is in its place."""
    state = state_of(job, out)
    if state in (State.OTHER, State.UNKNOWN):
        raise JobError(conflict(job, out, state))
    return state is State.FINISHED


def conflict(job: Job, out: Path, state: State) -> str:
    """Why a run or the predictions of a test set are left as they are."""
    if job.evaluation is not None:
        return (
            f"{job.evaluation.predictions} holds predictions of another training or of a test set that was defined "
            f"otherwise. Give another -o, or move that folder away."
        )
    folder = record_file(job, out).parent
    what = changes(job, out) if state is State.OTHER else "its settings are not those of the recipe, or not known"
    return f"{folder} was made with other settings ({what}). Give another -o, or move that folder away."


def check_conflicts(plan: Plan) -> None:
    """Refuse a recipe whose output folder has runs with other settings.

    Raises:
        NnUNetKDError: Lists them.
    """
    results = [job for job in plan.jobs if job.run is not None or job.evaluation is not None]
    states = [(job, state_of(job, plan.out)) for job in results]
    wrong = [conflict(job, plan.out, state) for job, state in states if state in (State.OTHER, State.UNKNOWN)]
    if wrong:
        more = f"\n... and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise NnUNetKDError("\n".join(wrong[:5]) + more)


def environment_of(job: Job, machine: Machine) -> dict[str, str]:
    """The whole environment of a job; what the user has set stays."""
    defaults = {"MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
    if machine.device == "cpu":
        defaults |= {
            "nnUNet_compile": "f",
            # without workers the seed fixes the batches; a thread of its own is what a second worker would need
            "nnUNet_n_proc_DA": "0" if machine.num_threads == 1 else str(machine.num_threads),
            "nnUNet_def_n_proc": str(machine.num_threads),
            "OMP_NUM_THREADS": str(machine.num_threads),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
    trainers = add_trainers_folder(os.environ.get(TRAINERS_VARIABLE, ""))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**defaults, **os.environ, TRAINERS_VARIABLE: trainers, "PATH": path, **job.environment}


def measure_once(job: Job, plan: Plan) -> None:
    """Costs and per-case scores of a finished job, where they are not known yet."""
    run = job.run
    with _measuring:
        if run is not None:
            known_costs(job, plan)
        for evaluation in plan.evaluations:
            is_own = evaluation is job.evaluation or (evaluation.run is run and not evaluation.test)
            if is_own and plan.has_segmentation(evaluation):
                case_scores(plan.recipe, evaluation, plan.out)


def known_costs(job: Job, plan: Plan) -> dict[str, Any]:
    """The record of a finished training with its costs, which are measured once."""
    file = record_file(job, plan.out)
    record = read_record(file) or {}
    if "costs" not in record and job.run is not None:
        write_record(file, job, costs=_costs_of(job.run, plan))
        record = read_record(file) or {}
    return record


def _costs_of(run: Run, plan: Plan) -> dict[str, Any]:
    """See ``costs.measure``."""
    from nnunet_kd.leaderboard.costs import measure  # imports torch and nnU-Net

    heads = None
    if run.group in plan.recipe.joints:
        heads = {name: plan.recipe.datasets[name].folder for name in trained_datasets(plan.recipe, run)}
    with redirect_stdout(io.StringIO()):  # nnU-Net says where it looks for trainers
        return measure(run, heads)


def _call_and_record(job: Job, plan: Plan, machine: Machine, commands: Commands) -> str:
    file = record_file(job, plan.out)
    earlier = read_record(file) or {}
    num_gpus = machine.num_gpus * machine.nodes
    is_changed = state_of(job, plan.out) is State.HALF and earlier.get("num_gpus", num_gpus) != num_gpus
    write_record(file, job, finished=False, num_gpus=None if is_changed else num_gpus)
    seconds, peak_gb = _call(job, plan, machine, commands, alone=machine.nodes == 1)
    missing = [output for output in job.outputs if not output.exists()]
    if missing:
        log = _log_of(job, plan)
        raise JobError(f"{job.name} succeeded but did not write {missing[0]}. Its output is in {log}.")
    peaks = [value for value in (peak_gb, earlier.get("peak_memory_gb")) if value is not None]
    wall_seconds = seconds + earlier.get("wall_seconds", 0.0)
    write_record(file, job, finished=True, wall_seconds=wall_seconds, peak_memory_gb=max(peaks, default=None))
    return f"{seconds:.0f} s"


def _log_of(job: Job, plan: Plan) -> Path:
    return plan.out / "jobs" / f"{job.name}.log"


def _call(job: Job, plan: Plan, machine: Machine, commands: Commands, alone: bool) -> tuple[float, float | None]:
    """Seconds that the command took, and its peak memory in GB where that is known; ``alone``: on one node."""
    log, environment = _log_of(job, plan), environment_of(job, machine)
    start = time.time()
    with log.open("a") as stream:
        if alone:
            _lock(stream)
        code, peak_gb = commands.run([_expanded(word, environment) for word in job.command], environment, stream)
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise JobError(f"{job.name} returned {code}. The end of {log}:\n{tail}")
    return time.time() - start, peak_gb


def _expanded(word: str, environment: Mapping[str, str]) -> str:
    """A word with its variables: the rendezvous of several nodes, and nnUNet_raw of test images."""
    return re.sub(r"\$(\w+)", lambda found: environment.get(found[1], found[0]), word)


def _lock(log: IO[str]) -> None:
    """Lock the log for this process and the command that inherits it, which may outlive this process (kill -9).

    Raises:
        Timeout: Such a command still runs.
    """
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Timeout(log.name) from error
    except OSError:  # a file system without locks
        return
