"""A recipe through the real commands: plan, run, run again, collect."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.integration

RECIPE = """\
name: tiny
datasets:
  alpha: {id: 1, name: Alpha, tests: {held_out: {images: imagesTs, labels: labelsTs}}}
configurations: [2d]
folds: [0]
seeds: [5]
budget: {num_epochs: 1, num_iterations_per_epoch: 1, num_val_iterations_per_epoch: 1}
methods:
  control: {trainer: nnUNetTrainerKDControl}
control: control
metrics: [dice, hd95]
"""


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * float((first & second).sum()) / float(first.sum() + second.sum())


def mask(file: Path) -> np.ndarray:
    return np.array(Image.open(file)) == 1


def test_plan_run_and_collect(make_world: Callable[[], Any], make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    world = make_world()
    raw = make_dataset(world.raw, 1, "Alpha", dimension=2, num_test_cases=1, shape=(24, 26))
    # in a process of its own the fingerprint alone would take 20 seconds
    world.plan("-d", "1", "-c", "2d")
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)

    def leaderboard(command: str, *more: str, check: bool = True) -> str:
        return world.run("nnUNetKD_leaderboard", command, recipe, "-o", out, *more, check=check)

    plan = leaderboard("plan", "-device", "cpu")
    jobs = [line for line in plan.splitlines() if line.startswith("# ")]
    assert jobs == [
        "# 1 plan_Dataset001_Alpha",
        "# 2 train_alpha_control_2d_f0_s5, after 1",
        "# 3 predict_held_out_with_alpha_control_2d_f0_s5, after 2",
    ]
    assert not out.exists()

    first = leaderboard("run", "-device", "cpu")
    assert "3/3 predict_held_out_with_alpha_control_2d_f0_s5" in first
    fold = out / "results/alpha/control/seed_5/Dataset001_Alpha/nnUNetTrainerKDControl__nnUNetPlans__2d/fold_0"
    checkpoint = fold / "checkpoint_final.pth"
    written = checkpoint.stat().st_mtime_ns
    assert json.loads((fold / "nnunet_kd_settings.json").read_text())["training"]["seed"] == 5

    start = time.monotonic()
    again = leaderboard("run", "-device", "cpu")
    assert "3 of 3 jobs are finished." in again
    assert "start" not in again
    assert time.monotonic() - start < 5
    assert checkpoint.stat().st_mtime_ns == written

    record = json.loads((fold / "leaderboard.json").read_text())
    costs = record["costs"]
    weights = torch.load(checkpoint, weights_only=False)["network_weights"]
    # a checkpoint also holds what is unused in prediction under second names
    unique = {value.untyped_storage().data_ptr(): value.numel() for value in weights.values()}
    assert costs["networks"]["alpha"]["parameters"] == sum(unique.values())
    assert costs["networks"]["alpha"]["gflops"] > 0
    assert costs["device"] == "cpu"
    assert 0 < costs["train_seconds"] < record["wall_seconds"]
    assert costs["num_steps"] == 1
    assert costs["inference_seconds"] > 0
    assert record["peak_memory_gb"] > 0.05

    table = leaderboard("collect")
    assert "problems" not in table
    with (out / "table/runs.csv").open() as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file) if row["metric"] == "dice"}
    values = {dataset: float(row["value"]) for dataset, row in rows.items()}
    split = json.loads((world.preprocessed / "Dataset001_Alpha/splits_final.json").read_text())[0]
    assert costs["training_cases"] == {"Dataset001_Alpha": sorted(split["train"])}
    assert rows["alpha"]["leakage"] == "none"
    assert rows["alpha, tested on held_out"]["leakage"] == "not compared"
    summary = json.loads((fold / "validation/summary.json").read_text())
    assert values["alpha"] == pytest.approx(summary["foreground_mean"]["Dice"])
    (test,) = (raw / "labelsTs").iterdir()
    assert values["alpha, tested on held_out"] == pytest.approx(
        dice(mask(test), mask(fold / "test_held_out" / test.name)), abs=1e-12
    )
    assert (out / "table/index.html").is_file()

    (fold / "leaderboard.json").unlink()  # as if the printed command had been typed by hand
    assert "problems" not in leaderboard("collect")
    assert json.loads((fold / "leaderboard.json").read_text())["by_hand"]

    changed = recipe.read_text().replace("num_epochs: 1", "num_epochs: 2")
    recipe.write_text(changed)
    refused = leaderboard("run", "-device", "cpu", check=False)
    assert "settings.training.num_epochs was 1, is 2" in refused
    assert checkpoint.stat().st_mtime_ns == written
    recipe.write_text(changed.replace("trainer:", "trainr:"))
    assert "line 9: Unknown key 'methods.control.trainr'" in leaderboard("plan", check=False)
