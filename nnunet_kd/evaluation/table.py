"""Per-case rows of several datasets, methods and runs -> one table with intervals and paired tests.

How the numbers are made (our design): classes are averaged within a case; a case has one value per run (fold x seed) in
which it was tested; the value of a case is the mean over its runs. The mean, its interval and all comparisons are over
cases, so that repeated runs do not pass as more patients; the spread over runs is given beside it. A comparison takes
only the runs in which both methods have the case, so that it never sets one seed against another.

A class that is absent in reference and prediction has no value (NaN), as in nnU-Net, and is left out where no method
has one. Where some method of the table has predicted it, all the others were right to predict nothing and get the best
value, 1 (0 for distances and errors): else a false positive would only count in the mean of the method that makes it,
and never in a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.statistics import PairedComparison, bootstrap_interval, compare_paired, holm

COLUMNS = ("dataset", "method", "case")
TABLE_COLUMNS = [
    "dataset",
    "method",
    "num_cases",
    "num_runs",
    "mean",
    "low",
    "high",
    "sd_runs",
    "num_pairs",
    "num_paired_runs",
    "difference",
    "difference_low",
    "difference_high",
    "wins",
    "losses",
    "ties",
    "p_value",
    "p_holm",
    "note",
]


def summarize(
    rows: pd.DataFrame,
    control: str,
    *,
    metric: str = "dice",
    run_columns: Sequence[str] = ("fold", "seed"),
    higher_is_better: bool = True,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Summarise per-case rows, one line per dataset and method in the order of their first appearance.

    Args:
        rows: Columns ``dataset``, ``method``, ``case``, ``metric`` and, where there are several, ``class`` and
            ``run_columns``; one row per case, class and run. A NaN is a class that is neither in the reference nor in
            the prediction.
        control: The method that the others are compared with, on the cases and runs that both have.
        metric: The column to summarise.
        run_columns: Columns that together name a run; those that ``rows`` lacks are taken as constant.
        higher_is_better: True for scores, of which 1 is the best; False for distances and errors, of which 0 is.
        level: Coverage of the intervals.
        num_resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        Columns ``dataset``, ``method``, ``num_cases``, ``num_runs``, ``mean``, ``low``, ``high``, ``sd_runs``,
        ``num_pairs`` (cases), ``num_paired_runs``, ``difference``, ``difference_low``, ``difference_high``, ``wins``,
        ``losses``, ``ties``, ``p_value``, ``p_holm`` (corrected for all comparisons of the table) and ``note`` (why
        there is no p). The comparison is empty in the lines of the control and where a dataset has no control.

    Raises:
        NnUNetKDError: A column is missing, or no row belongs to the control.
    """
    missing = [column for column in (*COLUMNS, metric) if column not in rows]
    if missing:
        msg = f"The rows have no column '{missing[0]}'. They have: {', '.join(map(str, rows.columns))}."
        raise NnUNetKDError(msg)
    methods_given = rows["method"].unique()
    if control not in methods_given:
        msg = f"No row belongs to the control '{control}'. Methods: {', '.join(sorted(methods_given))}."
        raise NnUNetKDError(msg)
    runs = [column for column in run_columns if column in rows]
    rows = with_empty_predictions(rows, metric, best=1.0 if higher_is_better else 0.0)
    per_run = rows.groupby([*COLUMNS, *runs], sort=False, dropna=False)[metric].mean().dropna().reset_index()
    bootstrap: dict[str, Any] = {"level": level, "num_resamples": num_resamples, "seed": seed}
    lines = []
    for dataset, of_dataset in per_run.groupby("dataset", sort=False):
        methods = dict(iter(of_dataset.groupby("method", sort=False)))
        for method, own in methods.items():
            values = own.groupby("case")[metric].mean()
            interval = bootstrap_interval(values, **bootstrap)
            run_means = own.groupby(runs, dropna=False)[metric].mean() if runs else pd.Series([interval.value])
            line = {
                "dataset": dataset,
                "method": method,
                "num_cases": len(values),
                "num_runs": len(run_means),
                "mean": interval.value,
                "low": interval.low,
                "high": interval.high,
                "sd_runs": float(run_means.std(ddof=1)) if len(run_means) > 1 else math.nan,
                "note": "",
            }
            if method != control and control in methods:
                both = own.merge(methods[control], on=["case", *runs], suffixes=("", "_control"))
                pairs = both.groupby("case")[[metric, f"{metric}_control"]].mean()
                comparison = compare_paired(*pairs.to_numpy().T, higher_is_better=higher_is_better, **bootstrap)
                num_paired_runs = len(both[runs].drop_duplicates()) if runs else min(1, len(both))
                line |= _compared(comparison) | {"num_paired_runs": num_paired_runs}
            lines.append(line)
    counts = ("num_pairs", "num_paired_runs", "wins", "losses", "ties")
    table = pd.DataFrame(lines, columns=TABLE_COLUMNS).astype(dict.fromkeys(counts, "Int64"))
    table["p_holm"] = holm(table["p_value"].astype(float).tolist())
    return table


