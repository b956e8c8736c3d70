from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nnunet_kd.leaderboard.collect import Collected, collect, leakage
from nnunet_kd.leaderboard.plan import Plan
from nnunet_kd.leaderboard.record import record_file, write_record
from nnunet_kd.leaderboard.report import write_report
from nnunet_kd.leaderboard.tables import all_rows, cost_table, metric_tables, reference_table
from nnunet_kd.leaderboard.yaml_lines import RecipeError

MakePlan = Callable[..., Plan]
Finish = Callable[..., None]
ONE_DATASET = (
    ("  a: {id: 1, name: Alpha, tests: {b: {dataset: b, cases: validation}}}", "  a: {id: 1, name: Alpha}"),
    ("seeds: [3]", "seeds: [3, 4]"),
)
NUM_CASES = {0: 10, 1: 5}  # folds of different length


def dice_of(method: str, dataset: str, fold: int, seed: int) -> dict[str, float]:
    random = np.random.default_rng([len(method), ord(dataset), fold, seed])
    level = {"control": 0.7, "student": 0.75}[method]
    return {f"{dataset}{fold}{index}": level + random.uniform(-0.1, 0.1) for index in range(NUM_CASES[fold])}


@pytest.fixture
def finished(make_small_plan: MakePlan, finish: Finish) -> Plan:
    """All runs of control and student on both datasets, two folds and two seeds."""
    plan = make_small_plan(*ONE_DATASET)
    for evaluation in plan.evaluations:
        run = evaluation.run
        step = {"control": 0.2, "student": 0.3}[run.method] * (1 + run.fold)
        costs = {"train_seconds": 1800.0 * (1 + run.seed), "seconds_per_step": step, "device": "cpu", "networks": {}}
        costs["networks"] = {run.group: {"parameters": 2_000_000, "gflops": 3.5}}
        finish(plan, evaluation, dice_of(run.method, run.group, run.fold, run.seed), costs)
    return plan


def without_teachers(collected: Collected) -> list[str]:
    """The problems but those of the teachers, which these tests do not finish."""
    return [problem for problem in collected.problems if not problem.startswith("both_teacher")]


def test_the_numbers_are_those_of_a_computation_by_hand(finished: Plan) -> None:
    collected = collect(finished)
    assert without_teachers(collected) == []
    dice, hd95 = metric_tables(collected)
    table = dice.table.set_index(["dataset", "method"])
    values = {}
    for method in ("control", "student"):
        # the value of a case is the mean over the seeds in which it was tested; a case is tested in one fold
        per_seed = [pd.Series(dice_of(method, "a", 0, seed) | dice_of(method, "a", 1, seed)) for seed in (3, 4)]
        values[method] = pd.concat(per_seed, axis=1).mean(axis=1)
        line = table.loc["a", method]
        assert line["num_cases"] == 15
        assert (line["num_runs"], line["num_planned"]) == (4, 4)
        assert line["mean"] == pytest.approx(values[method].mean())
        runs = [np.mean(list(dice_of(method, "a", fold, seed).values())) for fold in (0, 1) for seed in (3, 4)]
        assert line["sd_runs"] == pytest.approx(np.std(runs, ddof=1))
    difference = values["student"] - values["control"]
    line = table.loc["a", "student"]
    assert line["difference"] == pytest.approx(difference.mean())
    assert (line["wins"], line["losses"]) == (int((difference > 0).sum()), int((difference < 0).sum()))
    assert line["p_value"] == pytest.approx(stats.wilcoxon(difference).pvalue)
    p_values = sorted(table["p_value"].dropna())
    assert sorted(table["p_holm"].dropna()) == pytest.approx([2 * p_values[0], max(2 * p_values[0], p_values[1])])
    assert set(table["average_rank"]) == {1.0, 2.0}
    assert dice.ranking.num_datasets == 2
    # distances of this fixture are 10 (1 - dice): better is smaller
    other = hd95.table.set_index(["dataset", "method"])
    assert other.loc["a", "student"]["difference"] == pytest.approx(-10 * line["difference"])
    assert other.loc["a", "student"]["wins"] == line["wins"]


