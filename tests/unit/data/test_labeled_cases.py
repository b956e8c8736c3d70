"""Which training cases keep their labels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nnunet_kd.data import labeled_cases
from nnunet_kd.data.labeled_cases import draw
from nnunet_kd.errors import SettingsError
from nnunet_kd.settings import Labeled

CASES = [f"case_{index:03d}" for index in range(60)]


@pytest.mark.parametrize(("fraction", "expected"), [(0.05, 3), (0.1, 6), (0.199, 11), (0.001, 1), (1.0, 60), (0.7, 42)])
def test_a_share_is_rounded_down_and_at_least_one(fraction: float, expected: int) -> None:
    kept = draw(CASES, {}, Labeled(fraction))
    assert len(kept) == expected
    assert kept <= set(CASES)


def test_the_draw_depends_on_the_seed_and_not_on_the_order() -> None:
    first = draw(CASES, {}, Labeled(0.2, seed=1))
    assert draw(CASES[::-1], {}, Labeled(0.2, seed=1)) == first
    assert draw(CASES, {}, Labeled(0.2, seed=2)) != first
    counts = np.zeros(60)
    for seed in range(400):
        counts += [case in draw(CASES, {}, Labeled(0.2, seed=seed)) for case in CASES]
    assert counts.min() > 40  # 80 on average
    assert counts.max() < 120


def test_a_group_is_kept_whole() -> None:
    groups = {case: f"patient_{index // 4}" for index, case in enumerate(CASES[:40])}
    for seed in range(30):
        kept = draw(CASES, groups, Labeled(0.2, seed=seed))
        assert 12 <= len(kept) < 16
        for patient in range(10):
            own = set(CASES[4 * patient : 4 * patient + 4])
            assert own <= kept or not own & kept


def test_a_case_whose_name_is_that_of_a_group_is_not_in_it() -> None:
    assert len(draw(["a", "b", "c"], {"b": "a", "c": "a"}, Labeled(0.34, seed=0))) in (1, 2)
    sizes = {len(draw(["a", "b", "c"], {"b": "a", "c": "a"}, Labeled(0.34, seed=seed))) for seed in range(20)}
    assert sizes == {1, 2}


def test_regions_that_no_labelled_case_has_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2, "never": 3}
    member: Any = SimpleNamespace(name="Dataset001_A", dataset_json={"labels": labels})
    monkeypatch.setattr(labeled_cases, "foreground", lambda member: [(1, 2), 2, 3])
    monkeypatch.setattr(labeled_cases, "classes_of", lambda member, cases: set() if cases == ["a"] else {(1, 2), 2})
    with pytest.raises(SettingsError, match=r"has core, whole, so it could not be learned\. Raise 'fraction'"):
        labeled_cases._require_all_classes(member, ["a"], ["a", "b"], Labeled(0.1))