def with_empty_predictions(rows: pd.DataFrame, metric: str, best: float) -> pd.DataFrame:
    """The rows with ``best`` for NaN wherever any method has a value for the same dataset, case and class."""
    place = [column for column in ("dataset", "case", "class") if column in rows]
    somebody_predicted = rows.groupby(place, dropna=False)[metric].transform("count") > 0
    return rows.assign(**{metric: rows[metric].mask(rows[metric].isna() & somebody_predicted, best)})


def _compared(comparison: PairedComparison) -> dict[str, Any]:
    return {
        "num_pairs": comparison.num_pairs,
        "difference": comparison.difference.value,
        "difference_low": comparison.difference.low,
        "difference_high": comparison.difference.high,
        "wins": comparison.wins,
        "losses": comparison.losses,
        "ties": comparison.ties,
        "p_value": comparison.p_value,
        "note": comparison.reason,
    }


def to_cells(
    table: pd.DataFrame, *, metric: str = "Dice", level: float = 0.95, digits: int = 3
) -> tuple[list[str], list[list[str]]]:
    """The table of :func:`summarize` as texts: a header and a line per row."""
    percent = f"{100 * level:g}%"
    header = [
        "dataset",
        "method",
        "cases",
        f"{metric} [{percent} interval over cases]",
        "sd over runs",
        "pairs",
        "difference to control",
        "won/lost/tied",
        "p",
        "p (Holm)",
    ]
    has_runs = (table["num_runs"] > 1).any()
    body = []
    for _, line in table.iterrows():
        compared = not pd.isna(line["num_pairs"])
        in_runs = f" ({_runs(line['num_paired_runs'])})" if has_runs and compared else ""
        body.append(
            [
                str(line["dataset"]),
                str(line["method"]),
                str(line["num_cases"]),
                _with_interval(line["mean"], line["low"], line["high"], digits),
                _number(line["sd_runs"], digits) + (f" ({_runs(line['num_runs'])})" if line["num_runs"] > 1 else ""),
                f"{line['num_pairs']}{in_runs}" if compared else "",
                _with_interval(line["difference"], line["difference_low"], line["difference_high"], digits, sign=True)
                if compared
                else "",
                f"{line['wins']}/{line['losses']}/{line['ties']}" if compared else "",
                (_p_value(line["p_value"]) or line["note"]) if compared else "",
                _p_value(line["p_holm"]),
            ]
        )
    return header, body


def to_markdown(table: pd.DataFrame, *, metric: str = "Dice", level: float = 0.95, digits: int = 3) -> str:
    """The table of :func:`summarize` as Markdown, with aligned columns."""
    return markdown_table(*to_cells(table, metric=metric, level=level, digits=digits))


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Texts as Markdown, with aligned columns."""
    texts = [[cell.replace("|", "\\|") for cell in row] for row in [header, *body]]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    rows = [texts[0], ["-" * width for width in widths], *texts[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def write_table(table: pd.DataFrame, folder: Path, name: str = "table", *, metric: str = "Dice") -> tuple[Path, Path]:
    """Write ``<name>.md`` and ``<name>.csv`` (all columns, full precision) into ``folder``; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, comma_separated = folder / f"{name}.md", folder / f"{name}.csv"
    markdown.write_text(to_markdown(table, metric=metric) + "\n")
    table.to_csv(comma_separated, index=False)
    return markdown, comma_separated


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"


def _number(value: float, digits: int, sign: bool = False) -> str:
    # adding 0 makes an unsigned -0.0 a 0.0
    return "" if pd.isna(value) else f"{value:+.{digits}f}" if sign else f"{round(value, digits) + 0.0:.{digits}f}"


def _with_interval(value: float, low: float, high: float, digits: int, sign: bool = False) -> str:
    text = _number(value, digits, sign)
    return text if pd.isna(low) else f"{text} [{_number(low, digits, sign)}, {_number(high, digits, sign)}]"


def _p_value(value: float) -> str:
    if pd.isna(value):
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"
