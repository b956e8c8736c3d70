"""Write what was collected as Markdown, CSV, LaTeX and an HTML page, into ``OUT/table``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from nnunet_kd.evaluation.table import markdown_table
from nnunet_kd.files import replacing
from nnunet_kd.leaderboard.collect import PLACE, Collected, method_title
from nnunet_kd.leaderboard.figures import box_plots, critical_difference_diagram, png, scatter
from nnunet_kd.leaderboard.html import Page
from nnunet_kd.leaderboard.latex import latex_table
from nnunet_kd.leaderboard.tables import (
    MetricTable,
    all_rows,
    cost_cells,
    cost_table,
    metric_tables,
    reference_cells,
    reference_table,
    relative,
)

HOW = (
    "Classes are averaged within a case, a case has one value per run (fold and seed) and its value is the mean over "
    "runs. Means, 95% bootstrap intervals and differences are over cases, sd is over runs. A comparison takes the "
    "cases and runs that both methods have: Wilcoxon's signed-rank test, p corrected by Holm for all comparisons of "
    "the table. For classes and boxes a metric belongs to a run: intervals and p come from a bootstrap of patients, "
    "wins and losses count runs. Average ranks are over the datasets and test sets of the table, with Nemenyi's "
    "critical difference (Demsar 2006), which takes them as independent. Hours are those of one training without its "
    "teachers', which have lines of their own; a step's time is compared with the control's on the same dataset, fold "
    "and seed; memory is the process's, where the leaderboard started it."
)


def write_report(collected: Collected) -> Path:
    """Write all files and return their folder.

    ``leaderboard.md``, ``leaderboard.csv`` (full precision; rows of papers have a ``source``), ``leaderboard.tex``,
    ``index.html``, and ``runs.csv``: every run's value with the folders of its predictions and of its scores per case.
    """
    folder = collected.plan.out / "table"
    folder.mkdir(parents=True, exist_ok=True)
    tables, costs, reference = metric_tables(collected), cost_table(collected), reference_table(collected)
    _write(folder / "leaderboard.md", _markdown(collected, tables, costs, reference))
    _write(folder / "leaderboard.tex", _latex(tables, costs, reference))
    _write(folder / "leaderboard.csv", _csv(tables, costs, reference))
    runs = [own.runs.assign(metric=own.name) for own in tables]
    _write(folder / "runs.csv", pd.concat(runs).to_csv(index=False) if runs else "")
    _write(folder / "index.html", _page(collected, tables, costs, reference).render())
    return folder


def _write(file: Path, text: str) -> None:
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _title(collected: Collected) -> str:
    return collected.plan.recipe.title or collected.plan.recipe.name


def _missing(collected: Collected) -> str:
    return f"{len(collected.problems)} problems; these runs are not in the tables"


def _sources(reference: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(reference["source"]))


def _friedman(table: MetricTable) -> str:
    ranking = table.ranking
    if not ranking.critical_difference >= 0:
        return "Too few datasets or methods for a critical difference."
    p_value = "" if pd.isna(ranking.p_value) else f" Friedman's p {ranking.p_value:.3g}."
    return (
        f"Average ranks over the {ranking.num_datasets} datasets and test sets, critical difference "
        f"{ranking.critical_difference:.2f} (Nemenyi, 5%).{p_value}"
    )


def _markdown(collected: Collected, tables: Sequence[MetricTable], costs: pd.DataFrame, reference: pd.DataFrame) -> str:
    parts = [f"# {_title(collected)}", collected.plan.recipe.description.strip()]
    if collected.problems:
        parts += [f"**{_missing(collected)}:**", "\n".join(f"- {problem}" for problem in collected.problems)]
    for table in tables:
        parts += [f"## {table.metric.title}", markdown_table(*table.cells()), _friedman(table)]
    if len(costs):
        parts += ["## Costs", markdown_table(*cost_cells(costs))]
    if len(reference):
        sources = _sources(reference)
        parts += ["## Rows of papers", markdown_table(*reference_cells(reference, sources))]
        parts.append("\n".join(f"[{number}] {source}" for number, source in enumerate(sources, start=1)))
    parts += ["## How the numbers are made", HOW, "The folder of every run is in `runs.csv`."]
    return "\n\n".join(part for part in parts if part) + "\n"


def _latex(tables: Sequence[MetricTable], costs: pd.DataFrame, reference: pd.DataFrame) -> str:
    parts = [latex_table(*table.cells(), caption=table.metric.title) for table in tables]
    parts += [latex_table(*cost_cells(costs), caption="Costs")] if len(costs) else []
    if len(reference):
        sources = _sources(reference)
        numbered = "; ".join(f"[{number}] {source}" for number, source in enumerate(sources, start=1))
        parts.append(latex_table(*reference_cells(reference, sources), caption=f"Rows of papers: {numbered}"))
    return "% needs \\usepackage{booktabs,adjustbox}\n" + "\n".join(parts)


def _csv(tables: Sequence[MetricTable], costs: pd.DataFrame, reference: pd.DataFrame) -> str:
    rows = all_rows(tables, costs)
    published = reference.dropna(subset="value").rename(columns={"value": "mean"})
    if not len(published):
        return rows.to_csv(index=False)
    columns = list(dict.fromkeys([*rows.columns, *published.columns]))
    # as one table, counts would be no whole numbers
    parts = [own.reindex(columns=columns) for own in (rows, published)]
    return parts[0].to_csv(index=False) + parts[1].to_csv(index=False, header=False)


def _page(collected: Collected, tables: Sequence[MetricTable], costs: pd.DataFrame, reference: pd.DataFrame) -> Page:
    page = Page(_title(collected))
    page.paragraph(collected.plan.recipe.description.strip())
    if collected.problems:
        page.warning(_missing(collected), collected.problems)
    control = method_title(collected.plan, collected.plan.recipe.control)
    for table in tables:
        title, is_per_case = table.metric.title, table.metric.kind in ("segmentation", "resized_grid")
        page.section(title)
        page.table(*table.cells(), best=_best(table), best_column=3)
        page.paragraph(_friedman(table))
        unit = "case, mean over its runs" if is_per_case else "run"
        page.figure(png(box_plots(table.values, title)), f"{title}: one value per {unit}")
        against = scatter(table.values, control, title)
        if against is not None:
            page.figure(png(against), f"{title} of each {unit}: method against {control}")
        diagram = critical_difference_diagram(table.ranking)
        if diagram is not None:
            page.figure(png(diagram), f"{title}: average ranks; red bars join methods that do not differ significantly")
        _runs_table(page, table, collected.plan.out)
    if len(costs):
        page.section("Costs")
        page.table(*cost_cells(costs))
    if len(reference):
        sources = _sources(reference)
        page.section("Rows of papers")
        page.table(*reference_cells(reference, sources))
        for number, source in enumerate(sources, start=1):
            page.paragraph(f"[{number}] {source}")
    page.section("How the numbers are made")
    page.paragraph(HOW)
    return page


def _best(table: MetricTable) -> list[bool]:
    """Which lines are the best of their dataset."""
    groups = table.table.groupby("dataset")["mean"]
    best = groups.transform("max" if table.metric.higher_is_better else "min")
    return [bool(own) for own in table.table["mean"] == best]


def _runs_table(page: Page, table: MetricTable, out: Path) -> None:
    runs = table.runs.sort_values(["dataset", "method", "fold", "seed"], kind="stable")
    body, links = [], []
    for _, run in runs.iterrows():
        value = f"{run['value']:.{table.metric.digits + 1}f}"
        body.append([*(str(run[key]) for key in PLACE), value, str(run["num_cases"]), run["leakage"]])
        links.append([relative(own, out) for own in (run["folder"], run["scores"]) if own])
    header = [*PLACE, table.metric.title, "cases", "leakage", "predictions and scores"]
    page.table(header, body, links=links, summary=f"The {len(body)} runs behind this table")
