"""Paired statistics against closed forms, enumeration of all sign patterns, and known properties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from nnunet_kd.evaluation import statistics
from nnunet_kd.evaluation.statistics import bootstrap_interval, compare_paired, holm


def all_sign_patterns(differences: list[float]) -> float:
    """Two-sided p of the signed-rank test by listing all 2^n signs of the non-zero differences."""
    nonzero = [difference for difference in differences if difference != 0]
    ranks = stats.rankdata(np.abs(nonzero))
    observed = ranks @ (np.array(nonzero) > 0)
    sums = [ranks @ np.array(signs) for signs in itertools.product((0, 1), repeat=len(ranks))]
    lower = np.mean([value <= observed + 1e-9 for value in sums])
    upper = np.mean([value >= observed - 1e-9 for value in sums])
    return min(1.0, 2 * min(lower, upper))


class TestWilcoxon:
    def test_all_wins_is_the_smallest_p(self) -> None:
        differences = np.array([0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07])
        comparison = compare_paired(0.5 + differences, np.full(7, 0.5))
        assert comparison.p_value == pytest.approx(2 / 2**7)
        assert (comparison.wins, comparison.losses, comparison.ties) == (7, 0, 0)
        assert comparison.reason == ""

    @pytest.mark.parametrize(
        "differences",
        [
            [0.3, -0.1, 0.2, 0.5, -0.4, 0.6, 0.7],
            [0.1, 0.1, -0.1, 0.2, 0.2, 0.3, -0.4, 0.5],
            [0.0, 0.0, 0.1, 0.2, -0.3, 0.4, 0.5, 0.6],
        ],
        ids=["distinct", "ties", "zeros"],
    )
    def test_equals_enumeration(self, differences: list[float]) -> None:
        control = np.linspace(0.2, 0.9, len(differences))
        assert compare_paired(control + differences, control).p_value == pytest.approx(all_sign_patterns(differences))

    def test_is_symmetric_in_the_two_methods(self) -> None:
        random = np.random.default_rng(0)
        first, second = random.random((2, 30))
        forward, backward = compare_paired(first, second), compare_paired(second, first)
        assert forward.p_value == pytest.approx(backward.p_value)
        assert forward.difference.value == pytest.approx(-backward.difference.value)
        assert (forward.wins, forward.losses) == (backward.losses, backward.wins)

    def test_fewer_than_six_pairs_have_no_p(self) -> None:
        comparison = compare_paired([0.9] * 5, [0.1] * 5)
        assert math.isnan(comparison.p_value)
        assert "5 pairs" in comparison.reason

    def test_equal_values_give_one(self) -> None:
        values = np.linspace(0, 1, 8)
        comparison = compare_paired(values, values)
        assert comparison.p_value == 1.0
        assert "zero" in comparison.reason
        assert comparison.ties == 8

    def test_rounding_errors_are_ties(self) -> None:
        comparison = compare_paired([0.1 + 0.2] * 6, [0.3] * 6)
        assert (comparison.wins, comparison.ties) == (0, 6)

    def test_many_pairs_with_ties(self) -> None:
        random = np.random.default_rng(1)
        control = random.integers(0, 5, 200) / 5
        comparison = compare_paired(np.clip(control + random.integers(0, 2, 200) / 5, 0, 1), control)
        assert comparison.p_value < 1e-10


class TestComparison:
    def test_pairs_with_a_missing_value_are_left_out(self) -> None:
        nan = float("nan")
        comparison = compare_paired([0.5, nan, 0.7, 0.9], [0.4, 0.3, nan, 1.0])
        assert comparison.num_pairs == 2
        assert comparison.difference.value == pytest.approx((0.1 - 0.1) / 2)

    def test_lower_is_better_swaps_wins_only(self) -> None:
        comparison = compare_paired([3.0, 5.0, 4.0], [4.0, 4.0, 5.0], higher_is_better=False)
        assert (comparison.wins, comparison.losses) == (2, 1)
        assert comparison.difference.value == pytest.approx(-1 / 3)

    def test_no_common_case(self) -> None:
        comparison = compare_paired([], [])
        assert comparison.num_pairs == 0
        assert math.isnan(comparison.difference.value)

    def test_different_numbers_of_cases_are_refused(self) -> None:
        with pytest.raises(ValueError, match="one value per case"):
            compare_paired([0.1, 0.2], [0.1])


class TestBootstrap:
    def test_two_cases_by_hand(self) -> None:
        # the mean of a resample is 0, 0.5 or 1 with p = 1/4, 1/2, 1/4: the 2.5% and 97.5% quantiles are 0 and 1
        interval = bootstrap_interval([0.0, 1.0])
        assert (interval.value, interval.low, interval.high) == (0.5, 0.0, 1.0)
        # and the 30% and 70% quantiles are the middle value
        inner = bootstrap_interval([0.0, 1.0], level=0.4)
        assert (inner.low, inner.high) == (0.5, 0.5)

    def test_three_cases_equal_full_enumeration(self) -> None:
        values = [0.2, 0.5, 0.9]
        means = [np.mean(sample) for sample in itertools.product(values, repeat=3)]
        # p(mean <= 0.2) = 1/27 > 2.5% and p(mean >= 0.9) = 1/27 > 2.5%
        interval = bootstrap_interval(values, num_resamples=50_000)
        assert interval.low == pytest.approx(min(means))
        assert interval.high == pytest.approx(max(means))

    def test_close_to_the_normal_interval_for_many_cases(self) -> None:
        values = np.random.default_rng(5).normal(0.8, 0.1, 400)
        standard_error = values.std() / math.sqrt(400)
        interval = bootstrap_interval(values)
        assert interval.low == pytest.approx(values.mean() - 1.96 * standard_error, abs=0.1 * standard_error)
        assert interval.high == pytest.approx(values.mean() + 1.96 * standard_error, abs=0.1 * standard_error)

    def test_same_seed_same_interval(self) -> None:
        values = np.random.default_rng(2).random(17)
        assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
        assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)

    def test_blocks_do_not_change_the_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = np.random.default_rng(2).random(9)
        whole = bootstrap_interval(values, num_resamples=1000)
        monkeypatch.setattr(statistics, "BLOCK", 100)
        assert bootstrap_interval(values, num_resamples=1000) == whole

    def test_missing_values_and_few_cases(self) -> None:
        nan = float("nan")
        assert bootstrap_interval([0.3, nan, 0.7]) == bootstrap_interval([0.3, 0.7])
        single = bootstrap_interval([nan, 0.7])
        assert single.value == 0.7
        assert math.isnan(single.low)
        assert math.isnan(single.high)
        assert math.isnan(bootstrap_interval([]).value)

    @pytest.mark.parametrize("arguments", [{"level": 1.0}, {"level": 0.0}, {"num_resamples": 0}])
    def test_arguments_out_of_range_are_refused(self, arguments: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="level must lie"):
            bootstrap_interval([0.1, 0.2], **arguments)


class TestHolm:
    def test_textbook_example(self) -> None:
        # sorted 0.005 0.01 0.03 0.04 times 4 3 2 1 = 0.02 0.03 0.06 0.04, made monotone
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_never_above_one(self) -> None:
        assert holm([0.9, 0.8, 0.7]) == pytest.approx([1.0, 1.0, 1.0])

    def test_missing_values_do_not_count_as_tests(self) -> None:
        adjusted = holm([0.02, float("nan"), 0.01])
        assert adjusted[0] == pytest.approx(0.02)
        assert math.isnan(adjusted[1])
        assert adjusted[2] == pytest.approx(0.02)

    def test_nothing_to_adjust(self) -> None:
        assert holm([]) == []
