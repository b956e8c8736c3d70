"""Run what is missing on this machine, several jobs at the same time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.leaderboard.commands import Commands
from nnunet_kd.leaderboard.execute import ELSEWHERE, check_conflicts, execute
from nnunet_kd.leaderboard.plan import Job, Machine, Plan
from nnunet_kd.leaderboard.record import State, state_of


@contextmanager
def _ending(commands: Commands) -> Iterator[None]:
    """What is interrupted ends its commands too: they resume when the plan is run again.

    Commands have sessions of their own, so that the end of this process or of its terminal would not reach them, and
    the next run would start a second training in the same folder.
    """
    in_main = threading.current_thread() is threading.main_thread()  # no other can set handlers
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if in_main and hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]  # nohup ignores SIGHUP
    for number in numbers:
        signal.signal(number, _exit)
    try:
        yield
    except BaseException:
        commands.end_all()
        raise
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def run_plan(plan: Plan, machine: Machine, workers: int, say: Callable[[str], None] = print) -> None:
    """Run all jobs that are not finished, each after those that it needs.

    Args:
        plan: The jobs.
        machine: How they run.
        workers: Jobs at the same time.
        say: Called with a line for every job.

    Raises:
        NnUNetKDError: The output folder has runs with other settings, or jobs failed; the others are finished then.
    """
    check_conflicts(plan)
    finished = {job.name for job in plan.jobs if state_of(job, plan.out) is State.FINISHED}
    waiting = [job for job in plan.jobs if job.name not in finished]
    failed: dict[str, str] = {}
    blocked: set[str] = set()
    say(f"{len(finished)} of {len(plan.jobs)} jobs are finished.")
    running: dict[Future[str], Job] = {}
    commands = Commands()
    with ThreadPoolExecutor(workers) as pool, _ending(commands):
        while waiting or running:
            for job in [job for job in waiting if finished.issuperset(job.needs)][: workers - len(running)]:
                waiting.remove(job)
                say(f"start {job.name}")
                running[pool.submit(execute, job, plan, machine, commands=commands)] = job
            for job in [job for job in waiting if set(job.needs) & {*failed, *blocked}]:
                waiting.remove(job)
                blocked.add(job.name)
            if not running:
                continue
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(done)
                error = done.exception()
                if isinstance(error, NnUNetKDError):
                    failed[job.name] = str(error)
                    say(f"FAILED {job.name}")
                elif error is not None:
                    raise error
                elif done.result() == ELSEWHERE:
                    failed[job.name] = f"{job.name} is being run by another process. Start this command again later."
                else:
                    finished.add(job.name)
                    say(f"{len(finished)}/{len(plan.jobs)} {job.name}: {done.result()}")
    if failed:
        more = f"\n\n{len(blocked)} jobs need these and were not run." if blocked else ""
        raise NnUNetKDError("\n\n".join(failed.values()) + more + "\n\nRun the same command again: it continues here.")
