"""nnUNetKD_add_unlabeled on datasets that stock nnU-Net planned and preprocessed."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

pytestmark = pytest.mark.integration

BETA, FLAT = "Dataset002_Beta", "Dataset004_Flat"
SHAPE = (18, 20, 16)
REGIONS: dict[str, Any] = {
    "channels": ("T1", "FLAIR"),
    "labels": {"background": 0, "whole": [1, 2], "core": 2},
    "regions_class_order": [1, 2],
}


def case_of(folder: Path, case: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """A preprocessed case as nnU-Net's data loader reads it."""
    image, segmentation, _, properties = infer_dataset_class(str(folder))(str(folder)).load_case(case)
    return image[:], segmentation[:], properties


def wait_for_the_end_of_group(group: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("a worker lives on after the command was killed")


@pytest.fixture(scope="module")
def stock(make_world: Callable[[], Any], make_dataset: Callable[..., Path]) -> Any:
    """A 3D dataset of two channels with regions and a 2D one, planned and preprocessed by stock nnU-Net."""
    world = make_world()
    make_dataset(world.raw, 2, "Beta", num_test_cases=6, shape=SHAPE, **REGIONS)
    make_dataset(world.raw, 4, "Flat", num_test_cases=1, dimension=2)
    command = ("nnUNetv2_plan_and_preprocess", "-np", "1", "-npfp", "1", "--no_pbar")
    world.run(*command, "-d", "2", "-c", "2d", "3d_fullres", nnUNet_n_proc_DA="1")
    world.run(*command, "-d", "4", "-c", "2d", nnUNet_n_proc_DA="1")
    return world


@pytest.fixture
def images(stock: Any, tmp_path: Path) -> Path:
    """A folder with the first training image of Beta, under another name."""
    folder = tmp_path / "images"
    folder.mkdir()
    for channel in range(2):
        shutil.copy(stock.raw / BETA / "imagesTr" / f"beta_000_000{channel}.nii.gz", folder / f"x_000{channel}.nii.gz")
    return folder


def test_an_added_image_equals_the_stock_case_that_had_a_label(stock: Any, images: Path, tmp_path: Path) -> None:
    world = stock.copy(tmp_path)
    assert "is a copy of" in world.run("nnUNetKD_add_unlabeled", "-d", "2", "-c", "2d", "-i", images, check=False)
    shutil.rmtree(world.raw / BETA)
    output = world.run("nnUNetKD_add_unlabeled", "-d", "2", "-c", "2d", "3d_fullres", "-i", images)
    assert "nnUNetv2_train 002 3d_fullres FOLD -tr nnUNetTrainerDINOMix -p nnUNetPlans" in output
    for configuration in ("2d", "3d_fullres"):
        base, data = world.preprocessed / BETA, f"nnUNetPlans_{configuration}"
        image, segmentation, properties = case_of(base / "nnunet_kd_unlabeled" / data, "x")
        stock_image, stock_segmentation, stock_properties = case_of(base / data, "beta_000")
        np.testing.assert_array_equal(image, stock_image)
        np.testing.assert_array_equal(segmentation, np.minimum(stock_segmentation, 0))
        assert properties["class_locations"] == {}
        assert properties["spacing"] == stock_properties["spacing"]
        assert f"{configuration}: added 1 cases without labels.\n  They lie in {base / 'nnunet_kd_unlabeled'}" in output


def test_a_killed_run_goes_on(stock: Any, tmp_path: Path) -> None:
    world = stock.copy(tmp_path)
    command = ("nnUNetKD_add_unlabeled", "-d", "2", "-c", "3d_fullres", "-np", "1", "--disable_progress_bar")
    command = (*command, "-i", str(world.raw / BETA / "imagesTs"))
    folder = world.preprocessed / BETA / "nnunet_kd_unlabeled" / "nnUNetPlans_3d_fullres"
    for number in (8, 9, 10):  # slow enough that the kill comes before the end
        for channel in range(2):
            file = str(world.raw / BETA / "imagesTs" / f"beta_{number:03d}_{channel:04d}.nii.gz")
            sitk.WriteImage(sitk.Expand(sitk.ReadImage(file), [6, 6, 6]), file)
    started = world.start(*command)
    while not list(folder.glob("*.pkl")):
        assert started.poll() is None, started.output.read_text()
        time.sleep(0.005)
    os.kill(started.pid, signal.SIGKILL)  # not its worker, which has to end by itself
    os.waitpid(started.pid, 0)
    wait_for_the_end_of_group(started.pid)
    finished = {file.stem: file.stat().st_mtime_ns for file in folder.glob("*.pkl")}
    assert 0 < len(finished) < 6
    output = world.run(*command)
    assert f"added {6 - len(finished)} cases without labels, skipped {len(finished)} that were there." in output
    cases = [f"beta_{number:03d}" for number in range(5, 11)]
    assert sorted(file.stem for file in folder.glob("*.pkl")) == cases
    assert {case: (folder / f"{case}.pkl").stat().st_mtime_ns for case in finished} == finished
    assert all(np.isfinite(case_of(folder, case)[0]).all() for case in cases)
    assert "added 0 cases without labels, skipped 6 that were there." in world.run(*command)


def test_2d_images_and_the_plans_of_a_dataset_that_was_planned_anew(stock: Any, tmp_path: Path) -> None:
    world = stock.copy(tmp_path)
    command = ("nnUNetKD_add_unlabeled", "-d", "4", "-c", "2d", "-i", world.raw / FLAT / "imagesTs")
    assert "2d: added 1 cases without labels." in world.run(*command)
    folder = world.preprocessed / FLAT / "nnunet_kd_unlabeled" / "nnUNetPlans_2d"
    image, _, properties = case_of(folder, "flat_005")
    assert image.shape == (1, 1, 36, 40)
    assert list(properties["spacing"]) == [999, 1, 1]
    plans = world.preprocessed / FLAT / "nnUNetPlans.json"
    plans.write_text(plans.read_text().replace("ZScoreNormalization", "NoNormalization"))
    output = world.run(*command, check=False)
    assert "ERROR: " in output
    assert "(normalization_schemes differ). Delete this folder" in output
    assert "Traceback" not in output


def test_the_command_in_fresh_processes(
    stock: Any, run_command: Callable[..., Any], tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    """With workers that are spawned; one image breaks off in a way that only reading it to the end tells."""
    world = stock.copy(tmp_path / "world")
    drawn = make_dataset(tmp_path, 2, "New", num_cases=2, shape=SHAPE, **REGIONS)
    broken = drawn / "imagesTr" / "new_001_0001.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-1000])
    command = ("nnUNetKD_add_unlabeled", "-d", "2", "-c", "3d_fullres", "-i", drawn / "imagesTr", "-np", "2")
    result = run_command(command, world.environment, check=False)
    assert result.returncode == 2
    assert "1 of 2 cases could not be preprocessed for 3d_fullres of Dataset002_Beta" in result.stderr
    assert "new_001 (new_001_0000.nii.gz, new_001_0001.nii.gz): EOFError" in result.stderr
    assert "Traceback" not in result.stderr
    broken.unlink()
    (drawn / "imagesTr" / "new_001_0000.nii.gz").unlink()
    result = run_command(command, world.environment)
    assert "added 0 cases without labels, skipped 1 that were there." in result.stdout
