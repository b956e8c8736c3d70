"""Figures of classification and detection: ROC, precision-recall, reliability, confusion matrix, FROC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from nnunet_kd.evaluation.classification import NUM_BINS, Array, ClassificationScores, calibration_bins
from nnunet_kd.evaluation.detection import FALSE_POSITIVE_RATES, FROC_IOU, DetectionScores

# Okabe and Ito's colours, which colour-blind readers can tell apart; beyond them, the lines change their style
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000")
STYLES = ("-", "--", ":", "-.")
CHANCE = "#999999"


def draw_roc(reference: Array, probabilities: Array, scores: ClassificationScores, file: Path) -> None:
    """ROC curve of every class that has one.

    Args:
        reference: [N, C] of 0 and 1, NaN where not labelled.
        probabilities: [N, C].
        scores: The metrics of these cases, shown in the legend.
        file: PNG to write; likewise below.
    """
    with _axes(file) as axes:
        for index, own in enumerate(scores.classes):
            known = ~np.isnan(reference[:, index])
            if not np.isnan(own.auroc.value):
                false, true, _ = roc_curve(reference[known, index], probabilities[known, index])
                _line(axes, index, false, true, f"{own.name} ({own.auroc.value:.2f})")
        axes.plot([0, 1], [0, 1], color=CHANCE, linewidth=0.8)
        _unit_square(axes, "1 - specificity", "sensitivity", "ROC (area)")


def draw_precision_recall(reference: Array, probabilities: Array, scores: ClassificationScores, file: Path) -> None:
    """Precision-recall curve of every class that has one, as steps; see ``draw_roc`` for the arguments."""
    with _axes(file) as axes:
        for index, own in enumerate(scores.classes):
            known = ~np.isnan(reference[:, index])
            if not np.isnan(own.auprc.value):
                precision, recall, _ = precision_recall_curve(reference[known, index], probabilities[known, index])
                _line(axes, index, recall, precision, f"{own.name} ({own.auprc.value:.2f})", steps="steps-post")
        _unit_square(axes, "recall", "precision", "Precision-recall (average precision)")


def draw_reliability(confidence: Array, outcome: Array, scores: ClassificationScores, file: Path) -> None:
    """Observed frequency over confidence in bins of equal width; the area of a point grows with its predictions.

    Args:
        confidence: [predictions] in [0, 1]; see ``calibration_pairs``.
        outcome: [predictions], 1 where the prediction came true.
        scores: The metrics of these cases, shown in the title.
        file: PNG to write.
    """
    bins = calibration_bins(confidence)
    count = np.bincount(bins, minlength=NUM_BINS)
    filled = count > 0
    predicted, observed = (
        np.bincount(bins, values, minlength=NUM_BINS)[filled] / count[filled] for values in (confidence, outcome)
    )
    with _axes(file) as axes:
        axes.plot([0, 1], [0, 1], color=CHANCE, linewidth=0.8)
        axes.plot(predicted, observed, color=COLOURS[0], linewidth=1.2)
        area = 10 + 150 * count[filled] / count.sum()
        axes.scatter(predicted, observed, s=area, color=COLOURS[0], alpha=0.6, linewidths=0)
        title = f"Reliability (ECE {scores.ece.value:.2f}, Brier {scores.brier.value:.2f})"
        _unit_square(axes, "predicted probability", "observed frequency", title)


def draw_confusion(confusion: NDArray[np.int64], classes: Sequence[str], file: Path) -> None:
    """Confusion matrix: numbers of cases, coloured by the share of their row.

    Args:
        confusion: [reference, predicted].
        classes: Names in the same order.
        file: PNG to write.
    """
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    with _axes(file) as axes:
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(*confusion.shape):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(confusion[row, column]), ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(classes)), classes, rotation=30, ha="right", fontsize=7)
        axes.set_yticks(range(len(classes)), classes, fontsize=7)
        _labelled(axes, "predicted", "reference", "Confusion matrix")


def draw_froc(scores: DetectionScores, file: Path) -> None:
    """Sensitivity over false positives per image, per class, with the mean sensitivity in the legend."""
    with _axes(file) as axes:
        for index, own in enumerate(scores.classes):
            if own.num_boxes:
                false, sensitivity = own.curve
                # from no detection at all to beyond the last rate: steps, because there is no threshold in between
                false = np.concatenate([[0.0], false, [max([2 * FALSE_POSITIVE_RATES[-1], *false])]])
                sensitivity = np.concatenate([[0.0], sensitivity, [max(sensitivity, default=0.0)]])
                label = f"{own.name} ({own.scores.froc_mean.value:.2f})"
                _line(axes, index, false, sensitivity, label, steps="steps-post")
        axes.set_xscale("symlog", base=2, linthresh=FALSE_POSITIVE_RATES[0])
        axes.set_xticks(FALSE_POSITIVE_RATES, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
        axes.minorticks_off()
        axes.set_xlim(0, 1.2 * FALSE_POSITIVE_RATES[-1])
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        _labelled(axes, "false positives per image", "sensitivity", f"FROC at IoU {FROC_IOU:g} (mean sensitivity)")
        _legend(axes)


@contextmanager
def _axes(file: Path) -> Iterator[Axes]:
    """The axes of a small figure, which is written when the block ends."""
    figure = Figure(figsize=(4.2, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.add_subplot()
    figure.savefig(file, dpi=150)


def _line(axes: Axes, index: int, x: Array, y: Array, label: str, steps: str = "default") -> None:
    colour, style = COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]
    axes.plot(x, y, color=colour, linestyle=style, linewidth=1.4, drawstyle=steps, label=label)


def _unit_square(axes: Axes, x_label: str, y_label: str, title: str) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    _labelled(axes, x_label, y_label, title)
    _legend(axes)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="best", fontsize=7, framealpha=0.7)


def _labelled(axes: Axes, x_label: str, y_label: str, title: str) -> None:
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
