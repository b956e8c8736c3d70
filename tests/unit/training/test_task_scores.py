"""The score that chooses checkpoint_best."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from nnunet_kd.training.task_scores import LatestScores
from nnunet_kd.training.task_trainer import TaskTrainer

NAN = float("nan")


def test_a_score_that_is_not_defined_keeps_its_last_value() -> None:
    latest = LatestScores()
    assert math.isnan(latest.joint())
    latest.update("A", {"Dice": 0.4, "AUROC": NAN})
    assert latest.joint() == pytest.approx(0.4)  # nothing is known of the other one yet
    latest.update("A", {"Dice": 0.2, "AUROC": 0.8})
    assert latest.joint() == pytest.approx((0.2 + 0.8) / 2)
    latest.update("A", {"Dice": 0.3, "AUROC": NAN})
    assert latest.joint() == pytest.approx((0.3 + 0.8) / 2)


def test_datasets_weigh_alike() -> None:
    latest = LatestScores({"A": {"Dice": 0.2, "AUROC": 0.8}})
    latest.update("B", {"AP": 0.1})
    latest.update("C", {"AUROC": NAN})
    assert latest.joint() == pytest.approx((0.5 + 0.1) / 2)
    assert LatestScores(latest.values).joint() == latest.joint()


def test_what_is_not_defined_is_logged_as_nan_and_is_not_in_the_average(tmp_path: Path) -> None:
    logger = MetaLogger(str(tmp_path), resume=False)
    trainer: Any = SimpleNamespace(logger=logger, print_to_log_file=lambda text: None, _best_ema=None)
    best = []
    for epoch, score in enumerate([NAN, NAN, 0.5, 0.9, 0.3]):
        trainer.current_epoch = epoch
        trainer.latest_scores = LatestScores({"A": {"AUROC": score}})
        TaskTrainer.log_joint_score(trainer)
        average = logger.get_value("ema_fg_dice", step=-1)
        if trainer._best_ema is None or average > trainer._best_ema:  # nnU-Net's rule
            trainer._best_ema = average
            best.append(epoch)
    assert logger.get_value("mean_fg_dice", step=None) == pytest.approx([NAN, NAN, 0.5, 0.9, 0.3], nan_ok=True)
    averages = [NAN, NAN, 0.5, 0.9 * 0.5 + 0.1 * 0.9, 0.9 * 0.54 + 0.1 * 0.3]
    assert logger.get_value("ema_fg_dice", step=None) == pytest.approx(averages, nan_ok=True)
    assert best == [0, 1, 2, 3]
