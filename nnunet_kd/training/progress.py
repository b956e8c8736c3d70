"""More curves in ``progress.png``: a panel below those of stock nnU-Net."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

DOTS_PER_INCH = 100
PANEL_HEIGHT_INCHES = 14


def append_curves(progress_png: Path, title: str, values: Mapping[str, Sequence[float]], dotted: str = "") -> None:
    """Append a panel with one line per name.

    Args:
        progress_png: The figure that stock nnU-Net has just written.
        title: Label of the panel's axis.
        values: Name to one value per epoch.
        dotted: Names that do not end so are drawn dotted.
    """
    with Image.open(progress_png) as file:
        stock = file.convert("RGB")
    figure = Figure(figsize=(stock.width / DOTS_PER_INCH, PANEL_HEIGHT_INCHES), dpi=DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, series in values.items():
        style = "-" if name.endswith(dotted) else "dotted"
        axes.plot(range(len(series)), series, ls=style, label=name, linewidth=4)
    axes.set_xlabel("epoch", fontsize=30)
    axes.set_ylabel(title, fontsize=30)
    axes.tick_params(labelsize=24)
    axes.legend(fontsize=24)
    canvas.draw()
    panel = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    joined = Image.new("RGB", (stock.width, stock.height + panel.height), "white")
    joined.paste(stock, (0, 0))
    joined.paste(panel, (0, stock.height))
    joined.save(progress_png, compress_level=1)  # the default takes seconds for figures of this size
