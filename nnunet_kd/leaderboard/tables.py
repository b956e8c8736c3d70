"""Tables of a leaderboard: one per metric, the costs, the rows of papers, and the runs behind every number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_kd.evaluation.ranks import Ranking, rank_methods
from nnunet_kd.evaluation.table import summarize, to_cells, with_empty_predictions
from nnunet_kd.leaderboard.collect import NO_LEAK, PLACE, Collected, method_title, nan_if_none, run_values
from nnunet_kd.leaderboard.metrics import METRICS, Metric
from nnunet_kd.leaderboard.plan import TASK_FILES

HOURS = {"cuda": "GPU hours", "cpu": "CPU hours", "mps": "MPS hours"}


@dataclass(frozen=True)
class MetricTable:
    """One metric.

    Attributes:
        name: As in the recipe.
        metric: What it is.
        table: As ``evaluation.table.summarize`` has it, with ``num_planned``, ``average_rank`` and ``leakage``.
        runs: A row per run with ``value``, ``num_cases``, ``folder`` and ``scores`` (of classes and boxes, what was
            predicted of every case).
        values: A row per case and method (per run for classes and boxes): ``dataset``, ``method``, ``unit``, ``value``.
        ranking: Over the datasets.
    """

    name: str
    metric: Metric
    table: pd.DataFrame
    runs: pd.DataFrame
    values: pd.DataFrame
    ranking: Ranking

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Texts."""
        header, body = to_cells(self.table, metric=self.metric.title, digits=self.metric.digits)
        for cells, (_, line) in zip(body, self.table.iterrows(), strict=True):
            rank = line["average_rank"]
            runs = f"{line['num_runs']} of {line['num_planned']}"
            cells += [runs, "" if pd.isna(rank) else f"{rank:.2f}", line["leakage"]]
        return [*header, "runs", "average rank", "leakage"], body


def metric_tables(collected: Collected) -> list[MetricTable]:
    """The tables of all metrics of the recipe that finished runs have values for."""
    from_tasks: dict[str, dict[str, tuple[pd.DataFrame, pd.DataFrame]]] = {}
    tables = []
    control = method_title(collected.plan, collected.plan.recipe.control)
    for name in collected.plan.recipe.metrics:
        metric = METRICS[name]
        if metric.kind in ("classification", "detection"):
            if metric.kind not in from_tasks:
                from_tasks[metric.kind] = _task_tables(collected, metric.kind, control)
            found = from_tasks[metric.kind].get(metric.column)
            if found is None:
                continue
            table, runs = found
            values = runs.assign(unit=[f"fold {run.fold}, seed {run.seed}" for run in runs.itertuples()])
        else:
            rows = collected.cases
            if not len(rows) or metric.column not in rows or not rows[metric.column].notna().any():
                continue
            shown = control if control in rows["method"].unique() else rows["method"].iloc[0]
            best = 1.0 if metric.higher_is_better else 0.0
            rows = with_empty_predictions(rows, metric.column, best)  # also in runs and figures
            table = summarize(rows, shown, metric=metric.column, higher_is_better=metric.higher_is_better)
            if shown != control:
                table = _without_comparison(table)
            runs = run_values(rows, collected.runs, metric.column)
            per_case = rows.groupby([*PLACE, "case"], sort=False)[metric.column].mean().dropna()
            values = per_case.groupby(["dataset", "method", "case"], sort=False).mean().rename("value").reset_index()
            values = values.rename(columns={"case": "unit"})
        ranking = _ranking(table, metric)
        table = table.assign(
            num_planned=[collected.num_planned[line.dataset, line.method] for line in table.itertuples()],
            average_rank=[ranking.average.get(line.method, math.nan) for line in table.itertuples()],
            leakage=[_leakage(collected.runs, line.dataset, line.method) for line in table.itertuples()],
        )
        tables.append(MetricTable(name, metric, table, runs, values[["dataset", "method", "unit", "value"]], ranking))
    return tables