def test_costs(finished: Plan) -> None:
    table = cost_table(collect(finished)).set_index(["dataset", "method"])
    assert "GPU hours" not in table
    # 1800 (1 + seed) seconds, seeds 3 and 4
    assert table.loc["a", "control"]["CPU hours"] == pytest.approx(0.5 * (4 + 5) / 2)
    assert table.loc["a", "control"]["step_ratio"] == 1
    assert table.loc["a", "student"]["step_ratio"] == pytest.approx(1.5)
    assert table.loc["b", "student"]["parameters"] == 2_000_000


def test_lines_of_test_sets_and_of_single_configurations_have_their_costs() -> None:
    """Shown names: a dataset with two configurations has them in its name, one with one has not."""
    names = ["a", "b, 2d", "b, 3d"]
    costs = pd.DataFrame({"dataset": names, "method": "m", "num_runs": 1, "parameters": [1.0, 2.0, 3.0]})
    lines = pd.DataFrame({"dataset": ["a", "a, tested on b", "b, 3d", "b, tested on a, 2d", "c"], "method": "m"})
    rows = all_rows([SimpleNamespace(name="dice", table=lines)], costs)
    assert rows["dataset"].tolist() == lines["dataset"].tolist()
    assert rows["parameters"].tolist()[:4] == [1.0, 1.0, 3.0, 2.0]
    assert rows["parameters"].isna().tolist() == [False] * 4 + [True]


def test_missing_and_half_finished_runs_are_listed_and_left_out(finished: Plan) -> None:
    evaluation = next(own for own in finished.evaluations if own.run.name == "a_student_2d_f1_s4")
    (evaluation.predictions / "summary.json").unlink()
    gone = next(own.run for own in finished.evaluations if own.run.name == "b_control_2d_f0_s3")
    (gone.fold_folder / "checkpoint_final.pth").unlink()
    collected = collect(finished)
    assert set(without_teachers(collected)) == {
        f"a_student_2d_f1_s4: half finished ({evaluation.run.fold_folder})",
        "b_control_2d_f0_s3: missing",
    }
    table = metric_tables(collected)[0].table.set_index(["dataset", "method"])
    line = table.loc["a", "student"]
    assert (line["num_runs"], line["num_planned"], line["num_paired_runs"]) == (3, 4, 3)
    fold_0 = [np.mean([dice_of("student", "a", 0, seed)[f"a0{index}"] for seed in (3, 4)]) for index in range(10)]
    fold_1 = list(dice_of("student", "a", 1, 3).values())
    assert line["mean"] == pytest.approx(np.mean([*fold_0, *fold_1]))
    _, cells = metric_tables(collected)[0].cells()
    assert {tuple(line[:2]): line[-3] for line in cells}["a", "student"] == "3 of 4"


def test_a_run_with_other_cases_than_the_control_is_left_out(finished: Plan, finish: Finish) -> None:
    evaluation = next(own for own in finished.evaluations if own.run.name == "a_student_2d_f1_s4")
    finish(finished, evaluation, {f"a1{index}": 0.9 for index in range(4)})
    collected = collect(finished)
    (problem,) = without_teachers(collected)
    assert problem.startswith(
        "a, student, fold 1, seed 4: its 4 cases are not the 5 of the other methods in this fold, "
    )
    assert "a14" in problem
    assert len(metric_tables(collected)[0].runs) == 15


def test_runs_with_other_settings_are_listed(finished: Plan, make_small_plan: MakePlan) -> None:
    changed = make_small_plan(*ONE_DATASET, ("{num_epochs: 2}", "{num_epochs: 7}"))
    collected = collect(changed)
    assert len(without_teachers(collected)) == len(finished.evaluations)
    for problem in without_teachers(collected):
        assert "made with other settings" in problem
        assert "settings.training.num_epochs was 2, is 7" in problem
    assert metric_tables(collected) == []


