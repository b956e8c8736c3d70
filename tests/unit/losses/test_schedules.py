"""The ramps of a term's weight."""

from __future__ import annotations

import pytest

from nnunet_kd.errors import SettingsError
from nnunet_kd.losses.schedules import SCHEDULES, schedule_weight


@pytest.mark.parametrize(
    ("kind", "progress", "options", "expected"),
    [
        ("constant", 0.0, {}, 1.0),
        ("constant", 1.0, {}, 1.0),
        ("linear", 0.0, {}, 0.0),
        ("linear", 0.05, {}, 0.5),
        ("linear", 0.1, {}, 1.0),
        ("linear", 0.9, {}, 1.0),
        ("linear", 0.1, {"warmup": 0.4}, 0.25),
        ("linear", 0.2, {"warmup": 0.5, "start": 0.1}, 0.25),
        ("linear", 0.0, {"warmup": 0.0}, 1.0),
        ("cosine", 0.1, {"warmup": 0.6, "start": 0.2}, 0.0),
        ("cosine", 0.2, {"warmup": 0.6, "start": 0.2}, 0.0),
        ("cosine", 0.3, {"warmup": 0.6, "start": 0.2}, 0.1464466094),
        ("cosine", 0.4, {"warmup": 0.6, "start": 0.2}, 0.5),
        ("cosine", 0.6, {"warmup": 0.6, "start": 0.2}, 1.0),
        ("cosine", 0.3, {"warmup": 0.3, "start": 0.3}, 1.0),
        ("cosine", 0.2, {"warmup": 0.3, "start": 0.3}, 0.0),
    ],
)
def test_values(kind: str, progress: float, options: dict[str, float], expected: float) -> None:
    assert schedule_weight(kind, progress, **options) == pytest.approx(expected)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_never_falls_and_ends_at_one(kind: str) -> None:
    values = [schedule_weight(kind, step / 100, warmup=0.5, start=0.2) for step in range(101)]
    assert values == sorted(values)
    assert values[-1] == 1.0


def test_unknown_kind() -> None:
    with pytest.raises(SettingsError, match=r"'exponential'.*constant, linear, cosine"):
        schedule_weight("exponential", 0.5)
