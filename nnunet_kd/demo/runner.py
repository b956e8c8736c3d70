"""Run console commands step by step: logs in files, one line of progress per step, finished steps are skipped."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from nnunet_kd.errors import NnUNetKDError

NUM_AT_A_TIME = 2  # most commands keep one core busy
TAIL_LINES = 30
EPOCH = re.compile(r"\bEpoch (\d+)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A console command of this interpreter's environment. ``name`` names its log file.

    It is finished when it has succeeded and ``outputs`` exist.
    """

    name: str
    arguments: tuple[str, ...]
    outputs: tuple[Path, ...]


@dataclass(frozen=True)
class Step:
    """Commands that do not need each other; they start in order, ``NUM_AT_A_TIME`` run side by side."""

    title: str
    commands: tuple[Command, ...]


def run_steps(
    steps: Sequence[Step], environment: Mapping[str, str], log_folder: Path, *, num_before: int, num_all: int
) -> None:
    """Run the steps in order and skip the commands that an earlier call finished.

    Args:
        steps: What to run.
        environment: The whole environment of the commands.
        log_folder: One ``<command>.log`` each, and an empty ``<command>.done`` when it succeeded.
        num_before: Steps that the caller has shown already.
        num_all: Steps in all, for the count in the progress lines.

    Raises:
        NnUNetKDError: A command failed; the end of its log is printed before.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, start=num_before + 1):
        with progress(number, num_all, step.title) as line:
            commands = [command for command in step.commands if not is_finished(command, log_folder)]
            if not commands:
                line.result = "done before"
            _run(commands, environment, log_folder, line)


def is_finished(command: Command, log_folder: Path) -> bool:
    """Whether an earlier call finished the command and its outputs are still there."""
    return _marker(command, log_folder).is_file() and all(output.exists() for output in command.outputs)


def find_command(name: str) -> str:
    """The console script beside this interpreter, or else the one on the PATH.

    Raises:
        NnUNetKDError: There is none.
    """
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        msg = f"The command {name} is neither beside {sys.executable} nor on the PATH. Install nnunet-kd with pip."
        raise NnUNetKDError(msg)
    return found


class progress:  # noqa: N801 (used like a function)
    """One line on stdout: what runs, how long; a terminal also sees what is going on."""

    def __init__(self, number: int, num_all: int, title: str) -> None:
        self.prefix = f"[{number:>{len(str(num_all))}}/{num_all}] {title}"
        self.result = ""
        self.is_live = sys.stdout.isatty()

    def __enter__(self) -> progress:
        self.start = time.monotonic()
        if not self.is_live:
            print(f"{self.prefix} ...", flush=True)
        return self

    def update(self, what: str) -> None:
        """Show what is going on now."""
        if self.is_live:
            print(f"\r\033[K{self.prefix}  {self._seconds()}  {what}", end="", flush=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        result = self.result or (self._seconds() if kind is None else f"failed after {self._seconds()}")
        print(f"\r\033[K{self.prefix}  {result}" if self.is_live else f"    {result}", flush=True)

    def _seconds(self) -> str:
        return f"{time.monotonic() - self.start:.0f} s"


def _run(commands: Sequence[Command], environment: Mapping[str, str], log_folder: Path, line: progress) -> None:
    executables = [find_command(command.arguments[0]) for command in commands]
    waiting = list(zip(commands, executables, strict=True))
    running: list[tuple[Command, subprocess.Popen[bytes], Path]] = []
    with ExitStack() as stack:
        while waiting or running:
            while waiting and len(running) < NUM_AT_A_TIME:
                command, executable = waiting.pop(0)
                log = log_folder / f"{command.name}.log"
                file = stack.enter_context(log.open("w"))
                process = subprocess.Popen(
                    [executable, *command.arguments[1:]],
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that its worker processes can be ended with it
                )
                stack.callback(_end, process)
                running.append((command, process, log))
            time.sleep(0.2)
            line.update(", ".join(f"{command.name} {_last_epoch(log)}".rstrip() for command, _, log in running))
            for entry in running.copy():
                command, process, log = entry
                return_code = process.poll()
                if return_code is not None:
                    _finish(command, return_code, log)
                    running.remove(entry)


def _finish(command: Command, return_code: int, log: Path) -> None:
    if return_code != 0:
        _fail(command, return_code, log)
    missing = [output for output in command.outputs if not output.exists()]
    if missing:
        msg = f"{shlex.join(command.arguments)} succeeded but did not write {missing[0]}. Its whole output is in {log}."
        raise NnUNetKDError(msg)
    _marker(command, log.parent).touch()


def _fail(command: Command, return_code: int, log: Path) -> None:
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    print("\n".join(["", f"--- the end of {log}", *lines, "---"]), file=sys.stderr, flush=True)
    msg = (
        f"This command returned {return_code}: {shlex.join(command.arguments)}\nIts whole output is in {log}. Mend the "
        f"cause and run the same demo command again: finished steps are not repeated."
    )
    raise NnUNetKDError(msg)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its workers, if it still runs."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _last_epoch(log: Path) -> str:
    """The last ``Epoch 7`` in the end of a training's output."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 8192))
        epochs = EPOCH.findall(file.read().decode(errors="replace"))
    return f"epoch {epochs[-1]}" if epochs else ""


def _marker(command: Command, log_folder: Path) -> Path:
    return log_folder / f"{command.name}.done"
