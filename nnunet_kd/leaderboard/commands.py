"""The commands that a leaderboard runs now: all of them can be ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Lock
from typing import IO

from nnunet_kd.errors import NnUNetKDError


class JobError(NnUNetKDError):
    """A command of a leaderboard failed; the message says which, and names its log if there is one."""


class Commands:
    """Commands in sessions of their own, with their workers, which ``end_all`` ends."""

    def __init__(self) -> None:
        self._groups: set[int] = set()  # process groups that run now
        self._starting = Lock()  # ``end_all`` finds a command either not started or among the groups
        self._is_ended = False

    def run(self, words: Sequence[str], environment: Mapping[str, str], log: IO[str]) -> tuple[int, float | None]:
        """Run a command to its end.

        Args:
            words: The command.
            environment: The whole environment.
            log: Where its output goes.

        Returns:
            Return code, and the largest resident memory of the process or one of its workers in GB where it is known.

        Raises:
            JobError: The command is not on the PATH, or ``end_all`` was called before.
        """
        process = self._start(words, environment, log)
        try:
            if not hasattr(os, "wait4"):
                return process.wait(), None
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            unit = 1 if sys.platform == "darwin" else 1024
            return process.returncode, usage.ru_maxrss * unit / 1e9
        finally:
            self._groups.discard(process.pid)

    def _start(self, words: Sequence[str], environment: Mapping[str, str], log: IO[str]) -> subprocess.Popen[bytes]:
        with self._starting:
            if self._is_ended:
                raise JobError(f"{words[0]} was not started: this leaderboard is being ended.")
            try:
                process = subprocess.Popen(
                    words,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that its workers can be ended with it
                )
            except FileNotFoundError as error:
                raise JobError(f"The command {words[0]} is not on the PATH. Install nnunet-kd with pip.") from error
            self._groups.add(process.pid)
            return process

    def end_all(self) -> None:
        """End the commands that run now, and their workers, and start no others."""
        self._is_ended = True  # at once: what interrupts the waiting below cannot start another
        with self._starting:
            for group in list(self._groups):
                with suppress(ProcessLookupError, PermissionError):  # the latter on macOS, where it has just ended
                    os.killpg(group, signal.SIGTERM)
