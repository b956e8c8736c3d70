"""Are two methods different? Paired comparisons over cases, bootstrap intervals, and Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

# With 5 pairs the smallest possible two-sided p of the signed-rank test is 2 / 2^5 = 0.0625: it can never say anything.
MIN_PAIRS = 6
# Differences smaller than this are rounding errors of equal values.
RESOLUTION = 5e-13
# Resamples are drawn in blocks of about this many numbers, which bounds the memory.
BLOCK = 2_000_000
# How often each case is drawn is kept for tables with up to this many numbers (40 MB).
MAX_COUNTS = 10_000_000


@dataclass(frozen=True)
class Interval:
    """A value with the interval around it; ``low`` and ``high`` are NaN where there are fewer than two cases."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedComparison:
    """One method against another on the same cases.

    ``difference`` is the mean of method minus control. ``wins`` counts the cases in which the method is better.
    ``p_value`` is the two-sided Wilcoxon signed-rank test; where it is NaN or trivial, ``reason`` says why, else it is
    empty.
    """

    num_pairs: int
    difference: Interval
    p_value: float
    reason: str
    wins: int
    losses: int
    ties: int


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean and percentile bootstrap interval of the mean, resampling cases.

    Args:
        values: One value per case; NaN (nothing to measure in this case) is left out.
        level: Coverage, in (0, 1).
        num_resamples: Number of bootstrap samples.
        seed: The same seed gives the same interval.

    Raises:
        ValueError: ``level`` or ``num_resamples`` is out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    if not 0 < level < 1 or num_resamples < 1:
        msg = f"level must lie in (0, 1) and num_resamples be positive, got {level} and {num_resamples}"
        raise ValueError(msg)
    present = _present(values)
    if present.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    mean = float(present.mean())
    if present.size == 1:
        return Interval(mean, float("nan"), float("nan"))
    means = _bootstrap_means(present, num_resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def compare_paired(
    method: ArrayLike,
    control: ArrayLike,
    *,
    higher_is_better: bool = True,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> PairedComparison:
    """Compare two methods on the same cases.

    Args:
        method: One value per case.
        control: One value per case, in the same order. Pairs in which either value is NaN are left out.
        higher_is_better: False for distances and errors; decides wins and losses, not the sign of the difference.
        level: Coverage of the interval of the mean difference.
        num_resamples: Number of bootstrap samples of the pairs.
        seed: The same seed gives the same interval.

    Raises:
        ValueError: The two have different numbers of cases.
    """
    first, second = np.asarray(method, dtype=float), np.asarray(control, dtype=float)
    if first.shape != second.shape or first.ndim != 1:
        msg = f"method and control must hold one value per case each, got shapes {first.shape} and {second.shape}"
        raise ValueError(msg)
    differences = _present(first - second)
    differences[np.abs(differences) < RESOLUTION] = 0.0
    p_value, reason = _wilcoxon(differences)
    better, worse = int(np.sum(differences > 0)), int(np.sum(differences < 0))
    if not higher_is_better:
        better, worse = worse, better
    return PairedComparison(
        num_pairs=differences.size,
        difference=bootstrap_interval(differences, level=level, num_resamples=num_resamples, seed=seed),
        p_value=p_value,
        reason=reason,
        wins=better,
        losses=worse,
        ties=int(np.sum(differences == 0)),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for testing several hypotheses at once; NaN stays NaN and does not count as a test.

    Source: Holm, Scandinavian Journal of Statistics 1979.
    """
    given = np.asarray(p_values, dtype=float)
    tested = np.flatnonzero(~np.isnan(given))
    order = tested[np.argsort(given[tested], kind="stable")]
    adjusted = np.full(given.shape, np.nan)
    factors = np.arange(order.size, 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(given[order] * factors))
    return [float(value) for value in adjusted]


def _present(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=float).ravel()
    return array[~np.isnan(array)]


def _bootstrap_means(values: NDArray[np.float64], num_resamples: int, seed: int) -> NDArray[np.float64]:
    if values.size * num_resamples <= MAX_COUNTS:
        # deviations, so that single precision is enough
        mean = values.mean()
        deviations = _draw_counts(values.size, num_resamples, seed) @ (values - mean).astype(np.float32)
        return mean + deviations.astype(np.float64) / values.size
    random = np.random.default_rng(seed)
    rows = max(1, BLOCK // values.size)
    means = []
    for start in range(0, num_resamples, rows):
        indices = random.integers(0, values.size, (min(rows, num_resamples - start), values.size))
        means.append(values[indices].mean(axis=1))
    return np.concatenate(means)


@lru_cache(maxsize=4)
def _draw_counts(num_cases: int, num_resamples: int, seed: int) -> NDArray[np.float32]:
    """How often each resample draws each case, [resamples, cases]: a table asks for the same ones in every line."""
    indices = np.random.default_rng(seed).integers(0, num_cases, (num_resamples, num_cases))
    flat = indices + num_cases * np.arange(num_resamples)[:, None]
    counts = np.bincount(flat.ravel(), minlength=num_resamples * num_cases)
    return counts.reshape(num_resamples, num_cases).astype(np.float32)


def _wilcoxon(differences: NDArray[np.float64]) -> tuple[float, str]:
    if differences.size < MIN_PAIRS:
        return float("nan"), f"{differences.size} pairs, at least {MIN_PAIRS} are needed"
    if not differences.any():
        return 1.0, "all differences are zero"
    # Rounding makes equal differences equal, so that they share a rank. Zero differences are dropped (Wilcoxon's own
    # treatment). scipy then chooses: exact without ties up to 50 pairs, all permutations of the signs with ties up to
    # 13 pairs, else the normal approximation corrected for ties.
    rounded = np.round(differences, 12)
    return float(stats.wilcoxon(rounded[rounded != 0], method="auto").pvalue), ""