def _without_comparison(table: pd.DataFrame) -> pd.DataFrame:
    """The table without the columns of a control that no finished run belongs to."""
    columns = [
        "num_pairs",
        "num_paired_runs",
        "difference",
        "difference_low",
        "difference_high",
        "wins",
        "losses",
        "ties",
    ]
    return table.assign(
        **dict.fromkeys([*columns, "p_value", "p_holm"], pd.NA), note="no run of the control is finished"
    )


def _task_tables(collected: Collected, kind: str, control: str) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Metric of classes or boxes to its table and its runs."""
    scored = collected.task_runs.get(kind, [])
    if not scored:
        return {}
    from nnunet_kd.evaluation.paired_tasks import summarize_runs

    shown = control if control in {run.method for run in scored} else scored[0].method
    tables = summarize_runs(scored, shown)
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in scored:
        for metric, value in run.scoring(np.ones((1, len(run.cases)))).items():
            place = dict(zip(PLACE, (run.dataset, run.method, *run.run), strict=True))
            runs.setdefault(metric, []).append({**place, "value": float(value[0]), "num_cases": len(run.cases)})
    files = [str(Path(folder) / TASK_FILES[kind]) for folder in collected.runs["folder"]]
    places = collected.runs.assign(scores=files)
    return {
        metric: (
            table if shown == control else _without_comparison(table),
            pd.DataFrame(runs[metric]).merge(places, on=list(PLACE)),
        )
        for metric, table in tables.items()
    }


def _ranking(table: pd.DataFrame, metric: Metric) -> Ranking:
    """Of the methods that are in every dataset of the table."""
    values = table.pivot(index="dataset", columns="method", values="mean").astype(float)
    everywhere = values.columns[values.notna().all()]
    return rank_methods(values[list(everywhere)], higher_is_better=metric.higher_is_better)


def _leakage(runs: pd.DataFrame, dataset: str, method: str) -> str:
    own = runs[(runs["dataset"] == dataset) & (runs["method"] == method)]
    notes = [note for note in own["leakage"] if note != NO_LEAK]
    if not notes:
        return NO_LEAK
    return f"{len(notes)} of {len(own)} runs: {' / '.join(dict.fromkeys(notes))}"


def cost_table(collected: Collected) -> pd.DataFrame:
    """Costs per dataset and method, means over runs.

    Returns:
        Columns ``dataset``, ``method``, ``num_runs``, ``parameters``, ``gflops`` (of one patch), a column per kind of
        device ("GPU hours": per training, all its devices together), ``step_ratio`` (time of a training step, over the
        control's on the same dataset, fold and seed), ``inference_seconds`` (per case), ``peak_memory_gb`` (of a
        process on the host) and ``peak_gpu_memory_gb`` (of tensors, where our trainers trained on CUDA).
    """
    costs = collected.costs
    if not len(costs):
        return pd.DataFrame()
    control = method_title(collected.plan, collected.plan.recipe.control)
    place = ["group", "configuration", "fold", "seed"]
    steps = costs[costs["method"] == control].set_index(place)["seconds_per_step"]
    own = nan_if_none(costs["seconds_per_step"])
    control_steps = nan_if_none(steps.reindex(pd.MultiIndex.from_frame(costs[place])))
    costs = costs.assign(step_ratio=own.to_numpy() / control_steps.to_numpy())
    columns = []
    for device in dict.fromkeys(costs["device"].dropna()):
        name = HOURS.get(device, f"{device} hours")
        costs[name] = nan_if_none(costs["hours"]).where(costs["device"] == device)
        columns.append(name)
    numbers = ["parameters", "gflops", *columns, "step_ratio", "inference_seconds", "peak_memory_gb"]
    numbers += ["peak_gpu_memory_gb"] if costs["peak_gpu_memory_gb"].notna().any() else []
    costs = costs.assign(**{name: nan_if_none(costs[name]) for name in numbers})
    grouped = costs.groupby(["group", "configuration", "method"], sort=False)
    table = grouped[numbers].mean().assign(num_runs=grouped.size()).reset_index()
    several = table.groupby("group")["configuration"].transform("nunique") > 1  # as the lines of the table are named
    table["group"] = table["group"].where(~several, table["group"] + ", " + table["configuration"])
    table = table.rename(columns={"group": "dataset"})
    return table[["dataset", "method", "num_runs", *numbers]]


def cost_cells(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Texts of :func:`cost_table`."""
    titles = {
        "num_runs": "runs",
        "parameters": "parameters (M)",
        "gflops": "GFLOPs per patch",
        "step_ratio": "step time / control's",
        "inference_seconds": "inference (s per case)",
        "peak_memory_gb": "peak host memory (GB)",
        "peak_gpu_memory_gb": "peak GPU memory (GB)",
    }
    header = [titles.get(name, name) for name in table.columns]
    body = []
    for _, line in table.iterrows():
        cells = []
        for name, value in line.items():
            if isinstance(value, str) or name == "num_runs":
                cells.append(str(value))
            elif pd.isna(value):
                cells.append("")
            else:
                cells.append(f"{value / 1e6:.3g}" if name == "parameters" else f"{value:.3g}")
        body.append(cells)
    return header, body


