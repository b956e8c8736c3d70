"""Drawing cases such that classes, and groups within them, are balanced."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_kd.data.class_sampling import case_probabilities

NAN = float("nan")


def as_labels(rows: dict[str, list[float]]) -> dict[str, np.ndarray]:
    return {case: np.array(row, dtype=np.float32) for case, row in rows.items()}


def test_classes_then_groups_then_cases_by_hand() -> None:
    labels = as_labels({"a": [1, 0], "b": [1, 0], "c": [1, 0], "d": [0, 1], "e": [0, 1]})
    groups = {"a": "p1", "b": "p1", "c": "p2", "d": "p3", "e": "p4"}
    got = case_probabilities(list("abcde"), labels, False, groups)
    assert got.tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 4])
    without_groups = case_probabilities(list("abcde"), labels, False)
    assert without_groups.tolist() == pytest.approx([1 / 6] * 3 + [1 / 4] * 2)


def test_unlabelled_cases_are_drawn_as_often_as_the_mean_case() -> None:
    labels = as_labels({"a": [1, 0], "b": [1, 0], "c": [0, 1], "d": [NAN, NAN]})
    got = case_probabilities(list("abcde"), labels, False)  # d is empty in the file, e is not in it
    assert got.tolist() == pytest.approx([3 / 20, 3 / 20, 3 / 10, 1 / 5, 1 / 5])
    assert case_probabilities(["d", "e"], labels, False).tolist() == [0.5, 0.5]


def test_the_rarest_finding_decides() -> None:
    labels = as_labels(
        {"a": [1, 1, 0], "b": [0, 1, 1], "c": [1, 0, NAN], "d": [0, 1, 0], "e": [0, 0, 0], "f": [0, NAN, 0]}
    )
    # finding 0: a c; 1: a b d; 2: b. So a and c -> 0, d -> 1, b -> 2, and e and f have none.
    got = case_probabilities(list("abcdef"), labels, True)
    assert got.tolist() == pytest.approx([1 / 8, 1 / 4, 1 / 8, 1 / 4, 1 / 8, 1 / 8])


def test_only_the_asked_cases_count() -> None:
    labels = as_labels({"a": [1, 0], "b": [0, 1], **{f"other{i}": [0, 1] for i in range(9)}})
    assert case_probabilities(["b", "a"], labels, False).tolist() == [0.5, 0.5]
    assert case_probabilities(["b", "other1"], labels, False).tolist() == [0.5, 0.5]  # a fold with one class


def test_a_case_without_a_group_is_not_one_with_the_group_of_its_name() -> None:
    labels = as_labels({"a": [1, 0], "b": [1, 0], "c": [1, 0]})
    got = case_probabilities(list("abc"), labels, False, {"b": "a", "c": "a"})
    assert got.tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 4])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=25))
def test_every_class_and_every_group_within_it_is_equally_probable(cases: list[tuple[int, int]]) -> None:
    identifiers = [f"case{number}" for number in range(len(cases))]
    labels = {case: np.eye(4, dtype=np.float32)[row[0]] for case, row in zip(identifiers, cases, strict=True)}
    groups = {case: str(row[1]) for case, row in zip(identifiers, cases, strict=True)}
    got = case_probabilities(identifiers, labels, False, groups)
    assert got.sum() == pytest.approx(1)
    per_group: dict[tuple[int, int], float] = defaultdict(float)
    for row, probability in zip(cases, got, strict=True):
        per_group[row] += probability
        same = [other for other, value in zip(cases, got, strict=True) if other == row and value != probability]
        assert not same  # the cases of a group are equal
    num_classes = len({label for label, _ in cases})
    for label, group in per_group:
        in_class = len({other for other in per_group if other[0] == label})
        assert per_group[label, group] == pytest.approx(float(Fraction(1, num_classes * in_class)))
