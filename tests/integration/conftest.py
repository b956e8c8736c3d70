"""Stock and own commands on tiny data, in forked processes, and the trained models that several tests look at.

A command in a fresh process spends most of its time importing torch and nnU-Net, and again in every worker that it
spawns. :class:`World` therefore forks this process, sets ``sys.argv`` and calls the console script's entry point;
process pools fork too, and fingerprints are taken from fewer voxels. What depends on fresh processes is tested with
``run_command`` (packaging, and where it is said here).
"""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image

CONFIGURATION = "3d_fullres"
SHORT = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "seed": 1}
TEACHER_SETTINGS = {"training": {**SHORT, "num_val_iterations_per_epoch": 3}, "budget": "total"}
STUDENT_SETTINGS = {
    "training": SHORT,
    "terms": [
        {"on": "logits", "loss": "kl", "temperature": 2.0, "schedule": {"kind": "constant"}},
        {"on": "features", "loss": "mse", "levels": ["bottleneck", "decoder@1/2"], "weight": 0.5},
    ],
}


@dataclass(frozen=True)
class Started:
    """A command that runs in a process of its own."""

    args: tuple[str, ...]
    pid: int
    output: Path

    def poll(self) -> int | None:
        """The return code, None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        """SIGKILL the command and its workers, and wait until they are gone."""
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _call_entry_point(args: Sequence[str], environment: Mapping[str, str], output: Path) -> int:
    """In the forked child: become the command."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, errors="replace")
    os.environ.update(environment)
    sys.argv = list(args)
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork  # type: ignore[assignment, misc]
    multiprocessing.cpu_count = lambda: 1  # type: ignore[assignment]
    matplotlib.rcParams["figure.dpi"] = 10  # stock progress.png has 16 million pixels, a second of every epoch
    _sample_fewer_voxels()
    try:
        _entry_point(args[0])()
    except SystemExit as stopped:
        if stopped.code is None or isinstance(stopped.code, int):
            return stopped.code or 0
        print(stopped.code)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _entry_point(command: str) -> Callable[[], None]:
    """The function of a console script, or ``main`` of a module."""
    for script in importlib.metadata.entry_points(group="console_scripts", name=command):
        return script.load()
    return importlib.import_module(command).main