def reference_table(collected: Collected) -> pd.DataFrame:
    """Rows of papers: ``metric``, ``dataset``, ``method``, ``value``, ``source``."""
    recipe = collected.plan.recipe
    rows = [
        {
            "metric": metric,
            "dataset": recipe.datasets[dataset].title or dataset,
            "method": method,
            "value": value,
            "source": reference.source,
        }
        for reference in recipe.reference
        for method, row in reference.rows.items()
        for dataset, cell in zip(reference.datasets, row, strict=True)
        for metric, value in zip(reference.metrics, cell or [None] * len(reference.metrics), strict=True)
    ]
    return pd.DataFrame(rows, columns=["metric", "dataset", "method", "value", "source"])


def reference_cells(table: pd.DataFrame, sources: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Texts: a line per method and source, a column per dataset and metric."""
    pairs = list(dict.fromkeys(zip(table["dataset"], table["metric"], strict=True)))
    header = ["method", *(f"{dataset}: {METRICS[metric].title}" for dataset, metric in pairs), "source"]
    body = []
    for (method, source), own in table.groupby(["method", "source"], sort=False):
        values: Mapping[Any, Any] = own.set_index(["dataset", "metric"])["value"].to_dict()
        cells = [values.get(pair) for pair in pairs]
        texts = ["" if value is None or pd.isna(value) else f"{value:g}" for value in cells]
        body.append([str(method), *texts, f"[{sources.index(str(source)) + 1}]"])
    return header, body


def all_rows(tables: Sequence[MetricTable], costs: pd.DataFrame) -> pd.DataFrame:
    """Every metric's table with a column ``metric``, full precision, and the costs of the same dataset and method.

    A line of a test set has the costs of the training; those of a joint teacher belong to none of its heads alone.
    """
    if not tables:
        return costs
    rows = pd.concat([own.table.assign(metric=own.name) for own in tables], ignore_index=True)
    rows = rows[["metric", *(name for name in rows.columns if name != "metric")]]
    if not len(costs):
        return rows
    trained = rows["dataset"].str.replace(r", tested on [^,]+", "", regex=True)
    costs = costs.drop(columns="num_runs").rename(columns={"dataset": "trained"})
    return rows.assign(trained=trained).merge(costs, on=["trained", "method"], how="left").drop(columns="trained")


def relative(folder: str, out: Path) -> str:
    """A folder as the pages of ``OUT/table`` name it."""
    path = Path(folder)
    return f"../{path.relative_to(out).as_posix()}" if path.is_relative_to(out) else str(path)
