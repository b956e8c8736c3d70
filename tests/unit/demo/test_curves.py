"""Learning curves from training logs as nnU-Net 2.8 writes them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from nnunet_kd.demo.curves import parse_log, read_curve

STUDENT_LOG = """
nnunet_kd settings: {'joint': 'Dataset970_Joint', 'training': {'num_epochs': 2}}
2026-01-01 11:54:45.912784: Epoch 0
2026-01-01 11:54:45.912930: Current learning rate: 0.01
2026-01-01 11:54:50.141951: train_loss 2.6813
2026-01-01 11:54:50.142214: Pseudo dice [np.float32(0.75), np.float32(0.25)]
2026-01-01 11:54:50.142279: Epoch time: 4.23 s
2026-01-01 11:54:50.142323: Yayy! New best EMA pseudo Dice: 0.3840000033378601
2026-01-01 11:54:51.172442: Epoch 1
2026-01-01 11:54:54.401688: Pseudo dice [np.float32(0.5), np.float32(nan)]
2026-01-01 11:54:54.401746: Epoch time: 3.23 s
"""
TEACHER_LOG = """
2026-01-01 11:54:45.912784: Epoch 0
2026-01-01 11:54:50.142214: Pseudo dice per member: Dataset971_CT 0.3914 (46 steps); Dataset972_T1 nan (2 steps)
2026-01-01 11:54:50.142215: Pseudo dice [np.float32(0.75), np.float32(0.25), np.float32(nan)]
2026-01-01 11:54:51.172442: Epoch 1
2026-01-01 11:54:54.142214: Pseudo dice per member: Dataset971_CT 0.5 (92 steps); Dataset972_T1 1.0 (4 steps)
"""


def test_mean_over_classes_per_epoch() -> None:
    assert parse_log(STUDENT_LOG) == {0: 0.5, 1: 0.5}


def test_older_numbers_without_type() -> None:
    assert parse_log("x: Epoch 3\nx: Pseudo dice [0.25, 0.75, nan]\n") == {3: 0.5}


def test_all_classes_absent() -> None:
    assert np.isnan(parse_log("x: Epoch 0\nx: Pseudo dice [np.float32(nan)]\n")[0])


def test_member_of_a_teacher() -> None:
    assert parse_log(TEACHER_LOG, "Dataset971_CT") == {0: 0.3914, 1: 0.5}
    assert parse_log(TEACHER_LOG, "Dataset972_T1") == pytest.approx({0: float("nan"), 1: 1.0}, nan_ok=True)
    assert np.isnan(parse_log(TEACHER_LOG, "Dataset999_Other")[0])


def test_resumed_training_overwrites_the_epochs_that_ran_again(tmp_path: Path) -> None:
    first, second = tmp_path / "training_log_2026_9_1.txt", tmp_path / "training_log_2026_10_1.txt"
    first.write_text("".join(f"x: Epoch {epoch}\nx: Pseudo dice [0.1]\n" for epoch in range(3)))
    second.write_text("".join(f"x: Epoch {epoch}\nx: Pseudo dice [0.9]\n" for epoch in range(2, 5)))
    os.utime(first, (1, 1))
    assert read_curve(tmp_path).tolist() == [0.1, 0.1, 0.9, 0.9, 0.9]


def test_no_log(tmp_path: Path) -> None:
    assert read_curve(tmp_path).size == 0