def _sample_fewer_voxels() -> None:
    """Stock fingerprints draw 10^8 voxels with replacement, 20 seconds for the smallest dataset."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    stock = DatasetFingerprintExtractor.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 1e5

    DatasetFingerprintExtractor.__init__ = initialise


def start(args: Sequence[str | Path], environment: Mapping[str, str]) -> Started:
    """Start a console script, or a module of ours, in a forked process."""
    words = tuple(str(argument) for argument in args)
    handle, name = tempfile.mkstemp(prefix="command_output_")
    os.close(handle)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = _call_entry_point(words, environment, Path(name))
            sys.stdout.flush()
            for child in multiprocessing.active_children():
                child.terminate()
        finally:
            os._exit(code)
    return Started(words, pid, Path(name))


def finish(started: Started, timeout: float) -> subprocess.CompletedProcess[str]:
    """Wait for a command and return its output."""
    deadline = time.monotonic() + timeout
    try:
        while (code := started.poll()) is None:
            if time.monotonic() > deadline:
                started.kill()
                pytest.fail(f"{started.args} not finished after {timeout:.0f} s\n{started.output.read_text()}")
            time.sleep(0.02)
        return subprocess.CompletedProcess(started.args, code, started.output.read_text(errors="replace"), "")
    finally:
        started.output.unlink(missing_ok=True)


@dataclass(frozen=True)
class World:
    """nnU-Net folders with planned members, and the way to run commands there."""

    raw: Path
    preprocessed: Path
    results: Path
    environment: dict[str, str]

    def start(self, *args: str | Path, settings: Mapping[str, Any] | None = None, **variables: str) -> Started:
        """Start a command; ``settings`` become nnUNetKD_settings."""
        inline = {} if settings is None else {"nnUNetKD_settings": json.dumps(settings)}
        return start(args, {**self.environment, **inline, **variables})

    def run(
        self,
        *args: str | Path,
        settings: Mapping[str, Any] | None = None,
        check: bool = True,
        timeout: float = 300,
        **variables: str,
    ) -> str:
        """Run a command to its end and return what it printed; ``check=False`` expects it to fail."""
        return self.finish(self.start(*args, settings=settings, **variables), check=check, timeout=timeout)

    def finish(self, started: Started, *, check: bool = True, timeout: float = 300) -> str:
        """Wait for a command that was started, and return what it printed."""
        result = finish(started, timeout)
        if (result.returncode == 0) != check:
            pytest.fail(f"{' '.join(result.args)} returned {result.returncode}\n{result.stdout}")
        return result.stdout

    def plan(self, *args: str | Path, check: bool = True) -> str:
        """Run nnUNetKD_plan_and_preprocess, whose stock planner needs a worker."""
        processes = ("-np", "1", "-npfp", "1")
        return self.run("nnUNetKD_plan_and_preprocess", *args, *processes, check=check, nnUNet_n_proc_DA="1")

    def train(
        self,
        dataset: int,
        trainer: str,
        *args: str,
        configuration: str = CONFIGURATION,
        fold: int | str = 0,
        settings: Mapping[str, Any] | None = None,
        check: bool = True,
        **variables: str,
    ) -> str:
        """Run nnUNetv2_train on the CPU with a trainer of ours, ``nnUNetTrainerKD`` left out."""
        return self.run(*self.train_command(dataset, trainer, *args, configuration=configuration, fold=fold),
                        settings=settings, check=check, **variables)  # fmt: skip

    def train_command(
        self, dataset: int, trainer: str, *args: str, configuration: str = CONFIGURATION, fold: int | str = 0
    ) -> list[str]:
        """The words of the training command."""
        command = ["nnUNetv2_train", str(dataset), configuration, str(fold)]
        return [*command, "-tr", f"nnUNetTrainerKD{trainer}", "-device", "cpu", *args]

    def model(self, dataset: str, trainer: str, plans: str = "nnUNetPlans", configuration: str = CONFIGURATION) -> Path:
        """The folder of a model."""
        return self.results / dataset / f"nnUNetTrainerKD{trainer}__{plans}__{configuration}"

    @property
    def teacher(self) -> Path:
        """The folder of the joint teacher of the three members."""
        return self.model("Dataset900_Joint", "Teacher", "nnUNetKDPlans")

    def copy(self, root: Path) -> World:
        """The same in folders of its own, for tests that break things."""
        folders = {}
        for name in ("raw", "preprocessed", "results"):
            folders[name] = Path(shutil.copytree(getattr(self, name), root / f"nnUNet_{name}"))
        paths = {f"nnUNet_{name}": str(folder) for name, folder in folders.items()}
        return replace(self, **folders, environment={**self.environment, **paths})


@pytest.fixture(scope="session")
def make_world(make_nnunet_dirs: Callable[[], Any]) -> Callable[[], World]:
    """Empty nnU-Net folders whose commands run without workers."""
    # what a command imports, so that every forked one finds it there
    import nnunetv2.experiment_planning.plan_and_preprocess_entrypoints
    import nnunetv2.run.run_training  # noqa: F401

    import nnunet_kd.planners.entrypoints
    import nnunet_kd.train
    import nnunet_kd.training.student
    import nnunet_kd.training.teacher  # noqa: F401

    def make() -> World:
        folders = make_nnunet_dirs()
        environment = {**folders.environment, "nnUNet_n_proc_DA": "0"}
        return World(folders.raw, folders.preprocessed, folders.results, environment)

    return make


@pytest.fixture(scope="session")
def write_side_files() -> Callable[[Path], None]:
    """Write ``classification.csv`` and ``boxes.json`` of a raw dataset.

    Two classes by turns (column "size"), findings ("dark", "bright"), groups of two cases ("patient"), and the box of
    each case's mask; the first case is not labelled.
    """

    def write(folder: Path) -> None:
        rows, boxes = [], {}
        for index, (case, mask) in enumerate(_masks(folder).items()):
            found = np.argwhere(mask)
            corners = [*found.min(0)[::-1].tolist(), *(found.max(0)[::-1] + 1).tolist()]
            boxes[case] = [{"label": "lesion", "box": corners}]
            size = ("small", "large")[index % 2] if index else ""
            rows.append([case, size, index % 2, (index + 1) % 2, f"patient{index // 2}"])
        with (folder / "classification.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["case", "size", "dark", "bright", "patient"], *rows])
        (folder / "boxes.json").write_text(json.dumps(boxes))

    return write


def _masks(folder: Path) -> dict[str, NDArray[np.bool_]]:
    files = sorted((folder / "labelsTr").iterdir())
    if files[0].suffix == ".png":
        return {file.stem: np.array(Image.open(file)) == 1 for file in files}
    masks = {file.name[:-7]: sitk.GetArrayFromImage(sitk.ReadImage(str(file))) == 1 for file in files}
    is_flat = all(len(mask) == 1 for mask in masks.values())
    return {case: mask[0] for case, mask in masks.items()} if is_flat else masks


@pytest.fixture(scope="session")
def planned(make_world: Callable[[], World], make_dataset: Callable[..., Path]) -> World:
    """Three members, planned and joined as 900: plain labels; two channels with regions; CT with an ignore label."""
    world = make_world()
    make_dataset(world.raw, 1, "Alpha", num_test_cases=1, shape=(16, 18, 20))
    make_dataset(
        world.raw,
        2,
        "Beta",
        num_test_cases=1,
        channels=("T1", "FLAIR"),
        labels={"background": 0, "whole": [1, 2], "core": 2},
        regions_class_order=[1, 2],
        shape=(18, 20, 16),
    )
    make_dataset(
        world.raw,
        3,
        "Gamma",
        channels=("CT",),
        labels={"background": 0, "lesion": 1, "cyst": 2, "ignore": 3},
        shape=(12, 24, 24),
        spacing=(2.0, 1.0, 1.0),
    )
    world.plan("-d", "1", "2", "3", "--joint", "900", "-c", "3d_fullres", "--width", "0.25")
    return world


@pytest.fixture(scope="session")
def trained(planned: World) -> World:
    """The joint teacher of the three members, trained for two epochs."""
    planned.train(900, "Teacher", "-p", "nnUNetKDPlans", settings=TEACHER_SETTINGS)
    return planned


@pytest.fixture
def copied(trained: World, tmp_path: Path) -> Iterator[World]:
    """A copy of the trained world that a test may break."""
    yield trained.copy(tmp_path)
    shutil.rmtree(tmp_path)
