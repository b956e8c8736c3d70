"""The figure of an adaptation: what the network makes of an image of each domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nnunet_kd.files import replacing

Panel = tuple[str, NDArray[np.float32], NDArray[np.int64] | None]
"""Title, image [*S], labels [*S] drawn over it."""


def draw_panels(file: Path, title: str, rows: Sequence[Sequence[Panel]]) -> None:
    """Write a PNG with one row of panels per domain; of volumes the middle slice.

    Args:
        file: Path of the figure; it is replaced.
        title: Of the figure.
        rows: All of the same length.
    """
    figure = Figure(figsize=(2.6 * len(rows[0]), 2.9 * len(rows) + 0.4), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for row, panels in zip(axes, rows, strict=True):
        # all panels of a row in the window of its first image, so that a change of intensities is seen
        low, high = np.percentile(_slice(panels[0][1]), (1, 99))
        for axis, (name, image, labels) in zip(row, panels, strict=True):
            axis.imshow(_slice(image), cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
            if labels is not None:
                drawn = np.ma.masked_equal(_slice(labels), 0)
                axis.imshow(drawn, cmap="autumn", alpha=0.4, interpolation="nearest", vmin=1)
            axis.set_title(name, fontsize=9)
            axis.set_axis_off()
    with replacing(file) as temporary:
        canvas.print_png(str(temporary))


def _slice(values: NDArray) -> NDArray:
    return values if values.ndim == 2 else values[len(values) // 2]
