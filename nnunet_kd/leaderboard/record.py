"""What is finished: nnU-Net's own files, and our record beside them with the hash of what was asked for.

A record is written before a training starts. So a half-finished one is continued only with the settings that it was
started with, and nothing is ever overwritten by a recipe that changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.files import write_json
from nnunet_kd.leaderboard.plan import Job
from nnunet_kd.leaderboard.runs import Run
from nnunet_kd.settings import BLOCK

RECORD = "leaderboard.json"
OF_THE_MACHINE = ("training.num_threads",)  # settings that change no result


class State(Enum):
    """How far a job is."""

    MISSING = "missing"
    HALF = "half finished"
    FINISHED = "finished"
    OTHER = "made with other settings"
    UNKNOWN = "without a record of its settings"


def record_file(job: Job, out: Path) -> Path:
    """Beside the fold of a training; in ``OUT/jobs`` for all else."""
    return job.run.fold_folder / RECORD if job.run is not None else out / "jobs" / f"{job.name}.json"


def read_record(file: Path) -> dict[str, Any] | None:
    """The record; None where there is none.

    Raises:
        NnUNetKDError: It is broken.
    """
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NnUNetKDError(
            f"{file} is broken ({error}). Move its folder away, so that the run is repeated."
        ) from error
    if not isinstance(content, dict) or "hash" not in content:
        raise NnUNetKDError(f"{file} is no record of a run. Move its folder away, so that the run is repeated.")
    return content


def write_record(file: Path, job: Job, **values: Any) -> None:
    """Write or extend the record of a job."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = read_record(file) or {}
    identity = {} if job.run is None else {"identity": job.run.identity}
    write_json(file, {**before, "hash": job.hash, **identity, "command": job.shell(), **values})


def state_of(job: Job, out: Path) -> State:
    """How far a job is."""
    record = read_record(record_file(job, out))
    complete = all(output.exists() for output in job.outputs)
    if job.run is None:
        is_done = record is not None and record["hash"] == job.hash and record.get("finished", False)
        if job.evaluation is not None and record is not None and record["hash"] != job.hash:
            return State.OTHER if any(output.exists() for output in job.outputs) else State.MISSING
        return State.FINISHED if is_done and complete else State.MISSING
    if record is not None and record["hash"] != job.hash:
        return State.OTHER
    if record is None and _has_files(job.run):
        if not _was_asked_for(job.run):
            return State.UNKNOWN
        write_record(record_file(job, out), job, by_hand=True)
    if complete:
        return State.FINISHED
    return State.HALF if _has_files(job.run) else State.MISSING


def changes(job: Job, out: Path) -> str:
    """What differs between the record of a run and what is asked for now."""
    record = read_record(record_file(job, out)) or {}
    if job.run is None:
        return ""
    before, now = _flat(record.get("identity", {})), _flat(job.run.identity)
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    shown = [f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names[:3]]
    return "; ".join([*shown, *([f"{len(names) - 3} more"] if len(names) > 3 else [])])


def _has_files(run: Run) -> bool:
    return any(run.fold_folder.glob("checkpoint_*.pth"))


def _was_asked_for(run: Run) -> bool:
    """Whether a run without record, as a command by hand leaves it, was told exactly what the recipe says.

    Our trainers keep what they were told in their checkpoints; of a stock trainer's run nothing is known.
    """
    from nnunet_kd.teachers.checkpoint import load_checkpoint  # imports torch

    files = [run.fold_folder / f"checkpoint_{kind}.pth" for kind in ("final", "latest", "best")]
    checkpoint = load_checkpoint(next(file for file in files if file.is_file()))
    given = checkpoint.get(BLOCK, {}).get("given_settings")
    return given is not None and _told(given) == _told(run.full_settings)


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in _flat(settings).items() if value != {} and name not in OF_THE_MACHINE}


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    """Nested objects as dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {where: value}
    return {
        name: own for key, entry in value.items() for name, own in _flat(entry, f"{where}.{key}".strip(".")).items()
    }
