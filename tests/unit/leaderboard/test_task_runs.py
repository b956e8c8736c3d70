"""Classes and boxes: the numbers of runs, and their way into the table."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from nnunet_kd.leaderboard.collect import collect
from nnunet_kd.leaderboard.plan import Plan
from nnunet_kd.leaderboard.record import record_file, write_record
from nnunet_kd.leaderboard.tables import metric_tables

TEXT = """\
name: tasks
datasets:
  a: {id: 1, name: Alpha, tasks: [classification, detection]}
configurations: [2d]
folds: [0, 1]
methods:
  control: {trainer: nnUNetTrainerKDControl}
  student: {trainer: nnUNetTrainerKDControl, settings: {training: {loss: ce}}}
control: control
metrics: [auroc, "ap@0.5"]
"""
CASES = [f"c{index:02d}" for index in range(20)]
LABELS = {case: ("benign", "malignant")[index % 2] for index, case in enumerate(CASES)}
BOXES = {case: [{"label": "nodule", "box": [2.0, 3.0, 12.0, 13.0]}] for case in CASES}
TASKS = {
    "segmentation": False,
    "classification": {"file": "classification.csv", "column": "label", "classes": ["benign", "malignant"]},
    "detection": {"file": "boxes.json", "classes": ["nodule"]},
}


def write_rows(file: Path, rows: list[list[object]]) -> None:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


@pytest.fixture
def finished(tmp_path: Path, make_small_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Two folds of ten cases; the student finds every second box that the control finds, and knows more classes."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "nnUNet_preprocessed/Dataset001_Alpha"
    folder.mkdir(parents=True)
    dataset_json = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "x": 1}, "file_ending": ".png"}
    (folder / "dataset.json").write_text(json.dumps({**dataset_json, "numTraining": 20, "nnunet_kd": {"tasks": TASKS}}))
    write_rows(folder / "classification.csv", [["case", "label"], *map(list, LABELS.items())])
    (folder / "boxes.json").write_text(json.dumps(BOXES))
    folds = [CASES[:10], CASES[10:]]
    splits = [{"train": folds[1 - fold], "val": folds[fold]} for fold in (0, 1)]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    plan = make_small_plan(text=TEXT)
    for evaluation in plan.evaluations:
        run = evaluation.run
        evaluation.predictions.mkdir(parents=True)
        job = next(job for job in plan.jobs if job.run is run)
        for output in job.outputs:
            output.touch()
        write_record(record_file(job, plan.out), job, costs={})
        rows = [["case", "label/benign", "label/malignant"]]
        rows += [
            [case, 1 - value, value]
            for case, value in zip(folds[run.fold], malignant(run.method, run.fold), strict=True)
        ]
        write_rows(evaluation.predictions / "classification.csv", rows)
        found = folds[run.fold][:: 2 if run.method == "student" else 1]
        boxes = {case: [{**BOXES[case][0], "score": 0.9}] if case in found else [] for case in folds[run.fold]}
        (evaluation.predictions / "boxes.json").write_text(json.dumps(boxes))
    return plan


def malignant(method: str, fold: int) -> list[float]:
    random = np.random.default_rng([fold, len(method)])
    return [round(float(value), 3) for value in random.uniform(0, 1, 10)]


def test_classes_and_boxes_are_compared_run_by_run(finished: Plan) -> None:
    collected = collect(finished)
    assert collected.problems == []
    auroc, precision = metric_tables(collected)
    truth = [index % 2 for index in range(10)]
    expected = {
        method: [roc_auc_score(truth, malignant(method, fold)) for fold in (0, 1)] for method in ("control", "student")
    }
    table = auroc.table.set_index("method")
    for method, values in expected.items():
        assert table.loc[method, "mean"] == pytest.approx(np.mean(values))
        runs = auroc.runs[auroc.runs["method"] == method]
        assert runs["value"].tolist() == pytest.approx(values)
        assert all(Path(folder).is_dir() for folder in runs["folder"])
    differences = np.subtract(expected["student"], expected["control"])
    assert table.loc["student", "difference"] == pytest.approx(differences.mean())
    assert table.loc["student", "wins"] == (differences > 0).sum()
    own = precision.table.set_index("method")
    assert own.loc["control", "mean"] == pytest.approx(1)
    assert own.loc["student", "mean"] == pytest.approx(0.5, abs=0.01)
    for shown, name in ((auroc, "classification.csv"), (precision, "boxes.json")):
        files = [Path(file) for file in shown.runs["scores"]]
        assert all(file.is_file() and file.name == name for file in files)
    header, cells = auroc.cells()
    assert dict(zip(header, cells[0], strict=True))["runs"] == "2 of 2"


def test_a_case_without_prediction_is_a_problem(finished: Plan) -> None:
    evaluation = finished.evaluations[0]
    file = evaluation.predictions / "classification.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))
    (problem,) = collect(finished).problems
    assert problem == "a, control, fold 0, seed 0: 1 of 10 cases are not predicted, for example c09"
