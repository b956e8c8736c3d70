"""Stock nnU-Net finds each trainer by name, in fresh and in spawned processes, and can pickle what it finds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
TRAINERS = {
    "nnUNetTrainerKDTeacher": "nnunet_kd.training.teacher",
    "nnUNetTrainerKDStudent": "nnunet_kd.training.student",
    "nnUNetTrainerKDControl": "nnunet_kd.training.control",
}

# Discovery comes first, as in nnUNetv2_train: only then is nnunet_kd imported under its own name.
SCRIPT = """
import contextlib, importlib, json, multiprocessing, pickle, sys

def find(name):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    with contextlib.redirect_stdout(sys.stderr):
        return recursive_find_trainer_class_by_name(name)

def in_child(pickled, name, answers):
    found = find(name)
    answers.put({"name": found.__qualname__, "same": pickle.loads(pickled) is found})

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    report = {}
    for name, home in json.loads(sys.argv[1]).items():
        first, second = find(name), find(name)
        report[name] = {
            "module": first.__module__,
            "same twice": first is second,
            "same as imported": first is getattr(importlib.import_module(home), name),
            "same after pickling": pickle.loads(pickle.dumps(first)) is first,
        }
    answers = context.Queue()
    child = context.Process(target=in_child, args=(pickle.dumps(first), name, answers))
    child.start()
    report["child"] = answers.get(timeout=200)
    child.join()
    print(json.dumps(report))
"""


def test_every_file_in_trainers_is_checked_here() -> None:
    assert {path.stem for path in (CHECKOUT / "trainers").glob("*.py")} == {"__init__", *TRAINERS}


@pytest.mark.integration
def test_discovery_gives_one_picklable_class_per_trainer(
    tmp_path: Path, make_nnunet_dirs: Callable, run_command: Callable
) -> None:
    script = tmp_path / "discover.py"
    script.write_text(SCRIPT)
    result = run_command([sys.executable, script, json.dumps(TRAINERS)], make_nnunet_dirs().environment, timeout=300)
    report = json.loads(result.stdout)
    assert report.pop("child") == {"name": list(TRAINERS)[-1], "same": True}
    assert report == {
        name: {"module": home, "same twice": True, "same as imported": True, "same after pickling": True}
        for name, home in TRAINERS.items()
    }
