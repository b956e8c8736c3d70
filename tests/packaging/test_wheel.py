"""What a user installs: the wheel's content, and the command and nnU-Net's search that find the trainers in it."""

from __future__ import annotations

import configparser
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
TRAINERS = {
    "nnUNetTrainerKDTeacher": "nnunet_kd.training.teacher",
    "nnUNetTrainerKDStudent": "nnunet_kd.training.student",
    "nnUNetTrainerKDControl": "nnunet_kd.training.control",
    "nnUNetTrainerSIKDTeacher": "nnunet_kd.training.shape_intensity",
    "nnUNetTrainerDINOMix": "nnunet_kd.training.dino_mix",
    "nnUNetTrainerAdaIN": "nnunet_kd.training.adaptation",
    "nnUNetTrainerSIKDStudent": "nnunet_kd.training.shape_intensity",
}
BUILD_INPUTS = ("setup.py", "pyproject.toml", "LICENSE", "README.md", "nnunet_kd", "trainers", "planners", "tests")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: building leaves a ``build`` folder behind, whose old files enter the next wheel."""
    copy = tmp_path_factory.mktemp("source") / "nnunet-kd"
    copy.mkdir()
    for name in BUILD_INPUTS:
        origin = CHECKOUT / name
        if origin.is_dir():
            shutil.copytree(origin, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif origin.exists():
            shutil.copy(origin, copy / name)
    return copy


@pytest.fixture(scope="module")
def build(source: Path, run_command: Callable) -> Callable[[str], Path]:
    """Build with the backend that pyproject.toml names: ``wheel`` or ``editable``."""

    def run(kind: str) -> Path:
        out = source.parent / kind
        out.mkdir(exist_ok=True)
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
        run_command([sys.executable, "-c", code], {}, timeout=300, cwd=source)
        (wheel,) = out.glob("*.whl")
        return wheel

    return run


@pytest.fixture(scope="module")
def wheel(build: Callable[[str], Path]) -> Path:
    return build("wheel")


# Discovery comes first, as in nnUNetv2_train: only then is nnunet_kd imported under its own name.
DISCOVERY = """
import contextlib, importlib, json, multiprocessing, pickle, sys
from pathlib import Path

def find(names):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    with contextlib.redirect_stdout(sys.stderr):
        return [recursive_find_trainer_class_by_name(name) for name in names]

def describe(classes):
    names = [[found.__qualname__, found.__module__] for found in classes]
    return {"classes": names, "package": str(Path(sys.modules["nnunet_kd"].__file__).resolve().parent)}

def in_child(names, pickled, answers):
    found = find(names)
    answers.put({**describe(found), "same": pickle.loads(pickled) == found})

if __name__ == "__main__":
    trainers = json.loads(sys.argv[1])
    context = multiprocessing.get_context("spawn")
    found = find(trainers)
    answers = context.Queue()
    child = context.Process(target=in_child, args=(list(trainers), pickle.dumps(found), answers))
    child.start()
    again = find(trainers)
    imported = [getattr(importlib.import_module(home), name) for name, home in trainers.items()]
    main = {**describe(found), "same": found == again == imported == pickle.loads(pickle.dumps(found))}
    print(json.dumps({"main": main, "spawned": answers.get(timeout=200)}))
    child.join()
"""


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A regular installation: the folder to which the wheel was unpacked."""
    target = tmp_path_factory.mktemp("site packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture(scope="module")
def console_scripts(wheel: Path) -> dict[str, str]:
    """Command to ``module:function``, as the wheel declares them."""
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        parser = configparser.ConfigParser()
        parser.optionxform = str  # commands keep their upper case letters
        parser.read_string(archive.read(entry_points).decode())
    return dict(parser["console_scripts"])


def python_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_wheel_holds_the_package_and_the_two_mapped_folders_and_nothing_else(wheel: Path, source: Path) -> None:
    """A subfolder without ``__init__.py`` is missing here, although an editable installation shows it."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {f"nnunet_kd/{name}" for name in python_files(source / "nnunet_kd")}
    for folder in ("trainers", "planners"):
        expected |= {f"nnunet_kd/{folder}/{name}" for name in python_files(source / folder)}
    assert sorted(name for name in names if name.endswith(".py")) == sorted(expected)
    assert "nnunet_kd/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"nnunet_kd"}


def test_wheel_carries_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = [name for name in archive.namelist() if name.endswith("LICENSE")]
        assert "Apache License" in archive.read(licence).decode()


def test_every_command_names_a_function_that_exists(console_scripts: dict[str, str], source: Path) -> None:
    missing = []
    for command, target in console_scripts.items():
        module, function = target.split(":")
        parts = module.split(".")[1:]
        folder = source if parts[0] in ("trainers", "planners") else source / "nnunet_kd"
        path = folder.joinpath(*parts).with_suffix(".py")
        if not path.exists() or f"def {function}(" not in path.read_text():
            missing.append(f"{command} = {target}")
    assert "nnUNetKD_env" in console_scripts
    assert missing == []


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_fresh_installation_prints_its_own_trainers_folder(
    kind: str, build: Callable[[str], Path], source: Path, tmp_path: Path, run_command: Callable
) -> None:
    """Without site-packages (-S), so that the installation under test cannot be taken for the present one."""
    target = tmp_path / "site packages"
    with zipfile.ZipFile(build(kind)) as archive:
        archive.extractall(target)
    code = f"import site; site.addsitedir({str(target)!r}); from nnunet_kd.cli.env import main; main([])"
    result = run_command([sys.executable, "-S", "-c", code], {}, timeout=60)
    folder = source / "trainers" if kind == "editable" else target / "nnunet_kd" / "trainers"
    assert str(folder.resolve()) in result.stdout
    assert folder.joinpath("nnUNetTrainerKDStudent.py").exists()


def test_every_file_in_trainers_is_checked_here() -> None:
    assert {path.stem for path in (CHECKOUT / "trainers").glob("*.py")} == {"__init__", *TRAINERS}


@pytest.mark.integration
def test_nnunet_finds_one_picklable_class_per_trainer(
    installed: Path, tmp_path: Path, make_nnunet_dirs: Callable, run_command: Callable
) -> None:
    """In a regular installation, in a fresh process and in one that it spawns.

    PYTHONPATH goes before site-packages, where an editable installation may be.
    """
    script = tmp_path / "discover.py"
    script.write_text(DISCOVERY)
    environment = {
        **make_nnunet_dirs().environment,
        "PYTHONPATH": str(installed),
        "nnUNet_extTrainer": str(installed / "nnunet_kd" / "trainers"),
    }
    result = run_command([sys.executable, script, json.dumps(TRAINERS)], environment, timeout=300)
    package = str(installed.resolve() / "nnunet_kd")
    expected = {"classes": [[name, home] for name, home in TRAINERS.items()], "package": package, "same": True}
    assert json.loads(result.stdout) == {"main": expected, "spawned": expected}
