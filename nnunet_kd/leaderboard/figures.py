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
from matplotlib.ticker import MaxNLocator

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
    figure, panels = _panels(datasets, space_below=0.3 + 0.055 * max(map(len, methods)))
    of = {name: own["value"].to_numpy() for name, own in values.groupby(["dataset", "method"], sort=False)}
    positions = range(1, len(methods) + 1)
    for index, (panel, dataset) in enumerate(zip(panels, datasets, strict=True)):
        own = [of.get((dataset, method), []) for method in methods]
        panel.boxplot(own, positions=positions, widths=0.6, flierprops={"markersize": 3}, manage_ticks=False)
        is_lowest = index + COLUMNS >= len(datasets)
        panel.set_xticks(positions, methods if is_lowest else [""] * len(methods), rotation=40, ha="right", fontsize=8)
        panel.grid(axis="y", alpha=0.3)
    figure.supylabel(title, fontsize=9)
    return figure


def scatter(values: pd.DataFrame, control: str, title: str) -> Figure | None:
    """A panel per dataset: every case under each method (vertical) against the control; None without pairs."""
    wide = values.pivot(index=["dataset", "unit"], columns="method", values="value")
    methods = [method for method in dict.fromkeys(values["method"]) if method != control]
    if control not in wide or not methods:
        return None
    datasets = [str(name) for name in dict.fromkeys(values["dataset"])]
    pairs = {name: wide.loc[name] for name in datasets if wide.loc[name][control].notna().any()}
    if not pairs:
        return None
    figure, panels = _panels(list(pairs), space_below=0.5)
    colours = colormaps["tab10"]
    for panel, own in zip(panels, pairs.values(), strict=True):
        for index, method in enumerate(methods):
            panel.plot(own[control], own[method], ".", markersize=4, alpha=0.6, color=colours(index % 10), label=method)
        finite = own.to_numpy(dtype=float)
        low, high = np.nanmin(finite), np.nanmax(finite)
        panel.plot([low, high], [low, high], color="0.5", linewidth=0.8)
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


def _panels(titles: Sequence[str], space_below: float) -> tuple[Figure, Sequence[Axes]]:
    """Axes with titles in rows of ``COLUMNS``, ``space_below`` inches above the lower edge of the figure.

    Margins are set here: laying them out by what the axes hold takes longer than all else.
    """
    columns = min(len(titles), COLUMNS)
    rows = math.ceil(len(titles) / columns)
    width, height = PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + space_below
    figure = Figure(figsize=(width, height))
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    left, top = 0.75 / width, 1 - 0.35 / height
    figure.subplots_adjust(left, space_below / height, 1 - 0.15 / width, top, wspace=0.22, hspace=0.28)
    for panel, title in zip(panels, titles, strict=False):
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.yaxis.set_major_locator(MaxNLocator(5))
        panel.xaxis.set_major_locator(MaxNLocator(5))
    for panel in panels[len(titles) :]:
        panel.axis("off")
    return figure, panels[: len(titles)]
