"""A small recipe, and what its finished runs leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nnunet_kd.leaderboard.plan import Machine, Plan, make_plan
from nnunet_kd.leaderboard.recipe import read_recipe
from nnunet_kd.leaderboard.record import record_file, write_record
from nnunet_kd.leaderboard.runs import Evaluation
from nnunet_kd.leaderboard.scores import write_scores

RECIPE = """\
name: small
title: A & B
datasets:
  a: {id: 1, name: Alpha, tests: {b: {dataset: b, cases: validation}}}
  b: {id: 2, name: Beta}
joints:
  both: {id: 900, members: [a, b]}
configurations: [2d]
folds: [0, 1]
seeds: [3]
budget: {num_epochs: 2}
methods:
  student: {trainer: nnUNetTrainerKDStudent, teachers: {joint: teacher}}
  control: {trainer: nnUNetTrainerKDControl}
  teacher: {trainer: nnUNetTrainerKDTeacher, on_joints: [both], in_table: false}
control: control
metrics: [dice, hd95]
"""


@pytest.fixture
def recipe_text() -> str:
    return RECIPE


@pytest.fixture
def make_small_plan(tmp_path: Path) -> Callable[..., Plan]:
    """The plan of a recipe's text, with replacements."""

    def make(*replacements: tuple[str, str], text: str = RECIPE, out: str = "out", **machine: Any) -> Plan:
        for before, after in replacements:
            assert before in text
            text = text.replace(before, after)
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return make_plan(read_recipe(file), file, tmp_path / out, Machine(**machine))

    return make


@pytest.fixture
def finish() -> Callable[..., None]:
    """Leave what a finished run leaves: nnU-Net's files (empty), the record, and scores of one class per case."""

    def write(
        plan: Plan,
        evaluation: Evaluation,
        dice: Mapping[str, float],
        costs: Mapping[str, Any] | None = None,
    ) -> None:
        run = evaluation.run
        for job in plan.jobs:
            own = job.run is run or job.evaluation is evaluation
            if own:
                for output in job.outputs:
                    output.parent.mkdir(parents=True, exist_ok=True)
                    output.mkdir(exist_ok=True) if job.run is None else output.touch()
                write_record(record_file(job, plan.out), job, finished=True, costs=dict(costs or {}))
        evaluation.predictions.mkdir(parents=True, exist_ok=True)
        values = np.array(list(dice.values()))
        scores = {"case": list(dice), "class": "lesion", "dice": values, "hd95_mm": 10 * (1 - values), "nsd": values}
        write_scores(plan.recipe, evaluation, pd.DataFrame(scores), plan.out)

    return write
