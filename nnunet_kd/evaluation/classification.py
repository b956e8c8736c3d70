"""Metrics of image-level classification, with bootstrap intervals over groups and a permuted-label control.

Definitions, the same everywhere here:

* AUROC and AUPRC are one class against the rest; AUPRC is the average precision, without interpolation. A class that
  none or all of the labelled cases have has neither (NaN), and macro means leave it out.
* Balanced accuracy. Multi-class (the class of highest probability is predicted): the mean recall of the classes that
  occur. Multi-label (a finding is predicted from 0.5 on): the mean of sensitivity and specificity per finding, averaged
  over the findings that have both.
* Macro-F1: the mean F1 of the classes or findings that occur.
* Expected calibration error: the mean distance between confidence and accuracy in ``NUM_BINS`` bins of equal width,
  weighted by their cases. Multi-class: of the probability of the predicted class. Multi-label: of the probability of
  each finding against its presence, averaged over findings. It rises with the scatter of a sample, so that its
  interval lies somewhat high. Source: Guo et al., ICML 2017, eq. (3).
* Brier score: the mean squared distance between probabilities and labels. Multi-class: summed over classes, in [0, 2];
  with two classes twice the binary score. Multi-label: per finding, in [0, 1], averaged over findings.
  Source: Brier, Monthly Weather Review 1950.

All values equal scikit-learn's, where it has them. They are computed here for many weightings of the cases at once,
because a call per bootstrap sample, class and metric would take a minute.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import confusion_matrix

from nnunet_kd.evaluation.statistics import BLOCK, Interval

NUM_BINS = 10
THRESHOLD = 0.5
LEVEL = 0.95

Array: TypeAlias = NDArray[np.float64]
# Metric -> [weightings, parts]: one part per class, or a single one; the metric's value is the mean over its parts.
Parts: TypeAlias = dict[str, Array]


@dataclass(frozen=True)
class ClassScores:
    """One class against the rest; ``num_positive`` and ``num_negative`` count labelled cases."""

    name: str
    num_positive: int
    num_negative: int
    auroc: Interval
    auprc: Interval


@dataclass(frozen=True)
class ClassificationScores:
    """All metrics of one target; see the module's docstring for their definitions.

    Attributes:
        num_cases: Cases with at least one label.
        num_groups: Groups that these cases form, the unit of the bootstrap.
        classes: Per class, in the order of the outputs.
        auroc_macro: Mean over classes; likewise ``auprc_macro`` and ``f1_macro``.
        balanced_accuracy: In [0, 1]; chance is 1 / classes that occur, or 0.5 if multi-label.
        ece: Expected calibration error, in [0, 1].
        brier: Brier score.
        confusion: [reference, predicted] numbers of cases; None if multi-label.
        permuted_auroc: ``auroc_macro`` when labels are dealt at random to the cases, or to whole groups where all cases
            of a group have the same: mean and central 95%. Its value is chance (0.5 of cases; of a few groups of
            different size it scatters about that); where ``auroc_macro`` lies inside the range, the classifier is not
            shown to be better.
        permuted_balanced_accuracy: Likewise.
    """

    num_cases: int
    num_groups: int
    classes: tuple[ClassScores, ...]
    auroc_macro: Interval
    auprc_macro: Interval
    balanced_accuracy: Interval
    f1_macro: Interval
    ece: Interval
    brier: Interval
    confusion: NDArray[np.int64] | None
    permuted_auroc: Interval
    permuted_balanced_accuracy: Interval

    def rows(self) -> list[dict[str, Any]]:
        """One row per class and metric: ``class`` (empty for all), ``metric``, ``value``, ``low``, ``high``."""
        rows: list[dict[str, Any]] = []
        for own in self.classes:
            rows.append({"class": own.name, "metric": "cases", "value": own.num_positive})
            rows += [{"class": own.name, "metric": name, **vars(getattr(own, name))} for name in ("auroc", "auprc")]
        rows.append({"class": "", "metric": "cases", "value": self.num_cases})
        metrics = {"auroc": self.auroc_macro, "auprc": self.auprc_macro}
        names = ("balanced_accuracy", "f1_macro", "ece", "brier", "permuted_auroc", "permuted_balanced_accuracy")
        metrics |= {name: getattr(self, name) for name in names}
        return rows + [{"class": "", "metric": name, **vars(interval)} for name, interval in metrics.items()]


def evaluate_classification(
    reference: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    *,
    multilabel: bool,
    groups: Sequence[Hashable] | None = None,
    num_resamples: int = 1000,
    num_permutations: int = 200,
    seed: int = 0,
) -> ClassificationScores:
    """Compare predicted probabilities with the labels of the cases.

    Args:
        reference: [N, C] of 0 and 1, NaN where not labelled. Multi-class: a row is one-hot, or NaN throughout.
        probabilities: [N, C] in [0, 1]; of unlabelled cases too, they are left out.
        classes: Names of the C classes.
        multilabel: Classes are findings, of which a case may have any number.
        groups: Group of each case, for example its patient; the bootstrap draws whole groups. None: every case is one.
        num_resamples: Number of bootstrap samples; 0 gives values without intervals. A sample in which a class is
            missing that the cases have does not count for the values that need this class.
        num_permutations: Number of permutations of the control. It permutes the labels of whole groups where all cases
            of a group have the same, else those of cases.
        seed: The same seed gives the same intervals.

    Raises:
        ValueError: Shapes do not fit, a probability or label is out of range, or a multi-class row is not one-hot.
    """
    labels, scores = _checked(reference, probabilities, classes, multilabel)
    if groups is not None and len(groups) != len(labels):
        msg = f"groups must name one group per case, got {len(groups)} for {len(labels)} cases"
        raise ValueError(msg)
    labelled = np.flatnonzero(np.isfinite(labels).any(axis=1))
    own_groups = [index if groups is None else groups[index] for index in labelled.tolist()]
    labels, scores = labels[labelled], scores[labelled]
    num_groups = len(set(own_groups))
    present, absent = np.nan_to_num(labels), np.nan_to_num(1 - labels)  # [N, C]

    values = weighted_metrics(present[None], absent[None], scores, multilabel)
    used = {name: ~np.isnan(parts[0]) for name, parts in values.items()}
    drawn = resample_groups(own_groups, num_resamples, seed=seed, values_per_case=len(classes))
    resampled = _concatenated(
        (
            weighted_metrics(weights[..., None] * present, weights[..., None] * absent, scores, multilabel)
            for weights in drawn
        ),
        like=values,
    )
    units = _units(own_groups, labels)
    orders = _permutations(units, num_permutations, seed, values_per_case=len(classes))
    permuted = _concatenated(
        (weighted_metrics(present[order], absent[order], scores, multilabel) for order in orders), like=values
    )

    def macro(name: str) -> Interval:
        value, samples = (mean_over_parts(parts[name], used[name]) for parts in (values, resampled))
        return interval_of(float(value[0]), samples, num_groups)

    def chance(name: str) -> Interval:
        samples = mean_over_parts(permuted[name], used[name])
        return interval_of(float(np.mean(samples)) if samples.size else float("nan"), samples, len(set(units.tolist())))

    return ClassificationScores(
        num_cases=len(labels),
        num_groups=num_groups,
        classes=tuple(
            ClassScores(
                name=name,
                num_positive=int(present[:, index].sum()),
                num_negative=int(absent[:, index].sum()),
                auroc=interval_of(float(values["auroc"][0, index]), resampled["auroc"][:, index], num_groups),
                auprc=interval_of(float(values["auprc"][0, index]), resampled["auprc"][:, index], num_groups),
            )
            for index, name in enumerate(classes)
        ),
        auroc_macro=macro("auroc"),
        auprc_macro=macro("auprc"),
        balanced_accuracy=macro("balanced_accuracy"),
        f1_macro=macro("f1"),
        ece=macro("ece"),
        brier=macro("brier"),
        confusion=None if multilabel else _confusion(labels, scores),
        permuted_auroc=chance("auroc"),
        permuted_balanced_accuracy=chance("balanced_accuracy"),
    )


def calibration_pairs(reference: Array, probabilities: Array, *, multilabel: bool) -> tuple[Array, Array]:
    """Confidence and outcome (1 if it came true) of every prediction that has a label, as in the calibration error.

    Args:
        reference: [N, C] of 0 and 1, NaN where not labelled.
        probabilities: [N, C] in [0, 1].
        multilabel: Every finding of every case is a prediction; otherwise the predicted class of every case.

    Returns:
        [predictions] each.
    """
    if multilabel:
        known = ~np.isnan(reference)
        return probabilities[known], reference[known]
    labelled = np.flatnonzero(np.isfinite(reference).any(axis=1))
    predicted = probabilities[labelled].argmax(axis=1)
    return probabilities[labelled, predicted], reference[labelled, predicted]


def calibration_bins(confidence: Array) -> NDArray[np.int64]:
    """Bin of each confidence: ``NUM_BINS`` of equal width, the lower edge belongs to a bin, 1 to the last."""
    return np.minimum((confidence * NUM_BINS).astype(np.int64), NUM_BINS - 1)


def group_keys(cases: Iterable[str], groups: Mapping[str, Hashable] | None) -> list[Hashable]:
    """Group of each case; one without a group is a group of its own, also if a group has the name of the case."""
    return [("group", groups[case]) if groups and case in groups else (case,) for case in cases]


def resample_groups(
    groups: Sequence[Hashable], num_resamples: int, *, seed: int, values_per_case: int = 1
) -> Iterator[Array]:
    """Bootstrap samples of whole groups, as weights: how often each case was drawn.

    Args:
        groups: Group of each case.
        num_resamples: Number of samples.
        seed: The same seed gives the same samples, in blocks of whatever size.
        values_per_case: Size of what will be computed per case and sample; bounds the block.

    Yields:
        [samples of a block, cases]; nothing if there are no cases.
    """
    if not groups:
        return
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
    random = np.random.default_rng(seed)
    for rows in _blocks(num_resamples, len(index) * values_per_case):
        drawn = random.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), size=rows)
        yield drawn[:, index].astype(np.float64)


def interval_of(value: float, samples: Array, num_units: int) -> Interval:
    """A value with the central 95% of its samples; samples that are NaN do not count.

    Without a value, with fewer than two units to draw from, or without samples, there is no interval (NaN).
    """
    known = samples[~np.isnan(samples)]
    if np.isnan(value) or num_units < 2 or not known.size:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _checked(
    reference: ArrayLike, probabilities: ArrayLike, classes: Sequence[str], multilabel: bool
) -> tuple[Array, Array]:
    labels, scores = np.asarray(reference, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    if labels.ndim != 2 or labels.shape != scores.shape or labels.shape[1] != len(classes):
        msg = f"reference and probabilities must be [cases, {len(classes)}], got {labels.shape} and {scores.shape}"
        raise ValueError(msg)
    if not ((scores >= 0) & (scores <= 1)).all():  # false for NaN too
        msg = "probabilities must lie in [0, 1]"
        raise ValueError(msg)
    known = ~np.isnan(labels)
    if not np.isin(labels[known], (0, 1)).all():
        msg = "reference must hold 0, 1 or NaN (not labelled)"
        raise ValueError(msg)
    if not multilabel and not (~known.any(axis=1) | (labels.sum(axis=1) == 1)).all():
        msg = "a row of a multi-class reference must be one-hot, or NaN throughout"
        raise ValueError(msg)
    return labels, scores


def weighted_metrics(positive: Array, negative: Array, probabilities: Array, multilabel: bool) -> Parts:
    """Every metric for many weightings of the cases at once.

    Args:
        positive: [R, N, C], how much of case n has class c in weighting r.
        negative: [R, N, C], how much of it has not; both are 0 where the label is not known.
        probabilities: [N, C].
        multilabel: As in ``evaluate_classification``.
    """
    num_cases, num_classes = probabilities.shape
    ranked = [
        _rank_metrics(positive[..., column], negative[..., column], probabilities[:, column])
        for column in range(num_classes)
    ]
    if multilabel:
        predicted = probabilities >= THRESHOLD
    else:
        predicted = np.zeros((num_cases, num_classes), dtype=bool)
        predicted[np.arange(num_cases), probabilities.argmax(axis=1)] = True
    hits, false_alarms = (positive * predicted).sum(axis=1), (negative * predicted).sum(axis=1)  # [R, C]
    num_positive, num_negative = positive.sum(axis=1), negative.sum(axis=1)
    recall, specificity = _ratio(hits, num_positive), _ratio(num_negative - false_alarms, num_negative)
    f1 = np.where(num_positive > 0, _ratio(2 * hits, num_positive + hits + false_alarms), np.nan)
    squared = positive * (1 - probabilities) ** 2 + negative * probabilities**2
    if multilabel:
        total = positive + negative
        calibration = [
            _calibration_error(total[..., column], positive[..., column], probabilities[:, column])
            for column in range(num_classes)
        ]
        ece = np.stack(calibration, axis=1)
        brier = _ratio(squared.sum(axis=1), total.sum(axis=1))
    else:
        total = positive.sum(axis=2)
        correct = (positive * predicted).sum(axis=2)
        ece = _calibration_error(total, correct, probabilities.max(axis=1))[:, None]
        brier = _ratio(squared.sum(axis=(1, 2)), total.sum(axis=1))[:, None]
    return {
        "auroc": np.stack([auroc for auroc, _ in ranked], axis=1),
        "auprc": np.stack([auprc for _, auprc in ranked], axis=1),
        "balanced_accuracy": (recall + specificity) / 2 if multilabel else recall,
        "f1": f1,
        "ece": ece,
        "brier": brier,
    }


def _rank_metrics(positive: Array, negative: Array, scores: Array) -> tuple[Array, Array]:
    """AUROC and AUPRC [R] from weights [R, N] and scores [N]; cases of equal score share a threshold."""
    if not scores.size:
        return np.full(len(positive), np.nan), np.full(len(positive), np.nan)
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    tied_positive = np.add.reduceat(positive[:, order], starts, axis=1)  # [R, thresholds], highest first
    tied_negative = np.add.reduceat(negative[:, order], starts, axis=1)
    above_positive, above_negative = tied_positive.cumsum(axis=1), tied_negative.cumsum(axis=1)
    num_positive, num_negative = above_positive[:, -1], above_negative[:, -1]
    # a positive case beats the negative ones below it, and half of those at the same score
    beaten = num_negative[:, None] - above_negative + tied_negative / 2
    auroc = _ratio((tied_positive * beaten).sum(axis=1), num_positive * num_negative)
    detected = above_positive + above_negative
    precision = np.divide(above_positive, detected, out=np.zeros_like(detected), where=detected > 0)
    auprc = _ratio((tied_positive * precision).sum(axis=1), num_positive)
    return auroc, np.where(num_negative > 0, auprc, np.nan)


def _calibration_error(total: Array, came_true: Array, confidence: Array) -> Array:
    """Expected calibration error [R] from weights [R, N] and confidences [N]."""
    membership = np.eye(NUM_BINS)[calibration_bins(confidence)]  # [N, bins]
    gaps = np.abs((total * confidence - came_true) @ membership)
    return _ratio(gaps.sum(axis=1), total.sum(axis=1))


def _ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(denominator, np.nan), where=denominator > 0)


def mean_over_parts(parts: Array, used: NDArray[np.bool_]) -> Array:
    """Mean [R] over the parts that have a value on the full set of cases; NaN where one of these lacks it."""
    return parts[:, used].mean(axis=1) if used.any() else np.full(len(parts), np.nan)


def _confusion(labels: Array, scores: Array) -> NDArray[np.int64]:
    num_classes = labels.shape[1]
    if not len(labels):
        return np.zeros((num_classes, num_classes), dtype=np.int64)
    counts: NDArray[np.int64] = confusion_matrix(
        labels.argmax(axis=1), scores.argmax(axis=1), labels=np.arange(num_classes)
    )
    return counts


def _units(groups: Sequence[Hashable], labels: Array) -> NDArray[np.int64]:
    """Number [N] of each case's group if all cases of a group have the same labels, else of each case."""
    first: dict[Hashable, int] = {}
    firsts = [first.setdefault(group, index) for index, group in enumerate(groups)]
    if not np.array_equal(labels, labels[firsts], equal_nan=True):
        return np.arange(len(labels))
    numbers = {index: number for number, index in enumerate(first.values())}
    return np.array([numbers[index] for index in firsts], dtype=np.int64)


def _permutations(
    units: NDArray[np.int64], num_permutations: int, seed: int, values_per_case: int
) -> Iterator[NDArray[np.int64]]:
    """Which case's labels each case gets [permutations of a block, N]: those of its unit's partner."""
    _, example = np.unique(units, return_index=True)
    random = np.random.default_rng(seed)
    for rows in _blocks(num_permutations, len(units) * values_per_case):
        partners = random.permuted(np.tile(np.arange(len(example)), (rows, 1)), axis=1)
        yield example[partners][:, units]


def _blocks(num_rows: int, row_size: int) -> Iterator[int]:
    """Numbers of rows that together are ``num_rows`` and hold about ``BLOCK`` numbers each."""
    most = max(1, BLOCK // max(1, row_size))
    for start in range(0, num_rows, most):
        yield min(most, num_rows - start)


def _concatenated(blocks: Iterator[Parts], like: Parts) -> Parts:
    """The blocks as one; without any, no weighting of the metrics of ``like``."""
    collected = list(blocks)
    return {name: np.concatenate([parts[:0], *(block[name] for block in collected)]) for name, parts in like.items()}
