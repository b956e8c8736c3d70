"""What the finished runs of a leaderboard say: values per case or run, costs, and all that is missing.

A run counts where nnU-Net has finished it and its record has the hash of the recipe; every other one is listed as a
problem and left out. Methods are compared on the runs (fold, seed) that both have, see ``evaluation/table.py`` and, for
classes and boxes, ``evaluation/paired_tasks.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.leaderboard.execute import known_costs
from nnunet_kd.leaderboard.metrics import METRICS, task_of
from nnunet_kd.leaderboard.plan import Job, Plan
from nnunet_kd.leaderboard.recipe import configurations_of
from nnunet_kd.leaderboard.record import State, changes, state_of
from nnunet_kd.leaderboard.runs import Evaluation, Run, test_of
from nnunet_kd.leaderboard.scores import case_scores

PLACE = ("dataset", "method", "fold", "seed")
NO_LEAK = "none"


@dataclass
class Collected:
    """The finished runs of a recipe.

    Attributes:
        plan: Of the recipe.
        problems: What is missing, half finished or does not fit, one line each.
        cases: A row per case, class and run with ``dataset``, ``method``, ``fold``, ``seed``, ``case``, ``class`` and
            the columns of the metrics of segmentation.
        task_runs: Runs with classes or boxes, by kind of metric (``paired_tasks.ScoredRun``).
        runs: A row per evaluated run: ``PLACE``, ``configuration``, ``folder``, ``scores``, ``leakage``, ``hash``.
        costs: A row per finished training, see :func:`cost_row`.
        num_planned: (dataset, method) to the number of runs that the recipe asks for.
    """

    plan: Plan
    problems: list[str] = field(default_factory=list)
    cases: pd.DataFrame = field(default_factory=pd.DataFrame)
    task_runs: dict[str, list[Any]] = field(default_factory=dict)
    runs: pd.DataFrame = field(default_factory=pd.DataFrame)
    costs: pd.DataFrame = field(default_factory=pd.DataFrame)
    num_planned: dict[tuple[str, str], int] = field(default_factory=dict)


def collect(plan: Plan) -> Collected:
    """Read all finished runs; what was not measured yet is measured now, once."""
    result = Collected(plan)
    jobs = {id(own): job for job in plan.jobs for own in (job.run, job.evaluation) if own is not None}
    records = _finished(plan, result.problems)
    result.costs = pd.DataFrame([cost_row(plan, run, records[run.name]) for run in plan.runs if run.name in records])
    parts: list[tuple[dict[str, Any], pd.DataFrame]] = []
    for evaluation in tqdm(plan.evaluations, "reading scores", disable=None):
        place = place_of(plan, evaluation)
        line = (place["dataset"], place["method"])
        result.num_planned[line] = result.num_planned.get(line, 0) + 1
        record = records.get(evaluation.run.name)
        if record is None:
            continue
        if evaluation.test and state_of(jobs[id(evaluation)], plan.out) is not State.FINISHED:
            result.problems.append(f"{_name(place)}: not predicted yet ({evaluation.predictions})")
            continue
        try:
            scores = case_scores(plan.recipe, evaluation, plan.out) if plan.has_segmentation(evaluation) else None
            task_runs = _task_runs(plan, evaluation, place)
        except NnUNetKDError as error:
            result.problems.append(f"{_name(place)}: {error}")
            continue
        cases = list(dict.fromkeys(scores["case"])) if scores is not None else []
        cases = cases or [case for runs in task_runs.values() for case in runs.cases]
        leaks = leakage(plan, evaluation, record.get("costs", {}), cases)
        scores_file = "" if scores is None else str(evaluation.scores_file)
        files = {"folder": str(evaluation.predictions), "scores": scores_file}
        more = {"configuration": evaluation.run.configuration, "leakage": leaks, "hash": evaluation.run.hash}
        parts.append(({**place, **files, **more, "cases": frozenset(cases)}, scores if scores is not None else _EMPTY))
        for kind, run in task_runs.items():
            result.task_runs.setdefault(kind, []).append(run)
    kept = _with_the_same_cases(plan, parts, result.problems)
    result.task_runs = {
        kind: [run for run in runs if (run.dataset, run.method, *run.run) in kept]
        for kind, runs in result.task_runs.items()
    }
    own = [(row, scores) for row, scores in parts if tuple(row[key] for key in PLACE) in kept]
    result.runs = pd.DataFrame([{key: value for key, value in row.items() if key != "cases"} for row, _ in own])
    frames = [scores.assign(**{key: row[key] for key in PLACE}) for row, scores in own if len(scores)]
    result.cases = pd.concat(frames, ignore_index=True) if frames else _EMPTY
    return result


_EMPTY = pd.DataFrame()


def place_of(plan: Plan, evaluation: Evaluation) -> dict[str, Any]:
    """Dataset and method as the table names them, fold and seed."""
    recipe, run = plan.recipe, evaluation.run
    dataset = recipe.datasets[evaluation.dataset].title or evaluation.dataset
    if evaluation.test:
        dataset += f", tested on {evaluation.test}"
    if len(configurations_of(recipe, evaluation.dataset)) > 1:
        dataset += f", {run.configuration}"
    return {"dataset": dataset, "method": method_title(plan, run.method), "fold": run.fold, "seed": run.seed}


def method_title(plan: Plan, method: str) -> str:
    """A method as the table names it."""
    return plan.recipe.methods[method].title or method


def leakage(plan: Plan, evaluation: Evaluation, costs: Mapping[str, Any], cases: list[str]) -> str:
    """What a run knew of the cases that it is tested on, ``NO_LEAK`` if nothing.

    A test folder is not compared: its cases may have names that training cases have, too.

    Args:
        plan: Of the recipe.
        evaluation: Of the run.
        costs: Of its record, which has what its checkpoint says of the cases that it and its teachers have seen.
        cases: That are tested.
    """
    test = test_of(plan.recipe, evaluation)
    if test is not None and test.dataset is None:
        return "not compared"
    if not costs.get("training_cases"):
        return "unknown"
    tested = plan.recipe.datasets[evaluation.dataset if test is None or test.dataset is None else test.dataset]
    seen = set(costs["training_cases"].get(tested.folder, ()))
    # semi-supervised training and adaptation may have seen images that are tested, but not their labels
    images = set(costs.get("unlabeled_cases", {}).get(tested.folder, ())) & seen
    leaked = (seen - images).intersection(cases)
    only_images = images.intersection(cases)
    if test is None:
        leaked |= {case for own in costs.get("leaked_cases", {}).values() for case in own}
    only_images -= leaked
    notes = [f"transductive: images of {len(only_images)} cases seen, without labels"] if only_images else []
    notes += [f"labels of {len(leaked)} cases seen"] if leaked else []
    return "; ".join(notes) or NO_LEAK


def cost_row(plan: Plan, run: Run, record: Mapping[str, Any]) -> dict[str, Any]:
    """Costs of a training.

    Returns:
        ``group``, ``method``, ``configuration``, ``fold``, ``seed``, ``device``, ``hours`` (of all devices together),
        ``seconds_per_step``, ``inference_seconds``, ``peak_memory_gb`` (host), ``peak_gpu_memory_gb``, ``parameters``,
        ``gflops`` and ``folder``. Hours are unknown where the number of devices changed on the way.
    """
    costs = record.get("costs", {})
    seconds, num_devices = costs.get("train_seconds"), record.get("num_gpus", 1)
    networks = list(costs.get("networks", {}).values())
    return {
        "group": _group_title(plan, run.group),
        "method": method_title(plan, run.method),
        "configuration": run.configuration,
        "fold": run.fold,
        "seed": run.seed,
        "device": costs.get("device"),
        "hours": None if seconds is None or num_devices is None else seconds * num_devices / 3600,
        "seconds_per_step": costs.get("seconds_per_step"),
        "inference_seconds": costs.get("inference_seconds"),
        "peak_memory_gb": record.get("peak_memory_gb"),
        "peak_gpu_memory_gb": costs.get("peak_gpu_memory_gb"),
        "parameters": max((own["parameters"] for own in networks), default=None),
        "gflops": max((own["gflops"] for own in networks), default=None),
        "folder": str(run.fold_folder),
    }


def _group_title(plan: Plan, group: str) -> str:
    if group in plan.recipe.datasets:
        return plan.recipe.datasets[group].title or group
    return f"joint: {', '.join(plan.recipe.joints[group].members)}"


def _finished(plan: Plan, problems: list[str]) -> dict[str, Mapping[str, Any]]:
    """Name of each finished run to its record."""
    records: dict[str, Mapping[str, Any]] = {}
    for job in plan.jobs:
        if job.run is None:
            continue
        try:
            state = state_of(job, plan.out)
            if state is State.FINISHED:
                records[job.run.name] = known_costs(job, plan)
            else:
                problems.append(_problem(job, plan, state))
        except NnUNetKDError as error:
            problems.append(f"{job.run.name}: {error}")
    return records


def _problem(job: Job, plan: Plan, state: State) -> str:
    run = job.run
    assert run is not None
    detail = f", {changes(job, plan.out)}" if state is State.OTHER else ""
    where = "" if state is State.MISSING else f" ({run.fold_folder}{detail})"
    return f"{run.name}: {state.value}{where}"


def _with_the_same_cases(
    plan: Plan, parts: list[tuple[dict[str, Any], pd.DataFrame]], problems: list[str]
) -> set[tuple[Any, ...]]:
    """The runs whose cases are those of the control in the same fold (of the first method where it is missing)."""
    expected: dict[tuple[str, int], frozenset[str]] = {}
    control = method_title(plan, plan.recipe.control)
    for row, _ in sorted(parts, key=lambda part: part[0]["method"] != control):
        expected.setdefault((row["dataset"], row["fold"]), row["cases"])
    kept = set()
    for row, _ in parts:
        wanted = expected[row["dataset"], row["fold"]]
        if row["cases"] == wanted:
            kept.add(tuple(row[key] for key in PLACE))
            continue
        others = sorted(row["cases"] ^ wanted)
        problems.append(
            f"{_name(row)}: its {len(row['cases'])} cases are not the {len(wanted)} of the other methods in this fold, "
            f"for example {', '.join(others[:3])} ({row['folder']})"
        )
    return kept


def _task_runs(plan: Plan, evaluation: Evaluation, place: Mapping[str, Any]) -> dict[str, Any]:
    """By kind of metric, what a run predicted for classes or boxes."""
    dataset = plan.recipe.datasets[evaluation.dataset]
    kinds = {METRICS[name].kind for name in plan.recipe.metrics if task_of(METRICS[name]) in dataset.tasks}
    kinds &= {"classification", "detection"}
    if not kinds:
        return {}
    from nnunet_kd.leaderboard.task_runs import scored_run

    return {kind: scored_run(plan, evaluation, place, kind) for kind in sorted(kinds)}


def _name(place: Mapping[str, Any]) -> str:
    return f"{place['dataset']}, {place['method']}, fold {place['fold']}, seed {place['seed']}"


def run_values(cases: pd.DataFrame, runs: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean over cases and classes of every run: the columns of ``runs``, ``value`` and ``num_cases``."""
    keys = list(PLACE)
    per_case = cases.groupby([*keys, "case"], sort=False)[column].mean().dropna().reset_index()
    values = per_case.groupby(keys, sort=False)[column].agg(value="mean", num_cases="size").reset_index()
    return values.merge(runs, on=keys)


def nan_if_none(values: pd.Series) -> pd.Series:
    """Numbers, NaN where nothing is known."""
    return pd.to_numeric(values, errors="coerce").astype(np.float64)
