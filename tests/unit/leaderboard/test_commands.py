"""The end of commands, in the moment in which one of them starts too."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nnunet_kd.leaderboard.commands import Commands, JobError


def test_a_command_that_is_just_starting_ends_too_and_no_other_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands, runs, results = Commands(), tmp_path / "runs", []
    is_running, popen = threading.Event(), subprocess.Popen

    def slow(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        """The command runs already, but its process is not known here yet."""
        process = popen(*args, **kwargs)
        while not runs.is_file():
            time.sleep(0.01)
        is_running.set()
        time.sleep(0.3)
        return process

    with (tmp_path / "log").open("a") as log:
        words = ("sh", "-c", f"touch {runs}; exec sleep 60")
        thread = threading.Thread(target=lambda: results.append(commands.run(words, os.environ, log)))
        monkeypatch.setattr(subprocess, "Popen", slow)
        thread.start()
        assert is_running.wait(10)
        commands.end_all()
        thread.join(10)
        assert [code for code, _ in results] == [-signal.SIGTERM]
        monkeypatch.undo()
        with pytest.raises(JobError, match="true was not started"):
            commands.run(("true",), os.environ, log)
