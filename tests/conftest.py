"""Tiny synthetic nnU-Net datasets, folders of their own and a runner for the real commands.

Everything here is a fixture that returns a function or a small record, so that tests import nothing from each other:
``make_dataset`` writes a raw dataset, ``make_nnunet_dirs`` gives empty nnU-Net folders with the environment that goes
with them, ``run_command`` runs a console script in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Set before anything imports torch or nnU-Net, which read these once. The developer's own nnU-Net folders and settings
# are taken away, so that no test can write into them.
for _name in [name for name in os.environ if name.lower().startswith("nnunet")]:
    if not _name.startswith("NNUNET_KD_"):
        del os.environ[_name]
# One worker process, not none: nnU-Net's planner refuses nnUNet_n_proc_DA=0.
SMALL_MACHINE = {
    "nnUNet_n_proc_DA": "1",
    "nnUNet_def_n_proc": "1",
    "nnUNet_compile": "f",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}
os.environ.update(SMALL_MACHINE)

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from nnunet_kd.environment import add_trainers_folder

Labels = Mapping[str, int | Sequence[int]]


# --- datasets ---------------------------------------------------------------------------------------------------------
def _structure_values(labels: Labels) -> list[int]:
    """The label values that are drawn: all but the background and the ignore label."""
    values: set[int] = set()
    for name, value in labels.items():
        if name != "ignore":
            values.update([value] if isinstance(value, int) else value)
    return sorted(values - {0})


def _ellipsoid(shape: Sequence[int], center: np.ndarray, radii: np.ndarray) -> np.ndarray:
    grid = np.stack(np.meshgrid(*[np.arange(size) for size in shape], indexing="ij"), axis=-1)
    return (((grid - center) / radii) ** 2).sum(axis=-1) <= 1


def _draw_structures(
    random: np.random.Generator, shape: Sequence[int], values: Sequence[int], nested: bool
) -> np.ndarray:
    """One ellipsoid per label value: nested into each other (regions), or side by side along the longest axis."""
    size = np.array(shape, dtype=float)
    structures = np.zeros(shape, dtype=np.uint8)
    longest = int(size.argmax())
    shared_center = size / 2 + random.uniform(-0.08, 0.08, len(shape)) * size
    for position, value in enumerate(values):
        if nested:
            center, radii = shared_center, size * random.uniform(0.30, 0.36) * 0.65**position
        else:
            slot = size[longest] / len(values)
            center = size / 2 + random.uniform(-0.08, 0.08, len(shape)) * size
            center[longest] = (position + 0.5) * slot + random.uniform(-0.08, 0.08) * slot
            radii = size * random.uniform(0.24, 0.32, len(shape))
            radii[longest] = slot * random.uniform(0.30, 0.40)
        structures[_ellipsoid(shape, center, np.maximum(radii, 1.5))] = value
    return structures


def _ignored_voxels(random: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """A slab across one end of a random axis, about a quarter of the image: the part nobody annotated."""
    axis = int(random.integers(len(shape)))
    width = max(1, shape[axis] // 4)
    side = slice(0, width) if random.integers(2) else slice(shape[axis] - width, None)
    ignored = np.zeros(shape, dtype=bool)
    ignored[tuple(side if current == axis else slice(None) for current in range(len(shape)))] = True
    return ignored


def _default_contrast(dataset_id: int, values: Sequence[int], num_channels: int) -> dict[int, list[float]]:
    """Intensities in [0.15, 0.95] per label value and channel, far apart, in an order that the dataset decides."""
    random = np.random.default_rng(dataset_id)
    levels = np.linspace(0.15, 0.95, len(values) + 1)
    per_channel = [random.permutation(levels) for _ in range(num_channels)]
    return {value: [float(channel[row]) for channel in per_channel] for row, value in enumerate([0, *values])}


def _write_3d(array: np.ndarray, spacing: Sequence[float], path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(step) for step in reversed(spacing)])
    sitk.WriteImage(image, str(path))


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Path]:
    """Write a raw nnU-Net dataset; see the inner function for its arguments."""

    def make(
        raw_root: Path,
        dataset_id: int,
        name: str,
        *,
        num_cases: int = 5,
        num_test_cases: int = 0,
        channels: Sequence[str] = ("T1",),
        labels: Labels | None = None,
        regions_class_order: Sequence[int] | None = None,
        dimension: int = 3,
        shape: Sequence[int] | None = None,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        file_ending: str | None = None,
        contrast: Mapping[int, Sequence[float]] | None = None,
        noise: float = 0.05,
        seed: int = 0,
        extra: Mapping[str, object] | None = None,
    ) -> Path:
        """Write ``Dataset<id>_<name>`` and return its folder. The same arguments write the same voxels.

        Args:
            raw_root: The ``nnUNet_raw`` folder.
            dataset_id: The dataset's number; it also decides the default contrast.
            name: The dataset's name.
            num_cases: Training cases, ``<name in lower case>_000`` and on.
            num_test_cases: Cases in ``imagesTs`` with their truth in ``labelsTs``, numbered after the training cases.
            channels: One name per channel. A channel called CT is written in Hounsfield-like units, others in [0, 255].
            labels: As in dataset.json. Sequences are regions and are drawn nested; ``ignore`` marks a slab of voxels.
                Default: background 0, lesion 1.
            regions_class_order: As in dataset.json; needed with regions.
            dimension: 2 (``.png`` unless told otherwise) or 3 (``.nii.gz``).
            shape: Voxels per axis, in array order (z, y, x) or (y, x).
            spacing: Millimetres per voxel, in the same order; 3D only, 2D files carry none.
            file_ending: Anything that nnU-Net reads by its ending and SimpleITK (3D) or Pillow (2D) writes.
            contrast: Intensity in [0, 1] per label value and channel; default: far apart, different in every dataset.
            noise: Standard deviation of Gaussian noise, in the same unit.
            seed: Makes another draw of the same dataset.
            extra: Further keys of dataset.json, for example ``{"nnunet_kd": {...}}``.
        """
        labels = {"background": 0, "lesion": 1} if labels is None else labels
        shape = ((20, 24, 22) if dimension == 3 else (36, 40)) if shape is None else shape
        file_ending = (".nii.gz" if dimension == 3 else ".png") if file_ending is None else file_ending
        if len(shape) != dimension:
            msg = f"shape {tuple(shape)} does not have {dimension} axes"
            raise ValueError(msg)
        values = _structure_values(labels)
        nested = any(not isinstance(value, int) for value in labels.values())
        intensities = _default_contrast(dataset_id, values, len(channels)) if contrast is None else contrast

        folder = raw_root / f"Dataset{dataset_id:03d}_{name}"
        for case in range(num_cases + num_test_cases):
            random = np.random.default_rng([seed, dataset_id, zlib.crc32(name.encode()), case])
            split = "Tr" if case < num_cases else "Ts"
            identifier = f"{name.lower()}_{case:03d}"
            structures = _draw_structures(random, shape, values, nested)
            annotation = structures.copy()
            if "ignore" in labels and split == "Tr":
                annotation[_ignored_voxels(random, shape)] = labels["ignore"]
            files = {f"labels{split}/{identifier}{file_ending}": annotation}
            for index, channel in enumerate(channels):
                image = np.zeros(shape)
                for value in [0, *values]:
                    image[structures == value] = intensities[value][index]
                image += random.normal(0, noise, shape)
                if channel == "CT":
                    array = np.rint(image * 400 - 200).astype(np.int16)
                else:
                    array = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
                files[f"images{split}/{identifier}_{index:04d}{file_ending}"] = array
            for relative, array in files.items():
                path = folder / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                if dimension == 3:
                    _write_3d(array, spacing, path)
                else:
                    Image.fromarray(array).save(path)

        description: dict[str, object] = {
            "channel_names": {str(index): channel for index, channel in enumerate(channels)},
            "labels": {key: value if isinstance(value, int) else list(value) for key, value in labels.items()},
            "numTraining": num_cases,
            "file_ending": file_ending,
        }
        if regions_class_order is not None:
            description["regions_class_order"] = list(regions_class_order)
        description.update(extra or {})
        (folder / "dataset.json").write_text(json.dumps(description, indent=2))
        return folder

    return make


# --- folders ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class NnUNetDirs:
    """Empty nnU-Net folders, and the environment variables that make nnU-Net use them on a small machine."""

    raw: Path
    preprocessed: Path
    results: Path
    environment: dict[str, str]


@pytest.fixture(scope="session")
def make_nnunet_dirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], NnUNetDirs]:
    """Make fresh nnU-Net folders, as often as called."""

    def make() -> NnUNetDirs:
        root = tmp_path_factory.mktemp("nnunet")
        folders = {name: root / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for folder in folders.values():
            folder.mkdir()
        environment = {
            **{name: str(folder) for name, folder in folders.items()},
            "nnUNet_extTrainer": add_trainers_folder(""),
            **SMALL_MACHINE,
        }
        return NnUNetDirs(*folders.values(), environment)

    return make


# --- commands ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def run_command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a console script of this interpreter's environment; see the inner function for its arguments."""
    neutral_folder = tmp_path_factory.mktemp("working_folder")

    def run(
        args: Sequence[str | Path],
        env: Mapping[str, str],
        timeout: float = 600.0,
        check: bool = True,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``args`` to the end and return its output as text.

        Args:
            args: The command and its arguments. A bare name is looked up beside the interpreter that runs the tests.
            env: Variables added to the present environment.
            timeout: Seconds until the command and all its children are killed and the test fails.
            check: Fail the test, showing all output, when the command does not return 0.
            cwd: The working folder; default a folder outside the checkout.
        """
        command = [str(argument) for argument in args]
        executable = shutil.which(command[0], path=str(Path(sys.executable).parent))
        command[0] = executable or command[0]
        process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            cwd=cwd or neutral_folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # its workers too must end on a time-out: they hold the pipes open
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException as stopped:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            if isinstance(stopped, subprocess.TimeoutExpired):
                pytest.fail(f"{_shown(command, stdout, stderr)}\nnot finished after {timeout:.0f} s")
            raise
        if check and process.returncode != 0:
            pytest.fail(f"{_shown(command, stdout, stderr)}\nreturned {process.returncode}")
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    return run


def _shown(command: Sequence[str], stdout: str, stderr: str) -> str:
    return f"{' '.join(command)}\n--- stdout\n{stdout}\n--- stderr\n{stderr}"
