"""Submit what is missing to Slurm through submitit, each job after those that it needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.leaderboard.execute import ELSEWHERE, check_conflicts, execute
from nnunet_kd.leaderboard.plan import Job, Machine, Plan
from nnunet_kd.leaderboard.record import State, state_of


@dataclass(frozen=True)
class SlurmJob:
    """What a node of the cluster calls."""

    job: Job
    plan: Plan
    machine: Machine

    def __call__(self) -> str:
        """Run the job; of several nodes, each starts its part of the training."""
        import submitit

        is_main = True
        if self.machine.nodes > 1 and self.job.run is not None:
            node = submitit.helpers.TorchDistributedEnvironment()
            os.environ["MASTER_ADDR"] = node.master_addr
            is_main = node.rank == 0
        result = execute(self.job, self.plan, self.machine, is_main=is_main)
        if result == ELSEWHERE:  # what needs it must not start now
            raise NnUNetKDError(f"{self.job.name} is being run by another process.")
        return result

    def checkpoint(self, *_: Any) -> Any:
        """Asked by submitit when the job is preempted or its time is over: queue it again, where it resumes."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit_plan(
    plan: Plan, machine: Machine, options: Mapping[str, str], say: Callable[[str], None] = print
) -> dict[str, str]:
    """Submit all jobs that are not finished.

    Args:
        plan: The jobs.
        machine: How they run.
        options: Slurm's, for example partition and time; "time" in minutes.
        say: Called with a line for every job.

    Returns:
        Job name to Slurm's id.

    Raises:
        NnUNetKDError: submitit is not installed, or the output folder has runs with other settings.
    """
    try:
        import submitit
    except ImportError as error:
        raise NnUNetKDError(
            "--cluster slurm needs submitit, which is not installed. Run: pip install 'nnunet-kd[cluster]'"
        ) from error
    check_conflicts(plan)
    logs = plan.out / "jobs" / "slurm"
    ids: dict[str, str] = {}
    for job in plan.jobs:
        if state_of(job, plan.out) is State.FINISHED:
            continue
        executor = submitit.AutoExecutor(folder=logs, cluster="slurm")
        executor.update_parameters(**_parameters(job, machine, options, ids))
        ids[job.name] = executor.submit(SlurmJob(job, plan, machine)).job_id
        say(f"{ids[job.name]} {job.name}")
    return ids


def _parameters(job: Job, machine: Machine, options: Mapping[str, str], ids: Mapping[str, str]) -> dict[str, Any]:
    uses_gpu = machine.device == "cuda" and (job.run is not None or job.evaluation is not None)
    is_distributed = job.run is not None and machine.nodes > 1
    num_gpus = machine.num_gpus if job.run is not None else 1
    additional = {key: value for key, value in options.items() if key not in ("time", "partition")}
    needed = [ids[name] for name in job.needs if name in ids]
    if needed:
        # a job whose needs failed would wait for ever
        additional |= {"dependency": "afterok:" + ":".join(needed), "kill-on-invalid-dep": "yes"}
    parameters: dict[str, Any] = {
        "name": job.name,
        "nodes": machine.nodes if is_distributed else 1,
        "tasks_per_node": 1,
        "cpus_per_task": max(machine.num_processes, machine.num_threads),
        "gpus_per_node": num_gpus if uses_gpu else 0,
        "slurm_additional_parameters": additional,
    }
    if "time" in options:
        parameters["timeout_min"] = int(options["time"])
    if "partition" in options:
        parameters["slurm_partition"] = options["partition"]
    return parameters


def read_options(words: list[str]) -> dict[str, str]:
    """``KEY=VALUE`` words as options.

    Raises:
        NnUNetKDError: A word has no "=", or the time is no number of minutes.
    """
    pairs = [word.partition("=") for word in words]
    for (key, sign, value), word in zip(pairs, words, strict=True):
        if not key or not sign or not value or (key == "time" and not value.isdigit()):
            raise NnUNetKDError(
                f"--slurm {word} is not possible. Write KEY=VALUE, for example partition=gpu time=2880."
            )
    return {key: value for key, _, value in pairs}
