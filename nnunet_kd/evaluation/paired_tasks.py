"""Methods of classification and detection against a control, over several runs (folds, seeds), paired by cases.

Metrics like AUROC and AP belong to a set of cases and not to one case, so that the comparison of ``table.py`` does not
fit. How the numbers are made here (our design): a metric is computed per run on the run's own validation cases, since
scores of two networks are not comparable, and its value is the mean over runs. A bootstrap sample draws whole groups
(patients) from all cases of the dataset and counts in every run and every method alike, so that repeated runs do not
pass as more patients, and a difference to the control is paired by cases. A comparison takes only the runs that both
methods have.

The two-sided p is twice the smaller share of samples in which the difference has one sign, zero counting for both, and
the observed data counted as one more sample. Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
section 15.4 (the percentile interval turned into a test).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from nnunet_kd.data.side_files import CaseBoxes
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation import classification, detection
from nnunet_kd.evaluation.classification import Array, group_keys, interval_of, resample_groups
from nnunet_kd.evaluation.detection import FROC_IOU, PredictedBoxes
from nnunet_kd.evaluation.statistics import holm
from nnunet_kd.evaluation.table import TABLE_COLUMNS

# weights [R, cases], how often each case counts -> metric's name to [R]; NaN where a metric has no value
Scoring: TypeAlias = Callable[[Array], dict[str, Array]]
CLASSIFICATION_METRICS = ("auroc", "auprc", "f1", "balanced_accuracy")
DETECTION_METRICS = ("ap@0.1", "ap@0.5", "froc_mean")


@dataclass(frozen=True)
class ScoredRun:
    """What one run predicted for its validation cases, to be scored under any weighting of the cases.

    Attributes:
        dataset: Lines of the table are per dataset and method.
        method: The method.
        run: What runs of several methods have in common, for example (fold, seed).
        cases: The validation cases.
        scoring: Of these cases, in this order; from :func:`classification_scoring` or :func:`detection_scoring`.
        groups: Case to group; a case without one is a group of its own.
    """

    dataset: str
    method: str
    run: Hashable
    cases: tuple[str, ...]
    scoring: Scoring
    groups: Mapping[str, Hashable] = field(default_factory=dict)


def classification_scoring(reference: Array, probabilities: Array, *, multilabel: bool) -> Scoring:
    """``CLASSIFICATION_METRICS`` as in ``classification.py``, means over the classes that have a value on all cases.

    Args:
        reference: [N, C] of 0 and 1, NaN where not labelled.
        probabilities: [N, C] in [0, 1].
        multilabel: Classes are findings, of which a case may have any number.
    """
    present, absent = np.nan_to_num(reference), np.nan_to_num(1 - reference)
    once = classification.weighted_metrics(present[None], absent[None], probabilities, multilabel)
    used = {name: ~np.isnan(once[name][0]) for name in CLASSIFICATION_METRICS}

    def score(weights: Array) -> dict[str, Array]:
        weighted = weights[..., None]
        parts = classification.weighted_metrics(weighted * present, weighted * absent, probabilities, multilabel)
        return {name: classification.mean_over_parts(parts[name], own) for name, own in used.items()}

    return score


def detection_scoring(
    reference: Sequence[CaseBoxes], predictions: Sequence[PredictedBoxes], num_classes: int
) -> Scoring:
    """``DETECTION_METRICS`` as in ``detection.py``, means over the classes that have boxes in these images.

    Args:
        reference: Boxes of each image.
        predictions: Boxes of the same images.
        num_classes: Number of classes.
    """
    matched = [detection.match_image(*pair) for pair in zip(reference, predictions, strict=True)]
    pools = [detection.DetectionPool.of_class([image.get(label) for image in matched]) for label in range(num_classes)]
    pools = [pool for pool in pools if pool.num_boxes.any()]

    def score(weights: Array) -> dict[str, Array]:
        values = np.array(
            [
                [
                    (
                        pool.average_precision(own, FROC_IOU),
                        pool.average_precision(own, 0.5),
                        float(pool.sensitivities(own).mean()),
                    )
                    for pool in pools
                ]
                for own in weights
            ]
        ).reshape(len(weights), len(pools), len(DETECTION_METRICS))
        means = values.mean(axis=1) if pools else np.full((len(weights), len(DETECTION_METRICS)), np.nan)
        return dict(zip(DETECTION_METRICS, means.T, strict=True))

    return score


def summarize_runs(
    runs: Sequence[ScoredRun], control: str, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """One table per metric, a line per dataset and method in the order of their first appearance.

    Args:
        runs: All of the same task.
        control: The method that the others are compared with.
        num_resamples: Number of bootstrap samples.
        seed: Of the bootstrap.

    Returns:
        Metric to a table with the columns of ``table.summarize``. ``num_cases`` and ``num_pairs`` count cases;
        ``wins``, ``losses`` and ``ties`` count runs; intervals and ``p_value`` are over groups.

    Raises:
        NnUNetKDError: A method has two runs of the same name for a dataset, or no run belongs to the control.
    """
    if control not in {run.method for run in runs}:
        methods = ", ".join(sorted({run.method for run in runs}))
        raise NnUNetKDError(f"No run belongs to the control '{control}'. Methods: {methods}.")
    lines: dict[str, list[dict[str, Any]]] = {}
    for dataset in dict.fromkeys(run.dataset for run in runs):
        values = _values([run for run in runs if run.dataset == dataset], num_resamples, seed)
        for method, own in values.items():
            for metric in next(iter(own.values())).samples:
                line = {"dataset": dataset, "method": method, **_summary(list(own.values()), metric)}
                if method != control and control in values:
                    line |= _comparison(own, values[control], metric)
                lines.setdefault(metric, []).append(line)
    counts = ("num_pairs", "num_paired_runs", "wins", "losses", "ties")
    tables = {}
    for metric, own_lines in lines.items():
        table = pd.DataFrame(own_lines, columns=TABLE_COLUMNS).astype(dict.fromkeys(counts, "Int64"))
        table["p_holm"] = holm(table["p_value"].astype(float).tolist())
        tables[metric] = table
    return tables


@dataclass(frozen=True)
class _Values:
    """One run: metric to [1 + num_resamples], the value on all cases first; and what was drawn."""

    cases: frozenset[str]
    groups: frozenset[Hashable]
    samples: dict[str, Array]


def _values(runs: Sequence[ScoredRun], num_resamples: int, seed: int) -> dict[str, dict[Hashable, _Values]]:
    """Method to run to its values; all runs share the bootstrap samples of their dataset."""
    groups = {case: group for run in runs for case, group in run.groups.items()}
    cases = sorted({case for run in runs for case in run.cases})
    keys = dict(zip(cases, group_keys(cases, groups), strict=True))
    position = {case: index for index, case in enumerate(cases)}
    drawn = resample_groups(list(keys.values()), num_resamples, seed=seed)
    weights = np.concatenate([np.ones((1, len(cases))), *drawn])
    values: dict[str, dict[Hashable, _Values]] = {}
    for run in runs:
        if run.run in values.setdefault(run.method, {}):
            raise NnUNetKDError(f"{run.method} has two runs {run.run} for {run.dataset}. Leave one of them out.")
        samples = run.scoring(weights[:, [position[case] for case in run.cases]])
        own = frozenset(keys[case] for case in run.cases)
        values[run.method][run.run] = _Values(frozenset(run.cases), own, samples)
    return values


def _summary(runs: Sequence[_Values], metric: str) -> dict[str, Any]:
    """Mean over the runs that have a value, its interval and its spread."""
    known = [run for run in runs if not np.isnan(run.samples[metric][0])]
    values = [run.samples[metric][0] for run in known]
    samples = np.mean([run.samples[metric] for run in known], axis=0) if known else np.full(1, np.nan)
    interval = interval_of(float(samples[0]), samples[1:], len(frozenset().union(*(run.groups for run in known))))
    return {
        "num_cases": len(frozenset().union(*(run.cases for run in runs))),
        "num_runs": len(known),
        "mean": interval.value,
        "low": interval.low,
        "high": interval.high,
        "sd_runs": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        "note": "" if known else "no value in any run",
    }


def _comparison(method: Mapping[Hashable, _Values], control: Mapping[Hashable, _Values], metric: str) -> dict[str, Any]:
    """The mean difference over the runs that both have."""
    pairs = [
        (own, control[run])
        for run, own in method.items()
        if run in control and not np.isnan(own.samples[metric][0] - control[run].samples[metric][0])
    ]
    cases = frozenset().union(*(own.cases & other.cases for own, other in pairs))
    if not pairs:
        return {"num_pairs": 0, "num_paired_runs": 0, "wins": 0, "losses": 0, "ties": 0, "note": "no common run"}
    for own, other in pairs:
        if own.cases != other.cases:
            raise NnUNetKDError("Two methods have the same run with other validation cases. Repeat one of them.")
    differences = np.stack([own.samples[metric] - other.samples[metric] for own, other in pairs])
    mean = differences.mean(axis=0)
    interval = interval_of(float(mean[0]), mean[1:], len(frozenset().union(*(own.groups for own, _ in pairs))))
    return {
        "num_pairs": len(cases),
        "num_paired_runs": len(pairs),
        "difference": interval.value,
        "difference_low": interval.low,
        "difference_high": interval.high,
        "wins": int((differences[:, 0] > 0).sum()),
        "losses": int((differences[:, 0] < 0).sum()),
        "ties": int((differences[:, 0] == 0).sum()),
        "p_value": _p_value(mean[1:]),
    }


def _p_value(samples: Array) -> float:
    """Two-sided; NaN without samples."""
    known = samples[~np.isnan(samples)]
    if not known.size:
        return math.nan
    smaller = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * (1 + smaller) / (1 + known.size))
