"""The score that chooses checkpoint_best."""

from __future__ import annotations

import math

import pytest

from nnunet_kd.training.task_scores import LatestScores

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
