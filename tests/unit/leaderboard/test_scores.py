from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.leaderboard.plan import Plan
from nnunet_kd.leaderboard.runs import Evaluation
from nnunet_kd.leaderboard.scores import case_scores

MakePlan = Callable[..., Plan]
ALL_CASES = ("{dataset: b, cases: validation}", "{dataset: b}")


@pytest.fixture
def raw(tmp_path: Path, make_dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Dataset 1 has lungs and hearts, dataset 2 has lungs and bones."""
    folder = tmp_path / "raw"
    make_dataset(folder, 1, "Alpha", dimension=2, num_cases=2, labels={"background": 0, "lung": 1, "heart": 2})
    make_dataset(folder, 2, "Beta", dimension=2, num_cases=3, labels={"background": 0, "lung": 1, "bone": 2})
    (tmp_path / "preprocessed").mkdir()
    monkeypatch.setenv("nnUNet_raw", str(folder))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    return folder


def beta(plan: Plan) -> Evaluation:
    return next(own for own in plan.evaluations if own.test == "b" and own.run.method == "control")


def predict(evaluation: Evaluation, references: Path) -> list[float]:
    """Write predictions that miss every second column; returns their Dice."""
    evaluation.predictions.mkdir(parents=True)
    expected = []
    for file in sorted(references.iterdir()):
        truth = np.array(Image.open(file))
        prediction = truth.copy()
        prediction[:, ::2] = 0
        Image.fromarray(prediction).save(evaluation.predictions / file.name)
        both = ((truth == 1) & (prediction == 1)).sum()
        expected.append(2 * both / ((truth == 1).sum() + (prediction == 1).sum()))
    return expected


def test_another_dataset_is_scored_on_the_classes_in_common(raw: Path, make_small_plan: MakePlan) -> None:
    plan = make_small_plan(ALL_CASES)
    evaluation = beta(plan)
    expected = predict(evaluation, raw / "Dataset002_Beta/labelsTr")
    scores = case_scores(plan.recipe, evaluation, plan.out)
    assert scores["class"].unique().tolist() == ["lung"]
    assert scores["case"].tolist() == ["beta_000", "beta_001", "beta_002"]
    assert scores["dice"].tolist() == pytest.approx(expected)
    # the second time nothing is evaluated: there are no references any more
    for file in (raw / "Dataset002_Beta/labelsTr").iterdir():
        file.unlink()
    again = case_scores(plan.recipe, evaluation, plan.out)
    assert again["dice"].tolist() == pytest.approx(scores["dice"].tolist())


def test_scores_follow_references_that_were_corrected(raw: Path, make_small_plan: MakePlan) -> None:
    plan = make_small_plan(ALL_CASES)
    evaluation = beta(plan)
    references = raw / "Dataset002_Beta/labelsTr"
    predict(evaluation, references)
    before = case_scores(plan.recipe, evaluation, plan.out)["dice"].tolist()
    corrected = []
    for file in sorted(references.iterdir()):
        truth = np.ones_like(np.array(Image.open(file)))  # all is lung
        Image.fromarray(truth).save(file)
        predicted = np.array(Image.open(evaluation.predictions / file.name)) == 1
        corrected.append(2 * predicted.sum() / (predicted.sum() + truth.sum()))
    after = case_scores(plan.recipe, evaluation, plan.out)["dice"].tolist()
    assert after == pytest.approx(corrected)
    assert after != pytest.approx(before)


def test_a_prediction_that_is_missing_is_an_error(raw: Path, make_small_plan: MakePlan) -> None:
    plan = make_small_plan(ALL_CASES)
    evaluation = beta(plan)
    predict(evaluation, raw / "Dataset002_Beta/labelsTr")
    (evaluation.predictions / "beta_001.png").unlink()
    with pytest.raises(NnUNetKDError, match="1 of 3 cases have no prediction"):
        case_scores(plan.recipe, evaluation, plan.out)


@pytest.mark.parametrize("labels", [{"background": 0, "lung": 2, "bone": 1}, {"background": 0, "bone": 1}])
def test_datasets_without_a_common_class(raw: Path, make_small_plan: MakePlan, labels: dict[str, int]) -> None:
    plan = make_small_plan(ALL_CASES)
    file = raw / "Dataset002_Beta/dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "labels": labels}))
    with pytest.raises(NnUNetKDError, match="Dataset001_Alpha and Dataset002_Beta do not have"):
        case_scores(plan.recipe, beta(plan), plan.out)


def test_folders_of_a_test_set(raw: Path, make_small_plan: MakePlan) -> None:
    plan = make_small_plan(("{dataset: b, cases: validation}", "{images: imagesTs, labels: truth}"))
    (raw / "Dataset001_Alpha/labelsTr").rename(raw / "Dataset001_Alpha/truth")
    evaluation = beta(plan)
    expected = predict(evaluation, raw / "Dataset001_Alpha/truth")
    scores = case_scores(plan.recipe, evaluation, plan.out)
    assert scores["class"].unique().tolist() == ["lung", "heart"]
    assert scores[scores["class"] == "lung"]["dice"].tolist() == pytest.approx(expected)
