"""Average ranks of methods over datasets, and the critical difference between them.

Source: Demsar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7 (2006), sections 3.2.2 to 3.2.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from scipy import stats


@dataclass(frozen=True)
class Ranking:
    """Methods by average rank, 1 is the best.

    Attributes:
        average: Method to average rank over the datasets, best first.
        num_datasets: Number of datasets in which all methods have a value.
        critical_difference: Average ranks that differ by at least this differ significantly (Nemenyi); NaN with fewer
            than two datasets or methods.
        p_value: Of Friedman's test that all methods are alike; NaN with fewer than three methods or two datasets.
    """

    average: dict[str, float]
    num_datasets: int
    critical_difference: float
    p_value: float


def rank_methods(values: pd.DataFrame, *, higher_is_better: bool = True, level: float = 0.95) -> Ranking:
    """Rank the methods within every dataset and average; ties share their mean rank.

    Args:
        values: One value per dataset (rows) and method (columns). Datasets that lack a method are left out.
        higher_is_better: False for distances and errors.
        level: One minus the significance level of the critical difference.
    """
    complete = values.dropna()
    ranks = complete.rank(axis=1, ascending=not higher_is_better)
    average = ranks.mean().sort_values(kind="stable")
    num_datasets, num_methods = complete.shape
    p_value = math.nan
    if num_methods > 2 and num_datasets > 1 and (ranks.nunique(axis=1) > 1).any():
        p_value = float(stats.friedmanchisquare(*complete.to_numpy().T).pvalue)
    return Ranking(
        {str(method): float(rank) for method, rank in average.items()} if num_datasets else {},
        num_datasets,
        critical_difference(num_methods, num_datasets, level=level),
        p_value,
    )


def critical_difference(num_methods: int, num_datasets: int, *, level: float = 0.95) -> float:
    """Nemenyi's critical difference of average ranks, q sqrt(k (k + 1) / 6 N).

    q is the quantile of the studentized range for k groups and infinite degrees of freedom, divided by sqrt(2).

    Args:
        num_methods: k.
        num_datasets: N.
        level: One minus the significance level.

    Returns:
        The difference, NaN with fewer than two methods or datasets.
    """
    if num_methods < 2 or num_datasets < 2:
        return math.nan
    q = float(stats.studentized_range.ppf(level, num_methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(num_methods * (num_methods + 1) / (6 * num_datasets))


def groups_alike(average: dict[str, float], difference: float) -> list[list[str]]:
    """Largest groups of two or more methods whose average ranks differ by less than ``difference``, best first."""
    names = sorted(average, key=lambda name: average[name])
    groups: list[list[str]] = []
    for start, first in enumerate(names):
        group = [name for name in names[start:] if average[name] - average[first] < difference]
        if len(group) > 1 and not (groups and set(group) <= set(groups[-1])):
            groups.append(group)
    return groups
