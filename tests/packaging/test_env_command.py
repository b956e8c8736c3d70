"""``eval "$(nnUNetKD_env)"`` adds the installed trainers folder to ``nnUNet_extTrainer`` and touches nothing else."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_kd.cli import env as env_command

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ours() -> str:
    specification = importlib.util.find_spec("nnunet_kd.trainers")
    assert specification is not None
    assert specification.origin is not None
    return str(Path(specification.origin).resolve().parent)


def value_in_a_shell(run_command: Callable, current: str, cwd: Path | None = None) -> str:
    """The variable as a POSIX shell sees it after the documented line; the command is found on PATH, as for a user."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    line = 'eval "$(nnUNetKD_env)" && printf %s "$nnUNet_extTrainer"'
    return run_command(["sh", "-c", line], {"PATH": path, "nnUNet_extTrainer": current}, timeout=60, cwd=cwd).stdout


def test_prints_one_export_line_and_nothing_else(run_command: Callable, ours: str) -> None:
    result = run_command(["nnUNetKD_env"], {}, timeout=60)
    assert result.stdout == f"export nnUNet_extTrainer={shlex.quote(ours)}\n"
    assert result.stderr == ""


@pytest.mark.parametrize("folder", [".", "nnunet_kd", "trainers"])
def test_working_folder_inside_the_checkout_does_not_matter(run_command: Callable, ours: str, folder: str) -> None:
    assert value_in_a_shell(run_command, "", cwd=CHECKOUT / folder) == ours


def test_keeps_other_folders_as_written_and_in_order(run_command: Callable, ours: str) -> None:
    others = ["/data/my trainers", 'relative/it\'s "quoted" $HOME']
    value = value_in_a_shell(run_command, os.pathsep.join(others))
    assert value.split(os.pathsep) == [ours, *others]


def test_second_call_changes_nothing(run_command: Callable, ours: str, tmp_path: Path) -> None:
    once = value_in_a_shell(run_command, str(tmp_path))
    assert value_in_a_shell(run_command, once) == once


def test_our_folder_under_another_spelling_is_not_listed_twice(ours: str, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(ours)
    current = os.pathsep.join(["/first", f"{ours}/", str(link), f"{ours}/../{Path(ours).name}", "", "/last"])
    assert env_command.add_trainers_folder(current).split(os.pathsep) == [ours, "/first", "/last"]


def test_starts_without_torch_nnunet_and_the_trainers(run_command: Callable) -> None:
    code = (
        "import sys; from nnunet_kd.cli.env import main; main([]); "
        "print(sorted({'torch', 'numpy', 'nnunetv2', 'nnunet_kd.trainers'} & set(sys.modules)), file=sys.stderr)"
    )
    assert run_command([sys.executable, "-c", code], {}, timeout=60).stderr == "[]\n"


def test_a_checkout_that_is_not_installed_is_refused_with_the_next_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.endswith("trainers") else real(name))
    with pytest.raises(SystemExit) as stopped:
        env_command.main([])
    assert "pip install" in str(stopped.value)
    assert capsys.readouterr().out == ""
