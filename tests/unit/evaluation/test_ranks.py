from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from nnunet_kd.evaluation.ranks import critical_difference, groups_alike, rank_methods

# AUC of four versions of C4.5 on 14 datasets: Demsar, JMLR 7 (2006), table 6
DEMSAR = pd.DataFrame(
    {
        "C4.5": [0.763, 0.599, 0.954, 0.628, 0.882, 0.936, 0.661, 0.583, 0.775, 1.000, 0.940, 0.619, 0.972, 0.957],
        "C4.5+m": [0.768, 0.591, 0.971, 0.661, 0.888, 0.931, 0.668, 0.583, 0.838, 1.000, 0.962, 0.666, 0.981, 0.978],
        "C4.5+cf": [0.771, 0.590, 0.968, 0.654, 0.886, 0.916, 0.609, 0.563, 0.866, 1.000, 0.965, 0.614, 0.9751, 0.946],
        "C4.5+m+cf": [0.798, 0.569, 0.967, 0.657, 0.898, 0.931, 0.685, 0.625, 0.875, 1.000, 0.962, 0.669, 0.975, 0.970],
    }
)


def test_average_ranks_and_critical_difference_of_demsar() -> None:
    ranking = rank_methods(DEMSAR)
    assert list(ranking.average) == ["C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"]
    assert ranking.average["C4.5"] == pytest.approx(3.143, abs=5e-4)
    assert ranking.average["C4.5+m"] == pytest.approx(2.000, abs=5e-4)
    assert ranking.average["C4.5+cf"] == pytest.approx(2.893, abs=5e-4)
    assert ranking.average["C4.5+m+cf"] == pytest.approx(1.964, abs=5e-4)
    assert ranking.num_datasets == 14
    # "the critical value for 4 classifiers is 2.569, so the critical difference is 1.25"; at 10% 2.291 and 1.12
    assert ranking.critical_difference == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 14)), abs=1e-3)
    assert critical_difference(4, 14, level=0.9) == pytest.approx(1.12, abs=0.005)
    # chi-square 9.28 with 3 degrees of freedom without correction for ties
    assert 0.015 < ranking.p_value < 0.027


@pytest.mark.parametrize(("num_methods", "q"), [(2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)])
def test_quantiles_of_demsars_table_5(num_methods: int, q: float) -> None:
    difference = critical_difference(num_methods, 100)
    assert difference / math.sqrt(num_methods * (num_methods + 1) / 600) == pytest.approx(q, abs=1e-3)


def test_distances_rank_the_other_way_and_incomplete_datasets_are_left_out() -> None:
    values = pd.DataFrame({"a": [1.0, 3.0, 9.0], "b": [2.0, 3.0, np.nan]})
    ranking = rank_methods(values, higher_is_better=False)
    assert ranking.average == {"a": 1.25, "b": 1.75}
    assert ranking.num_datasets == 2
    assert math.isnan(ranking.p_value)
    assert rank_methods(values).average == {"b": 1.25, "a": 1.75}


def test_one_dataset_has_ranks_but_no_difference() -> None:
    ranking = rank_methods(pd.DataFrame({"a": [0.5], "b": [0.6], "c": [0.1]}))
    assert list(ranking.average) == ["b", "a", "c"]
    assert math.isnan(ranking.critical_difference)


def test_groups_that_do_not_differ() -> None:
    average = {"d": 4.0, "a": 1.0, "c": 2.9, "b": 2.0}
    assert groups_alike(average, 1.5) == [["a", "b"], ["b", "c"], ["c", "d"]]
    assert groups_alike(average, 3.5) == [["a", "b", "c", "d"]]
    assert groups_alike(average, 0.5) == []
