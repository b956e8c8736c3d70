from __future__ import annotations

import numpy as np
import pandas as pd

from nnunet_kd.evaluation.ranks import Ranking, rank_methods
from nnunet_kd.leaderboard.figures import box_plots, critical_difference_diagram, png, scatter
from nnunet_kd.leaderboard.html import Page
from nnunet_kd.leaderboard.latex import escape, latex_table


def values() -> pd.DataFrame:
    random = np.random.default_rng(0)
    rows = [(dataset, method, case) for dataset in "xyzw" for method in ("control", "student") for case in range(5)]
    table = pd.DataFrame(rows, columns=["dataset", "method", "unit"])
    return table.assign(value=random.uniform(0, 1, len(rows)))


def test_box_plots_have_a_panel_per_dataset_and_a_box_per_method() -> None:
    own = values()
    own = own[~((own["dataset"] == "w") & (own["method"] == "student"))]
    figure = box_plots(own, "Dice")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["x", "y", "z", "w"]
    medians = [line for line in figure.axes[0].lines if line.get_color() == "C1"]
    expected = own[own["dataset"] == "x"].groupby("method")["value"].median()
    assert sorted(line.get_ydata()[0] for line in medians) == sorted(expected)
    assert png(figure).startswith(b"\x89PNG")


def test_scatter_pairs_the_cases_with_the_control() -> None:
    own = values()
    figure = scatter(own, "control", "Dice")
    assert figure is not None
    wide = own[own["dataset"] == "y"].pivot(index="unit", columns="method", values="value")
    points = figure.axes[1].lines[0]
    assert np.allclose(points.get_xdata(), wide["control"])
    assert np.allclose(points.get_ydata(), wide["student"])
    assert scatter(own[own["method"] == "student"], "control", "Dice") is None


def test_the_diagram_joins_methods_that_do_not_differ() -> None:
    assert critical_difference_diagram(rank_methods(pd.DataFrame({"a": [1.0], "b": [2.0]}))) is None
    ranking = Ranking({"best": 1.2, "second": 1.9, "worst": 2.9}, 10, 1.05, 0.01)
    figure = critical_difference_diagram(ranking)
    assert figure is not None
    bars = [line for line in figure.axes[0].lines if line.get_color() == "tab:red"]
    assert [tuple(np.round(bar.get_xdata(), 2)) for bar in bars] == [(1.17, 1.93), (1.87, 2.93)]
    texts = {text.get_text().strip() for text in figure.axes[0].texts}
    assert {"best (1.20)", "worst (2.90)", "critical difference 1.05, 10 datasets"} <= texts


def test_pages_show_texts_as_they_are() -> None:
    page = Page("<Title>")
    page.section("A & B")
    page.table(["name"], [["<b>"], ["x"]], best=[False, True], links=[['a"b'], []])
    page.warning("one problem", ["x < y"])
    text = page.render()
    assert "<title>&lt;Title&gt;</title>" in text
    assert "<td>&lt;b&gt;</td>" in text
    assert '<td class="best">x</td>' in text
    assert 'href="a&quot;b"' in text
    assert "<li>x &lt; y</li>" in text
    assert '<a href="#section-0">A &amp; B</a>' in text


def test_latex_texts_hold_no_commands() -> None:
    assert escape("[1] a") == "{}[1] a"
    assert escape(r"50% a_b & {c} \d <0.001 ~^") == (
        r"50\% a\_b \& \{c\} \textbackslash{}d $<$0.001 \textasciitilde{}\textasciicircum{}"
    )
    table = latex_table(["dataset", "method", "Dice"], [["a", "b", "0.5"]], "A_B")
    assert r"\begin{tabular}{llc}" in table
    assert r"a & b & 0.5 \\" in table
    assert r"\caption{A\_B}" in table
