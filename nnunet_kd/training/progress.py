"""The loss terms in ``progress.png``: one more panel below those of stock nnU-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DOTS_PER_INCH = 100
PANEL_HEIGHT_INCHES = 14


def append_terms(progress_png: Path, values: Mapping[str, Sequence[float]]) -> None:
    """Append a panel with one line per term and epoch; raw values dotted, weighted ones solid.

    Args:
        progress_png: The figure that stock nnU-Net has just written.
        values: Name to one value per epoch; names that end in `` weighted`` are drawn solid.
    """
    stock = image.imread(progress_png)
    figure = Figure(figsize=(stock.shape[1] / DOTS_PER_INCH, PANEL_HEIGHT_INCHES), dpi=DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, series in values.items():
        style = "-" if name.endswith(" weighted") else "dotted"
        axes.plot(range(len(series)), series, ls=style, label=name, linewidth=4)
    axes.set_xlabel("epoch", fontsize=30)
    axes.set_ylabel("distillation terms", fontsize=30)
    axes.tick_params(labelsize=24)
    axes.legend(fontsize=24)
    canvas.draw()
    panel = np.asarray(canvas.buffer_rgba(), dtype=np.float32)[..., : stock.shape[2]] / 255
    image.imsave(progress_png, np.concatenate([stock, panel[:, : stock.shape[1]]]))
