"""Classification metrics: against scikit-learn, loops and closed forms; bootstrap and control against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from sklearn import metrics

from nnunet_kd.evaluation.classification import (
    NUM_BINS,
    ClassificationScores,
    calibration_pairs,
    evaluate_classification,
    group_keys,
    resample_groups,
)

CLASSES = ("a", "b", "c")
MACROS = ("auroc_macro", "auprc_macro", "balanced_accuracy", "f1_macro", "ece", "brier")
NO_RESAMPLING = {"num_resamples": 0, "num_permutations": 0}


def multiclass(seed: int, num_cases: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities in steps of 0.1, so that scores are tied."""
    random = np.random.default_rng(seed)
    labels = np.eye(3)[random.integers(0, 3, num_cases)]
    counts = np.array([random.multinomial(10, (0.2 + row) / 1.6) for row in labels])
    return labels, counts / 10


def multilabel(seed: int, num_cases: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Findings of which a fifth is not labelled, and probabilities in steps of 0.05."""
    random = np.random.default_rng(seed)
    labels = (random.random((num_cases, 3)) < 0.4).astype(float)
    probabilities = np.round(np.clip(0.3 * labels + 0.7 * random.random(labels.shape), 0, 1) * 20) / 20
    labels[random.random(labels.shape) < 0.2] = np.nan
    return labels, probabilities


def calibration_error(confidence: np.ndarray, outcome: np.ndarray) -> float:
    """The definition, bin by bin."""
    total = 0.0
    for number in range(NUM_BINS):
        last = number == NUM_BINS - 1
        inside = [
            index for index, value in enumerate(confidence) if int(value * NUM_BINS) == number or (last and value == 1)
        ]
        if inside:
            total += len(inside) * abs(np.mean(confidence[inside]) - np.mean(outcome[inside]))
    return total / len(confidence)


def by_scikit_learn(labels: np.ndarray, probabilities: np.ndarray, is_multilabel: bool) -> dict[str, float]:
    """The six macro values, from scikit-learn and the loop above; every class must occur."""
    known = [~np.isnan(labels[:, index]) for index in range(3)]
    pairs = [(labels[own, index], probabilities[own, index]) for index, own in enumerate(known)]
    values = {
        "auroc_macro": np.mean([metrics.roc_auc_score(*pair) for pair in pairs]),
        "auprc_macro": np.mean([metrics.average_precision_score(*pair) for pair in pairs]),
    }
    if is_multilabel:
        decided = [(truth, score >= 0.5) for truth, score in pairs]
        values["balanced_accuracy"] = np.mean([metrics.balanced_accuracy_score(*pair) for pair in decided])
        values["f1_macro"] = np.mean([metrics.f1_score(*pair) for pair in decided])
        values["ece"] = np.mean([calibration_error(score, truth) for truth, score in pairs])
        values["brier"] = np.mean([metrics.brier_score_loss(*pair) for pair in pairs])
    else:
        truth, predicted = labels.argmax(axis=1), probabilities.argmax(axis=1)
        values["balanced_accuracy"] = metrics.balanced_accuracy_score(truth, predicted)
        values["f1_macro"] = metrics.f1_score(truth, predicted, average="macro")
        values["ece"] = calibration_error(probabilities.max(axis=1), truth == predicted)
        values["brier"] = metrics.brier_score_loss(truth, probabilities, labels=range(3), scale_by_half=False)
    return {name: float(value) for name, value in values.items()}


def macros(scores: ClassificationScores) -> dict[str, float]:
    return {name: getattr(scores, name).value for name in MACROS}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("is_multilabel", [False, True])
def test_values_are_those_of_scikit_learn(seed: int, is_multilabel: bool) -> None:
    labels, probabilities = multilabel(seed) if is_multilabel else multiclass(seed)
    scores = evaluate_classification(labels, probabilities, CLASSES, multilabel=is_multilabel, **NO_RESAMPLING)
    assert macros(scores) == pytest.approx(by_scikit_learn(labels, probabilities, is_multilabel))
    for index, own in enumerate(scores.classes):
        known = ~np.isnan(labels[:, index])
        assert own.auroc.value == pytest.approx(
            metrics.roc_auc_score(labels[known, index], probabilities[known, index])
        )
        assert own.num_positive + own.num_negative == known.sum()
        assert own.num_positive == np.nansum(labels[:, index])


def test_values_by_hand() -> None:
    labels = [[1, 0], [1, 0], [0, 1], [0, 1]]
    second = np.array([0.1, 0.6, 0.6, 0.9])
    scores = evaluate_classification(labels, np.stack([1 - second, second], 1), "ab", multilabel=False, **NO_RESAMPLING)
    assert scores.classes[1].auroc.value == pytest.approx(3.5 / 4)  # 3 of 4 pairs in order, one tied
    assert scores.classes[1].auprc.value == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert scores.balanced_accuracy.value == pytest.approx((0.5 + 1) / 2)
    assert scores.f1_macro.value == pytest.approx((2 / 3 + 4 / 5) / 2)
    # the bin from 0.9 on holds two right ones at 0.9, the bin from 0.6 one right and one wrong at 0.6
    assert scores.ece.value == pytest.approx(0.5 * 0.1 + 0.5 * 0.1)
    assert scores.brier.value == pytest.approx(2 * (0.01 + 0.36 + 0.16 + 0.01) / 4)
    assert scores.confusion is not None
    assert scores.confusion.tolist() == [[1, 1], [0, 2]]


@pytest.mark.parametrize("is_multilabel", [False, True])
def test_intervals_are_those_of_repeated_cases(is_multilabel: bool) -> None:
    """Every bootstrap sample written out as a list of cases and given to scikit-learn."""
    labels, probabilities = multilabel(5) if is_multilabel else multiclass(5)
    groups = [number // 3 for number in range(60)]
    scores = evaluate_classification(
        labels, probabilities, CLASSES, multilabel=is_multilabel, groups=groups, num_resamples=15, seed=7
    )
    samples = []
    for weights in np.concatenate(list(resample_groups(groups, 15, seed=7))):
        drawn = np.repeat(np.arange(60), weights.astype(int))
        samples.append(by_scikit_learn(labels[drawn], probabilities[drawn], is_multilabel))
    for name in MACROS:
        low, high = np.quantile([sample[name] for sample in samples], [0.025, 0.975])
        assert (getattr(scores, name).low, getattr(scores, name).high) == pytest.approx((low, high))


def test_copies_of_a_case_in_one_group_add_no_evidence() -> None:
    labels, probabilities = multiclass(1, num_cases=30)
    once = evaluate_classification(labels, probabilities, CLASSES, multilabel=False, seed=3)
    twice = evaluate_classification(
        np.repeat(labels, 2, axis=0),
        np.repeat(probabilities, 2, axis=0),
        CLASSES,
        multilabel=False,
        groups=np.repeat(np.arange(30), 2).tolist(),
        seed=3,
    )
    for name in MACROS:
        assert vars(getattr(twice, name)) == pytest.approx(vars(getattr(once, name)))
    assert (twice.num_cases, twice.num_groups) == (60, 30)


def test_groups_are_drawn_as_a_whole() -> None:
    groups = ["x", "y", "x", "z", "y", "x"]
    weights = np.concatenate(list(resample_groups(groups, 500, seed=0)))
    assert (weights[:, [0]] == weights[:, [2, 5]]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert weights[:, 3].mean() == pytest.approx(1, abs=0.15)
    assert set(weights[:, 3]) == {0, 1, 2, 3}


def test_a_case_without_group_is_no_member_of_a_group_of_its_name() -> None:
    keys = group_keys(["p1", "p2", "p3"], {"p2": "p1", "p3": "p1"})
    assert keys[1] == keys[2] != keys[0]


def test_class_that_none_or_all_have_has_no_value() -> None:
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]])
    probabilities = np.array([[0.9, 0.6, 0.2], [0.2, 0.2, 0.9], [0.8, 0.1, 0.9], [0.1, 0.1, 0.9]])
    scores = evaluate_classification(labels, probabilities, CLASSES, multilabel=True)
    assert [own.auroc.value for own in scores.classes] == pytest.approx([1, math.nan, math.nan], nan_ok=True)
    assert [own.auprc.value for own in scores.classes] == pytest.approx([1, math.nan, math.nan], nan_ok=True)
    assert scores.auroc_macro.value == scores.auprc_macro.value == 1
    assert scores.balanced_accuracy.value == 1  # of the first finding alone
    assert scores.f1_macro.value == pytest.approx((1 + 6 / 7) / 2)  # of the two that occur
    assert not math.isnan(scores.auroc_macro.low)


def test_multiclass_means_are_over_the_classes_that_occur() -> None:
    labels = np.eye(3)[[0, 0, 1, 1]]
    probabilities = np.eye(3)[[0, 2, 1, 1]]
    scores = evaluate_classification(labels, probabilities, CLASSES, multilabel=False, **NO_RESAMPLING)
    assert scores.balanced_accuracy.value == pytest.approx((0.5 + 1) / 2)
    assert scores.f1_macro.value == pytest.approx((2 / 3 + 1) / 2)
    assert math.isnan(scores.classes[2].auroc.value)


def test_unlabelled_cases_change_nothing() -> None:
    labels, probabilities = multiclass(2)
    more = (
        np.concatenate([labels, np.full((5, 3), np.nan)]),
        np.concatenate([probabilities, np.eye(3)[[0, 1, 2, 0, 1]]]),
    )
    without = evaluate_classification(labels, probabilities, CLASSES, multilabel=False)
    with_them = evaluate_classification(*more, CLASSES, multilabel=False)
    assert macros(with_them) == macros(without)
    assert with_them.brier == without.brier
    assert with_them.num_cases == 60


def test_no_label_at_all() -> None:
    scores = evaluate_classification(np.full((3, 3), np.nan), np.eye(3), CLASSES, multilabel=False)
    assert all(math.isnan(value) for value in macros(scores).values())
    assert all(
        math.isnan(bound) for bound in (scores.brier.low, scores.permuted_auroc.value, scores.permuted_auroc.high)
    )
    assert scores.num_cases == scores.num_groups == 0


def test_one_group_has_no_interval() -> None:
    labels, probabilities = multiclass(2)
    scores = evaluate_classification(labels, probabilities, CLASSES, multilabel=False, groups=["same"] * 60)
    assert math.isnan(scores.brier.low)
    assert not math.isnan(scores.brier.value)


def test_labels_of_whole_groups_are_permuted_where_a_group_has_one() -> None:
    """Slices of four patients of one class each: six ways to say which two patients are ill, and no others."""
    sizes = [5, 9, 12, 7]
    patients = np.repeat([3, 1, 0, 2], sizes)
    probability = np.random.default_rng(0).uniform(0, 0.5, len(patients)) + np.repeat([0.1, 0.4, 0.2, 0.5], sizes)
    scores = np.stack([1 - probability, probability], axis=1)
    ill = np.repeat([0, 1, 0, 1], sizes)
    ways = itertools.combinations(range(4), 2)
    aurocs = [metrics.roc_auc_score(np.isin(np.repeat(range(4), sizes), way), probability) for way in ways]
    groups = patients.tolist()
    chance = evaluate_classification(np.eye(2)[ill], scores, "ab", multilabel=False, groups=groups).permuted_auroc
    assert (chance.low, chance.high) == (pytest.approx(min(aurocs)), pytest.approx(max(aurocs)))
    assert chance.value == pytest.approx(np.mean(aurocs), abs=0.05)
    ill[0] = 1  # one patient has both, so that cases are permuted
    chance = evaluate_classification(np.eye(2)[ill], scores, "ab", multilabel=False, groups=groups).permuted_auroc
    cases = evaluate_classification(np.eye(2)[ill], scores, "ab", multilabel=False).permuted_auroc
    assert chance == cases
    assert min(aurocs) < cases.low < cases.high < max(aurocs)


@pytest.mark.parametrize("is_multilabel", [False, True])
def test_permuted_labels_are_at_chance_also_for_a_perfect_classifier(is_multilabel: bool) -> None:
    labels = np.eye(3)[np.repeat([0, 1, 2], [60, 25, 15])]
    scores = evaluate_classification(labels, labels, CLASSES, multilabel=is_multilabel)
    assert scores.auroc_macro.value == scores.balanced_accuracy.value == 1
    assert scores.permuted_auroc.value == pytest.approx(0.5, abs=0.02)
    assert scores.permuted_balanced_accuracy.value == pytest.approx(0.5 if is_multilabel else 1 / 3, abs=0.02)
    assert 0.5 < scores.permuted_auroc.high < 0.7


def test_calibration_pairs_leave_out_what_is_not_labelled() -> None:
    labels = np.array([[0.0, 1.0], [np.nan, np.nan], [1.0, 0.0]])
    probabilities = np.array([[0.3, 0.7], [0.5, 0.5], [0.4, 0.6]])
    confidence, outcome = calibration_pairs(labels, probabilities, multilabel=False)
    assert (confidence.tolist(), outcome.tolist()) == ([0.7, 0.6], [1, 0])
    confidence, outcome = calibration_pairs(labels, probabilities, multilabel=True)
    assert (confidence.tolist(), outcome.tolist()) == ([0.3, 0.7, 0.4, 0.6], [0, 1, 1, 0])


@pytest.mark.parametrize(
    ("reference", "probabilities", "message"),
    [
        ([[1, 0]], [[0.5, 0.5, 0.0]], r"must be \[cases, 2\], got \(1, 2\) and \(1, 3\)"),
        ([[1, 0]], [[1.5, -0.5]], r"probabilities must lie in \[0, 1\]"),
        ([[1, 0]], [[np.nan, 1.0]], r"probabilities must lie in \[0, 1\]"),
        ([[2, 0]], [[0.5, 0.5]], "0, 1 or NaN"),
        ([[1, 1]], [[0.5, 0.5]], "one-hot"),
        ([[0, np.nan]], [[0.5, 0.5]], "one-hot"),
    ],
)
def test_bad_input(reference: list[list[float]], probabilities: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_classification(reference, probabilities, "ab", multilabel=False)


def test_groups_must_name_every_case() -> None:
    with pytest.raises(ValueError, match="got 1 for 2 cases"):
        evaluate_classification(np.eye(2), np.eye(2), "ab", multilabel=False, groups=["x"])