def test_scores_are_read_from_the_cache_until_predictions_or_questions_change(
    finished: Plan, make_small_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no segmentations here: whatever is not in the cache is a problem."""
    monkeypatch.setenv("nnUNet_preprocessed", str(finished.out))
    assert without_teachers(collect(finished)) == []
    stricter = make_small_plan(*ONE_DATASET, ("b: {id: 2, name: Beta}", "b: {id: 2, name: Beta, tolerance_mm: 1}"))
    assert {problem.partition(",")[0] for problem in without_teachers(collect(stricter))} == {"b"}
    evaluation = finished.evaluations[0]
    summary = evaluation.predictions / "summary.json"
    summary.unlink()
    summary.write_text("predicted again")
    assert len(without_teachers(collect(finished))) == 1


def test_every_number_leads_to_its_run(finished: Plan) -> None:
    collected = collect(finished)
    folder = write_report(collected)
    with (folder / "runs.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "dice"]
    assert len(rows) == 16
    page = (folder / "index.html").read_text()
    for row in rows:
        assert Path(row["folder"]).is_dir()
        scores = pd.read_csv(row["scores"], comment="#")
        assert float(row["value"]) == pytest.approx(scores["dice"].mean())
        assert f'href="../{Path(row["folder"]).relative_to(finished.out)}"' in page
    assert "<title>A &amp; B</title>" in page
    assert page.count("data:image/png;base64") == 6  # boxes, scatter and critical difference of two metrics
    tex = (folder / "leaderboard.tex").read_text()
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 3
    assert r"95\% interval" in tex
    table = pd.read_csv(folder / "leaderboard.csv")
    assert set(table["metric"]) == {"dice", "hd95"}
    assert table["CPU hours"].notna().all()


def test_a_table_without_any_run_of_the_control_compares_nothing(finished: Plan) -> None:
    for evaluation in finished.evaluations:
        if evaluation.run.method == "control":
            (evaluation.run.fold_folder / "checkpoint_final.pth").unlink()
    table = metric_tables(collect(finished))[0].table
    assert table["p_value"].isna().all()
    assert table["difference"].isna().all()


def test_leaks_are_named(make_small_plan: MakePlan) -> None:
    plan = make_small_plan()
    own, other = (
        next(evaluation for evaluation in plan.evaluations if evaluation.dataset == "a" and evaluation.test == test)
        for test in ("", "b")
    )
    costs = {
        "training_cases": {"Dataset001_Alpha": ["a1", "a2", "a3", "a4"], "Dataset002_Beta": ["b1", "b2"]},
        "unlabeled_cases": {"Dataset001_Alpha": ["a1", "a2", "a3"]},
        "leaked_cases": {"joint": ["a1"]},
    }
    assert leakage(plan, own, costs, ["a1", "a2"]) == (
        "transductive: images of 1 cases seen, without labels; labels of 1 cases seen"
    )
    del costs["leaked_cases"]
    assert leakage(plan, own, costs, ["a1", "a2"]) == "transductive: images of 2 cases seen, without labels"
    assert leakage(plan, other, costs, ["b2", "b3"]) == "labels of 1 cases seen"
    assert leakage(plan, other, costs, ["b3"]) == "none"
    assert leakage(plan, own, {}, ["a1"]) == "unknown"
    folder = make_small_plan(("{dataset: b, cases: validation}", "{images: imagesTs, labels: labelsTs}"))
    test_folder = next(evaluation for evaluation in folder.evaluations if evaluation.test == "b")
    assert leakage(folder, test_folder, costs, ["a3"]) == "not compared"  # another case may have that name
    adapted = {
        "training_cases": {"Dataset002_Beta": ["b1", "b2", "b4"]},
        "unlabeled_cases": {"Dataset002_Beta": ["b2", "b4"]},
    }
    assert leakage(plan, other, adapted, ["b2", "b3", "b4"]) == (
        "transductive: images of 2 cases seen, without labels"
    )


def test_predictions_that_are_missing_are_listed(make_small_plan: MakePlan, finish: Finish) -> None:
    plan = make_small_plan()
    evaluation = next(own for own in plan.evaluations if own.run.name == "a_control_2d_f0_s3" and not own.test)
    finish(plan, evaluation, dice_of("control", "a", 0, 3))
    problems = collect(plan).problems
    assert any(problem.startswith("a, tested on b, control, fold 0, seed 3: not predicted yet") for problem in problems)


def test_a_broken_record_is_a_problem_of_its_run_alone(finished: Plan) -> None:
    run = finished.evaluations[0].run
    (run.fold_folder / "leaderboard.json").write_text("{")
    collected = collect(finished)
    assert sum(run.name in problem for problem in collected.problems) == 1
    assert len(metric_tables(collected)[0].runs) == 15


def test_rows_of_papers(make_small_plan: MakePlan, recipe_text: str) -> None:
    reference = """
reference:
  - source: Doe 2020, table 3
    datasets: [a, b]
    metrics: [dice, hd95]
    rows: {Doe: [[0.9, 3.5], null]}
"""
    collected = collect(make_small_plan(text=recipe_text + reference))
    table = reference_table(collected)
    assert table["value"].tolist()[:2] == [0.9, 3.5]
    assert table["value"].isna().tolist() == [False, False, True, True]
    folder = write_report(collected)
    text = (folder / "leaderboard.md").read_text()
    assert "[1] Doe 2020, table 3" in text
    assert r"\caption{Rows of papers: [1] Doe 2020, table 3}" in (folder / "leaderboard.tex").read_text()
    rows = pd.read_csv(folder / "leaderboard.csv")[["metric", "method", "mean", "source"]].to_numpy().tolist()
    assert rows == [["dice", "Doe", 0.9, "Doe 2020, table 3"], ["hd95", "Doe", 3.5, "Doe 2020, table 3"]]
    assert "- a_control_2d_f0_s3: missing" in text
    with pytest.raises(RecipeError, match="lacks 'source'"):
        make_small_plan(text=recipe_text + reference.replace("source: Doe 2020, table 3\n    ", ""))


def test_records_keep_what_they_know(make_small_plan: MakePlan) -> None:
    plan = make_small_plan()
    job = next(job for job in plan.jobs if job.run is not None)
    file = record_file(job, plan.out)
    write_record(file, job, costs={"train_seconds": 5.0})
    write_record(file, job, finished=True)
    assert '"train_seconds": 5.0' in file.read_text()


def test_a_class_that_only_the_control_predicted_counts_alike_in_table_and_runs(
    make_small_plan: MakePlan, finish: Finish
) -> None:
    """Where the student was right to predict nothing it has 1, also in the list of runs and in the figures."""
    plan = make_small_plan(("folds: [0, 1]", "folds: [0]"))
    for evaluation in plan.evaluations:
        if evaluation.dataset == "a" and not evaluation.test and evaluation.run.method in ("control", "student"):
            absent = float("nan") if evaluation.run.method == "student" else 0.0
            finish(plan, evaluation, {"a1": absent, "a2": 0.8})
    (table,) = [own for own in metric_tables(collect(plan)) if own.name == "dice"]
    line = table.table[table.table["method"] == "student"].iloc[0]
    run = table.runs[table.runs["method"] == "student"].iloc[0]
    assert (line["mean"], run["value"]) == (pytest.approx(0.9), pytest.approx(0.9))
    shown = table.values[table.values["method"] == "student"].set_index("unit")["value"]
    assert shown["a1"] == 1.0


def test_the_table_hides_no_leak_behind_what_is_unknown(finished: Plan) -> None:
    control = [run for run in finished.runs if run.method == "control" and run.group == "a"]
    seen = {control[0].name: {}, control[1].name: {"Dataset001_Alpha": ["a00", "a01"]}}
    for job in finished.jobs:
        if job.run is not None and job.run.group == "a":
            cases = seen.get(job.run.name, {"Dataset001_Alpha": ["x"]})
            write_record(record_file(job, finished.out), job, costs={"training_cases": cases})
    table = metric_tables(collect(finished))[0].table.set_index(["dataset", "method"])
    assert table.loc[("a", "control"), "leakage"] == "2 of 4 runs: unknown / labels of 2 cases seen"
    assert table.loc[("a", "student"), "leakage"] == "none"
