"""Running steps: logs, what is skipped the second time, what a failure shows and leaves behind."""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path

import pytest

from nnunet_kd.demo import runner
from nnunet_kd.demo.runner import Command, Step, find_command, run_steps
from nnunet_kd.errors import NnUNetKDError


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A command that appends a line to the file named first, and runs the Python code given second."""
    folder = tmp_path / "bin"
    folder.mkdir()
    file = folder / "demo_test_command"
    code = "import sys, time, os\nopen(sys.argv[1], 'a').write('ran\\n')\nexec(sys.argv[2])\n"
    file.write_text(f"#!{sys.executable}\n{code}")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return file.name


def step(script: str, *entries: tuple[Path, str]) -> Step:
    return Step("a step", tuple(Command(file.name, (script, str(file), code), (file,)) for file, code in entries))


def run(steps: list[Step], logs: Path) -> None:
    run_steps(steps, dict(os.environ), logs, num_before=0, num_all=len(steps))


def test_finished_steps_are_skipped(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    steps = [step(script, (first, "print('hello')")), step(script, (second, ""))]
    run(steps, tmp_path / "logs")
    assert (tmp_path / "logs" / "one.log").read_text() == "hello\n"
    assert "[1/2] a step" in capsys.readouterr().out
    run(steps, tmp_path / "logs")
    assert first.read_text() == second.read_text() == "ran\n"
    assert capsys.readouterr().out.count("done before") == 2


def test_lost_output_is_made_again(script: str, tmp_path: Path) -> None:
    output = tmp_path / "one"
    steps = [step(script, (output, ""))]
    run(steps, tmp_path / "logs")
    output.unlink()
    run(steps, tmp_path / "logs")
    assert output.exists()


def test_failure_shows_the_end_of_the_log_and_is_repeated(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "one"
    code = "print('first line'); print('x\\n' * 100); sys.exit('no disk left')"
    steps = [step(script, (output, code))]
    with pytest.raises(NnUNetKDError, match=r"returned 1: demo_test_command(.|\n)*logs/one\.log"):
        run(steps, tmp_path / "logs")
    shown = capsys.readouterr().err
    assert "no disk left" in shown
    assert "first line" not in shown
    with pytest.raises(NnUNetKDError):
        run(steps, tmp_path / "logs")
    assert output.read_text() == "ran\nran\n"


def test_failure_ends_the_other_command_and_is_the_one_reported(script: str, tmp_path: Path) -> None:
    slow, broken = tmp_path / "slow", tmp_path / "broken"
    code = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    start = time.monotonic()
    with pytest.raises(NnUNetKDError, match=r"returned 3: .*broken"):
        run([step(script, (slow, code), (broken, "time.sleep(1); sys.exit(3)"))], tmp_path / "logs")
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_commands_run_side_by_side(script: str, tmp_path: Path) -> None:
    # each waits for the other's file
    entries = [
        (tmp_path / own, f"\nwhile not os.path.exists({str(tmp_path / other)!r}): time.sleep(0.05)")
        for own, other in (("one", "two"), ("two", "one"))
    ]
    run([step(script, *entries)], tmp_path / "logs")
    assert (tmp_path / "logs" / "two.done").exists()


def test_no_more_than_two_run_at_a_time_and_in_order(script: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"open({str(log)!r}, 'a').write('+'); time.sleep(0.5); open({str(log)!r}, 'a').write('-')"
    run([step(script, *((tmp_path / name, code) for name in "abcd"))], tmp_path / "logs")
    text = log.read_text()
    assert sorted(text) == sorted("+-" * 4)
    assert max(text[:end].count("+") - text[:end].count("-") for end in range(1, 9)) == 2
    markers = [(tmp_path / "logs" / f"{name}.done").stat().st_mtime_ns for name in "abcd"]
    assert max(markers[:2]) <= min(markers[2:])


def test_only_what_failed_is_repeated(script: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    marker = tmp_path / "logs" / "good.done"
    code = f"\nwhile not os.path.exists({str(marker)!r}): time.sleep(0.05)\n"
    with pytest.raises(NnUNetKDError):
        run([step(script, (good, ""), (bad, f"{code}sys.exit(1)"))], tmp_path / "logs")
    run([step(script, (good, ""), (bad, ""))], tmp_path / "logs")
    assert good.read_text() == "ran\n"
    assert bad.read_text() == "ran\nran\n"


def test_success_without_output_is_an_error(script: str, tmp_path: Path) -> None:
    output = tmp_path / "one"
    with pytest.raises(NnUNetKDError, match="did not write"):
        run([step(script, (output, f"os.remove({str(output)!r})"))], tmp_path / "logs")


def test_unknown_command() -> None:
    with pytest.raises(NnUNetKDError, match="no_such_command is neither"):
        find_command("no_such_command")


def test_last_epoch_of_a_running_training(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("2026: Epoch 3\nEpoch time: 12 s\n" + "2026: Epoch 14\nlearning rate 0.01\n")
    assert runner._last_epoch(log) == "epoch 14"
    log.write_text("starting\n")
    assert runner._last_epoch(log) == ""
