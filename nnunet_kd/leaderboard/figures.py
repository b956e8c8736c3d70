"""Figures of a leaderboard, made from its tables."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_kd.evaluation.ranks import Ranking, groups_alike

COLUMNS = 3
PANEL_INCHES = (3.6, 3.0)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def box_plots(values: pd.DataFrame, title: str) -> Figure:
    """A panel per dataset with a box per method; ``values`` as in ``tables.MetricTable``."""
    datasets, methods = list(dict.fromkeys(values["dataset"])), list(dict.fromkeys(values["method"]))
    figure, panels = _panels(len(datasets), extra_height=0.06 * max(map(len, methods)))
    of = {name: own["value"].to_numpy() for name, own in values.groupby(["dataset", "method"], sort=False)}
    for panel, dataset in zip(panels, datasets, strict=True):
        present = [method for method in methods if (dataset, method) in of]
        panel.boxplot([of[dataset, method] for method in present], widths=0.6, flierprops={"markersize": 3})
        panel.set_xticks(range(1, len(present) + 1), present, rotation=40, ha="right", fontsize=8)
        panel.set_title(dataset, fontsize=9)
        panel.grid(axis="y", alpha=0.3)
    figure.supylabel(title, fontsize=9)
    return figure


def scatter(values: pd.DataFrame, control: str, title: str) -> Figure | None:
    """A panel per dataset: every case under each method (vertical) against the control; None without pairs."""
    wide = values.pivot(index=["dataset", "unit"], columns="method", values="value")
    methods = [method for method in dict.fromkeys(values["method"]) if method != control]
    if control not in wide or not methods:
        return None
    pairs = {name: own.droplevel("dataset") for name, own in wide.groupby(level="dataset", sort=False)}
    pairs = {name: own for name, own in pairs.items() if own[control].notna().any()}
    if not pairs:
        return None
    figure, panels = _panels(len(pairs))
    colours = colormaps["tab10"]
    for panel, (dataset, own) in zip(panels, pairs.items(), strict=True):
        for index, method in enumerate(methods):
            panel.scatter(
                own[control], own[method], s=8, alpha=0.6, color=colours(index % 10), label=method, linewidths=0
            )
        finite = own.to_numpy(dtype=float)
        low, high = np.nanmin(finite), np.nanmax(finite)
        panel.plot([low, high], [low, high], color="0.5", linewidth=0.8)
        panel.set_title(dataset, fontsize=9)
        panel.tick_params(labelsize=7)
    panels[0].legend(fontsize=6, loc="best", markerscale=1.5)
    figure.supxlabel(f"{title}, {control}", fontsize=9)
    figure.supylabel(f"{title}, method", fontsize=9)
    return figure


def critical_difference_diagram(ranking: Ranking) -> Figure | None:
    """Average ranks on a line, and bars over methods that do not differ significantly; None with too few of them.

    Source: Demsar, JMLR 7 (2006), figure 1.
    """
    if math.isnan(ranking.critical_difference):
        return None
    names, count = list(ranking.average), len(ranking.average)
    left, right = names[: (count + 1) // 2], names[(count + 1) // 2 :]
    groups = groups_alike(ranking.average, ranking.critical_difference)
    figure = Figure(figsize=(7.0, 1.3 + 0.24 * len(left) + 0.14 * len(groups)), layout="constrained")
    axes = figure.subplots()
    lowest = 0.5 + 0.35 * len(groups)
    axes.plot([1, count], [0, 0], color="black", linewidth=1)
    for tick in range(1, count + 1):
        axes.plot([tick, tick], [0, -0.12], color="black", linewidth=1)
        axes.text(tick, -0.2, str(tick), ha="center", va="bottom", fontsize=8)
    for side, own, edge in (("right", left, 1 - 0.05 * count), ("left", right[::-1], 1.05 * count)):
        for index, name in enumerate(own):
            height = lowest + 0.5 * index
            rank = ranking.average[name]
            axes.plot([rank, rank, edge], [0, height, height], color="0.3", linewidth=0.8)
            axes.text(edge, height, f" {name} ({rank:.2f}) ", ha=side, va="center", fontsize=8)
    for index, group in enumerate(groups):
        ends = [ranking.average[group[0]] - 0.03, ranking.average[group[-1]] + 0.03]
        axes.plot(ends, [0.25 + 0.35 * index] * 2, color="tab:red", linewidth=3, solid_capstyle="butt")
    axes.plot([1, 1 + ranking.critical_difference], [-0.75, -0.75], color="black", linewidth=2)
    axes.text(
        1,
        -0.85,
        f"critical difference {ranking.critical_difference:.2f}, {ranking.num_datasets} datasets",
        ha="left",
        va="bottom",
        fontsize=8,
    )
    margin = 0.45 * count
    axes.set_xlim(1 - margin, max(count, 1 + ranking.critical_difference) + margin)
    axes.set_ylim(lowest + 0.5 * max(len(left), len(right)), -1.3)
    axes.axis("off")
    return figure


def _panels(count: int, extra_height: float = 0.0) -> tuple[Figure, Sequence[Axes]]:
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns, (height + extra_height) * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for panel in panels[count:]:
        panel.axis("off")
    return figure, panels[:count]
