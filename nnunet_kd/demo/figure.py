"""One figure of the demo: per dataset an image with what every method says about it, and the learning curves.

Contours are segmentations; boxes are drawn where they cross the slice, the true ones dashed and the predicted ones with
their score; the class of the whole image stands above it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from nnunet_kd.evaluation.metrics import Label, Segmentation, dice

# Okabe and Ito's colours, which colour-blind readers can tell apart
CLASS_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00")
METHOD_COLOURS = ("#0072B2", "#7F7F7F", "#D55E00", "#009E73")
REFERENCE = "reference"
TRUE_BOX, PREDICTED_BOX = "#FFFFFF", "#F0E442"
# The operating threshold is the user's business; the highest scores show what a network believes in.
MAX_PREDICTED_BOXES = 2

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """What the figure shows of one dataset.

    ``image``, ``reference`` and ``predictions`` are [Z, Y, X] of one case, ``spacing_mm`` in the same order; without
    segmentations there are no ``classes`` and all labels are 0. ``curves`` holds the pseudo Dice per epoch.
    ``predictions`` and ``curves`` are keyed by method, and so are ``predicted_boxes`` ([N, 6] in array order, scores
    [N], falling). ``image_classes`` is a text per method and for ``REFERENCE``. Both are empty without such a task.
    """

    dataset: str
    case: str
    image: NDArray[Any]
    reference: Segmentation
    predictions: Mapping[str, Segmentation]
    spacing_mm: Sequence[float]
    classes: Mapping[str, Label]
    ignore_label: int | None
    curves: Mapping[str, Array]
    boxes: Array = field(default_factory=lambda: np.zeros((0, 6)))
    predicted_boxes: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    image_classes: Mapping[str, str] = field(default_factory=dict)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Write the figure; the file ending decides the format."""
    methods = list(rows[0].predictions)
    num_columns = len(methods) + 2
    figure = Figure(figsize=(2.4 * num_columns + 0.8, 2.5 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), num_columns, squeeze=False, width_ratios=[1.0] * (num_columns - 1) + [1.4])
    names = list(dict.fromkeys(name for row in rows for name in row.classes))
    colours = {name: CLASS_COLOURS[number % len(CLASS_COLOURS)] for number, name in enumerate(names)}
    titles: list[str] = [REFERENCE, *methods, "while training"]
    for number, (row, line) in enumerate(zip(rows, axes, strict=True)):
        index = best_slice(row)
        _show(line[0], row, index, row.reference, colours)
        for name in row.classes:
            line[0].plot([], [], color=colours[name], label=name)
        if row.classes:
            line[0].legend(loc="lower left", fontsize=6, framealpha=0.6, handlelength=1.2)
        line[0].set_ylabel(f"{row.dataset}\n{row.case}", fontsize=8)
        for axis, method in zip(line[1:], methods, strict=False):
            _show(axis, row, index, row.predictions[method], colours)
            scores = dice(row.reference, row.predictions[method], list(row.classes.values()), row.ignore_label)
            text = "\n".join(f"{name} {score:.2f}" for name, score in zip(row.classes, scores, strict=True))
            axis.text(0.03, 0.03, text, transform=axis.transAxes, color="white", fontsize=7)
            for rank, (box, score) in enumerate(zip(*row.predicted_boxes.get(method, ((), ())), strict=True)):
                _draw_box(axis, box, index, PREDICTED_BOX, "-")
                _write_score(axis, box, index, f"{score:.2f}", below=rank % 2 == 1)
        _plot(line[-1], row)
        for axis, title in zip(line, titles, strict=True):
            lines = [*([title] if number == 0 else []), row.image_classes.get(title, "")]
            axis.set_title("\n".join(filter(None, lines)), fontsize=10)
    figure.savefig(file, dpi=150)


def best_slice(row: Row) -> int:
    """The slice with most voxels of the smallest class that is present, else through the first box or the middle."""
    sizes = [np.isin(row.reference, label).sum(axis=(1, 2)) for label in row.classes.values()]
    present = [size for size in sizes if size.any()]
    if present:
        return int(min(present, key=np.sum).argmax())
    return int((row.boxes[0, 0] + row.boxes[0, 3]) / 2) if len(row.boxes) else row.reference.shape[0] // 2


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
    for box in row.boxes:
        _draw_box(axis, box, index, TRUE_BOX, "--")
    axis.set_xticks([])
    axis.set_yticks([])


def _crosses(box: Array, index: int) -> bool:
    return bool(box[0] < index + 0.5 < box[3])


def _draw_box(axis: Axes, box: Array, index: int, colour: str, style: str) -> None:
    """The outline of a box [6] in a slice that it crosses; imshow puts voxel edges at half numbers."""
    if _crosses(box, index):
        _, y0, x0, _, y1, x1 = (float(edge) for edge in box)
        outline = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linestyle=style)
        axis.add_patch(outline)


def _write_score(axis: Axes, box: Array, index: int, text: str, below: bool) -> None:
    """The score of a box beside it, so that those of two boxes around one object can be told apart."""
    if _crosses(box, index):
        place, alignment = (box[4], "top") if below else (box[1] - 1, "bottom")
        axis.text(box[2], place, text, color=PREDICTED_BOX, fontsize=7, verticalalignment=alignment, clip_on=True)


def _plot(axis: Axes, row: Row) -> None:
    for number, (method, curve) in enumerate(row.curves.items()):
        axis.plot(np.arange(1, len(curve) + 1), curve, color=METHOD_COLOURS[number % len(METHOD_COLOURS)], label=method)
    axis.set_ylim(-0.02, 1)
    axis.set_xlabel("epoch", fontsize=7)
    axis.set_ylabel("pseudo Dice", fontsize=7)
    axis.tick_params(labelsize=6)
    axis.legend(loc="lower right", fontsize=6)
