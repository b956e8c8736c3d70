"""Several runs of two methods: which runs and cases are compared, and the numbers of metrics that belong to a set."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from nnunet_kd.data.side_files import CaseBoxes
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.classification import evaluate_classification
from nnunet_kd.evaluation.detection import evaluate_detection
from nnunet_kd.evaluation.paired_tasks import (
    ScoredRun,
    classification_scoring,
    detection_scoring,
    summarize_runs,
)

CASES = tuple(f"case_{index}" for index in range(12))
LABELS = np.eye(2)[[0, 1] * 6]


def make_probabilities(seed: int, quality: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    positive = 1 / (1 + np.exp(-(quality * (LABELS[:, 1] - 0.5) + random.normal(size=len(LABELS)))))
    return np.stack([1 - positive, positive], axis=1)


def make_run(method: str, run: int, probabilities: np.ndarray, groups: dict[str, str] | None = None) -> ScoredRun:
    scoring = classification_scoring(LABELS, probabilities, multilabel=False)
    return ScoredRun("A", method, run, CASES, scoring, groups or {})


def test_mean_over_runs_of_metrics_computed_within_each_run() -> None:
    control, method = ([make_probabilities(seed, quality) for seed in (1, 2)] for quality in (0.5, 3.0))
    runs = [make_run("control", run, own) for run, own in enumerate(control)]
    runs += [make_run("method", run, own) for run, own in enumerate(method)]
    tables = summarize_runs(runs, "control", num_resamples=50)
    areas = [[roc_auc_score(LABELS[:, 1], own[:, 1]) for own in both] for both in (control, method)]
    assert tables["auroc"]["mean"].tolist() == pytest.approx(np.mean(areas, axis=1).tolist())
    line = tables["auroc"].iloc[1]
    assert line["difference"] == pytest.approx(np.mean(areas[1]) - np.mean(areas[0]))
    assert line["sd_runs"] == pytest.approx(np.std(areas[1], ddof=1))
    scores = [f1_score(LABELS[:, 1], own.argmax(1), average="macro") for own in method]
    assert tables["f1"].iloc[1]["mean"] == pytest.approx(np.mean(scores))


def test_interval_of_the_difference_is_that_of_drawing_whole_groups_in_both_methods() -> None:
    groups = {case: f"patient_{index // 2}" for index, case in enumerate(CASES)}
    control, method = make_probabilities(3, 0.5), make_probabilities(4, 1.0)
    runs = [make_run("control", 0, control, groups), make_run("method", 0, method, groups)]
    line = summarize_runs(runs, "control", num_resamples=4000)["auroc"].iloc[1]
    random = np.random.default_rng(7)
    drawn = []
    for _ in range(4000):
        patients = random.integers(0, 6, 6)
        chosen = np.concatenate([[2 * patient, 2 * patient + 1] for patient in patients])
        is_positive = LABELS[chosen, 1] == 1
        areas = []
        for own in (method, control):
            scores = own[chosen, 1]
            areas.append(np.mean(scores[is_positive][:, None] > scores[~is_positive]))
        drawn.append(areas[0] - areas[1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (line["difference_low"], line["difference_high"]) == pytest.approx((low, high), abs=0.03)
    smaller = min(np.mean(np.array(drawn) <= 0), np.mean(np.array(drawn) >= 0))
    assert line["p_value"] == pytest.approx(2 * smaller, abs=0.03)


def test_equal_methods_do_not_differ_and_a_perfect_one_differs_clearly() -> None:
    control = make_probabilities(5, 0.0)
    runs = [make_run("control", 0, control), make_run("same", 0, control), make_run("perfect", 0, LABELS)]
    table = summarize_runs(runs, "control", num_resamples=999)["auroc"].set_index("method")
    assert table.loc["same", "p_value"] == 1
    assert (table.loc["same", "difference_low"], table.loc["same", "difference_high"]) == (0, 0)
    assert table.loc["perfect", "difference_low"] > 0
    assert table.loc["perfect", "p_value"] < 0.01


def test_only_common_runs_are_compared() -> None:
    runs = [make_run("control", 0, make_probabilities(6, 1.0)), make_run("control", 1, LABELS)]
    runs += [make_run("method", 0, make_probabilities(6, 1.0)), make_run("other", 2, LABELS)]
    table = summarize_runs(runs, "control", num_resamples=20)["auroc"].set_index("method")
    assert table.loc["method", "difference"] == 0
    assert table.loc["method", "num_paired_runs"] == 1
    assert table.loc["other", "num_paired_runs"] == 0
    assert table.loc["control", "num_runs"] == 2


def test_missing_class_is_left_out_of_the_mean_on_all_cases_only() -> None:
    labels = np.eye(3)[[0, 1] * 6]  # the third class has no case
    probabilities = np.concatenate([make_probabilities(8, 1.0), np.zeros((12, 1))], axis=1)
    score = classification_scoring(labels, probabilities, multilabel=False)
    expected = evaluate_classification(labels, probabilities, "abc", multilabel=False, num_resamples=0)
    assert score(np.ones((1, 12)))["auroc"][0] == pytest.approx(expected.auroc_macro.value)
    only_first = (labels[:, 0] == 1).astype(float)
    assert np.isnan(score(only_first[None])["auroc"][0])


def test_detection_equals_repeating_the_images() -> None:
    random = np.random.default_rng(9)

    def boxes(number: int) -> np.ndarray:
        lower = random.uniform(0, 20, (number, 2))
        return np.concatenate([lower, lower + random.uniform(5, 15, (number, 2))], axis=1)

    reference = [CaseBoxes(random.integers(0, 2, number), boxes(number)) for number in (2, 0, 3, 1)]
    predictions = []
    for own in reference:
        found = np.concatenate([own.boxes + random.normal(scale=1.5, size=own.boxes.shape), boxes(2)])
        labels = np.concatenate([own.labels, random.integers(0, 2, 2)])
        predictions.append((labels, found, random.uniform(size=len(labels))))
    weights = [2, 1, 0, 3]
    values = detection_scoring(reference, predictions, 2)(np.array([weights], dtype=float))
    repeated = [(index, copy) for index, times in enumerate(weights) for copy in range(times)]
    expected = evaluate_detection(
        {f"{index} {copy}": reference[index] for index, copy in repeated},
        {f"{index} {copy}": predictions[index] for index, copy in repeated},
        ("a", "b"),
        num_resamples=0,
    ).mean
    assert values["ap@0.1"][0] == pytest.approx(expected.ap_10)
    assert values["ap@0.5"][0] == pytest.approx(expected.ap_50.value)
    assert values["froc_mean"][0] == pytest.approx(expected.froc_mean.value)


def test_refuses_what_cannot_be_compared() -> None:
    run = make_run("method", 0, LABELS)
    with pytest.raises(NnUNetKDError, match="No run belongs to the control"):
        summarize_runs([run], "control")
    with pytest.raises(NnUNetKDError, match="two runs"):
        summarize_runs([run, run], "method")
    fewer = ScoredRun("A", "control", 0, CASES[:6], classification_scoring(LABELS[:6], LABELS[:6], multilabel=False))
    with pytest.raises(NnUNetKDError, match="other validation cases"):
        summarize_runs([run, fewer], "control")
