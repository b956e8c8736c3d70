"""One figure of the demo: per dataset an image with the contours of every method, and the learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nnunet_kd.evaluation.metrics import Label, Segmentation, dice

# Okabe and Ito's colours, which colour-blind readers can tell apart
CLASS_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00")
METHOD_COLOURS = ("#0072B2", "#7F7F7F", "#D55E00", "#009E73")


@dataclass(frozen=True)
class Row:
    """What the figure shows of one dataset.

    ``image``, ``reference`` and ``predictions`` are [Z, Y, X] of one case, ``spacing_mm`` in the same order. ``curves``
    holds the pseudo Dice per epoch. ``predictions`` and ``curves`` are keyed by method.
    """

    dataset: str
    case: str
    image: NDArray[Any]
    reference: Segmentation
    predictions: Mapping[str, Segmentation]
    spacing_mm: Sequence[float]
    classes: Mapping[str, Label]
    ignore_label: int | None
    curves: Mapping[str, NDArray[np.float64]]


def draw(rows: Sequence[Row], file: Path) -> None:
    """Write the figure; the file ending decides the format."""
    methods = list(rows[0].predictions)
    num_columns = len(methods) + 2
    figure = Figure(figsize=(2.4 * num_columns + 0.8, 2.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), num_columns, squeeze=False, width_ratios=[1.0] * (num_columns - 1) + [1.4])
    names = list(dict.fromkeys(name for row in rows for name in row.classes))
    colours = {name: CLASS_COLOURS[number % len(CLASS_COLOURS)] for number, name in enumerate(names)}
    for row, line in zip(rows, axes, strict=True):
        index = best_slice(row.reference, row.classes)
        _show(line[0], row, index, row.reference, colours)
        for name in row.classes:
            line[0].plot([], [], color=colours[name], label=name)
        line[0].legend(loc="lower left", fontsize=6, framealpha=0.6, handlelength=1.2)
        line[0].set_ylabel(f"{row.dataset}\n{row.case}", fontsize=8)
        for axis, method in zip(line[1:], methods, strict=False):
            _show(axis, row, index, row.predictions[method], colours)
            scores = dice(row.reference, row.predictions[method], list(row.classes.values()), row.ignore_label)
            text = "\n".join(f"{name} {score:.2f}" for name, score in zip(row.classes, scores, strict=True))
            axis.text(0.03, 0.03, text, transform=axis.transAxes, color="white", fontsize=7)
        _plot(line[-1], row)
    for axis, title in zip(axes[0], ["reference", *methods, "while training"], strict=True):
        axis.set_title(title, fontsize=10)
    figure.savefig(file, dpi=150)


def best_slice(reference: Segmentation, classes: Mapping[str, Label]) -> int:
    """The slice with most voxels of the smallest class that is present; the middle one of an empty reference."""
    sizes = [np.isin(reference, label).sum(axis=(1, 2)) for label in classes.values()]
    present = [size for size in sizes if size.any()]
    return int(min(present, key=np.sum).argmax()) if present else reference.shape[0] // 2


def grey_window(image: NDArray[Any], reference: Segmentation) -> tuple[float, float]:
    """Intensities shown as black and white: the range of the reference's foreground, widened mostly downwards.

    Air of -1000 HU would otherwise leave one shade of grey for everything else.
    """
    shown = image[reference > 0] if (reference > 0).any() else image
    low, high = (float(value) for value in np.percentile(shown, [1, 99]))
    width = max(high - low, 1e-6)
    return low - width, high + 0.25 * width


def _show(axis: Axes, row: Row, index: int, segmentation: Segmentation, colours: Mapping[str, str]) -> None:
    low, high = grey_window(row.image, row.reference)
    aspect = row.spacing_mm[1] / row.spacing_mm[2]
    axis.imshow(row.image[index], cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
    masks = {name: np.isin(segmentation[index], label) for name, label in row.classes.items()}
    for name in sorted(masks, key=lambda name: -np.count_nonzero(masks[name])):  # the smallest on top
        if masks[name].any() and not masks[name].all():
            axis.contour(masks[name], levels=[0.5], colors=[colours[name]], linewidths=1.2)
    axis.set_xticks([])
    axis.set_yticks([])


def _plot(axis: Axes, row: Row) -> None:
    for number, (method, curve) in enumerate(row.curves.items()):
        axis.plot(np.arange(1, len(curve) + 1), curve, color=METHOD_COLOURS[number % len(METHOD_COLOURS)], label=method)
    axis.set_ylim(-0.02, 1)
    axis.set_xlabel("epoch", fontsize=7)
    axis.set_ylabel("pseudo Dice", fontsize=7)
    axis.tick_params(labelsize=6)
    axis.legend(loc="lower right", fontsize=6)
