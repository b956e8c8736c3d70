"""Scores from which on boxes are reported, chosen in the final validation of the folds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_kd.cli import predict
from nnunet_kd.data.side_files import CaseBoxes
from nnunet_kd.errors import NnUNetKDError
from nnunet_kd.evaluation.detection import FALSE_POSITIVE_RATES, evaluate_detection
from nnunet_kd.evaluation.prediction_files import read_box_predictions, write_box_predictions
from nnunet_kd.inference.operating_point import minimum_scores, write_reported
from nnunet_kd.inference.trained_model import TrainedModel

CLASSES = ("mass", "cyst")


def model(folder: Path, summaries: list[Any], *parts: str) -> TrainedModel:
    files: dict[int | str, Path] = {}
    for fold, detection in enumerate(summaries):
        summary = Path(folder, f"fold_{fold}", *parts, "validation", "summary.json")
        summary.parent.mkdir(parents=True)
        summary.write_text(json.dumps({"nnunet_kd": {"detection": detection}}))
        files[fold] = folder / f"fold_{fold}" / "checkpoint_final.pth"
    return TrainedModel(folder, {}, {}, files)


def detection(*thresholds: list[float | None]) -> dict[str, Any]:
    classes = [{"name": name, "froc_thresholds": own} for name, own in zip(CLASSES, thresholds, strict=True)]
    return {"froc_rates": [0.5, 1.0], "classes": classes}


def test_it_is_the_mean_over_the_folds(tmp_path: Path) -> None:
    summaries = [detection([0.9, 0.5], [None, 0.3]), detection([0.8, 0.0], [None, None])]
    folds = model(tmp_path, summaries)
    np.testing.assert_allclose(minimum_scores(folds, CLASSES, 1.0), [0.25, 0.65])  # null: none may be kept
    np.testing.assert_allclose(minimum_scores(folds, CLASSES, 0.5), [0.85, 1.0])
    np.testing.assert_allclose(minimum_scores(folds, CLASSES[::-1], 1.0), [0.65, 0.25])


def test_a_member_of_a_joint_teacher_has_its_own(tmp_path: Path) -> None:
    folds = model(tmp_path, [detection([0.9, 0.5], [0.2, 0.1])], "Dataset301_A")
    np.testing.assert_allclose(minimum_scores(folds, CLASSES, 0.5, "Dataset301_A"), [0.9, 0.2])


@pytest.mark.parametrize(
    "summary",
    [None, {}, {"froc_rates": [0.5], "classes": []}, detection([0.9, 0.5], [0.2, 0.1]), detection([], [])],
)
def test_without_it_the_message_says_what_to_do(tmp_path: Path, summary: Any) -> None:
    folds = model(tmp_path, [summary])
    with pytest.raises(NnUNetKDError, match=r"fold_0.validation.summary\.json has none for mass, stone.*--val"):
        minimum_scores(folds, ("mass", "stone"), 0.5)


def test_what_is_reported_has_as_many_false_positives_on_the_validation_cases(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lower = random.uniform(0, 90, size=(20, 2))
    truth = {f"c{i}": CaseBoxes(np.zeros(1, np.int64), np.hstack([low, low + 9])[None]) for i, low in enumerate(lower)}
    predictions = {}
    for case, own in truth.items():
        others = random.uniform(200, 290, size=(6, 2))  # nowhere near
        boxes = np.concatenate([own.boxes, np.hstack([others, others + 9])])
        predictions[case] = (np.zeros(7, np.int64), boxes, random.uniform(size=7))
    write_box_predictions(tmp_path / "boxes.json", predictions, ["mass"])
    predictions = read_box_predictions(tmp_path / "boxes.json", ["mass"], 2)  # rounded as the validation's are
    scores = evaluate_detection(truth, predictions, ["mass"], num_resamples=0)
    own = {"name": "mass", "froc_thresholds": list(scores.classes[0].froc_thresholds)}
    folds = model(tmp_path, [{"froc_rates": FALSE_POSITIVE_RATES, "classes": [own]}])
    for rate in FALSE_POSITIVE_RATES:
        file = write_reported(tmp_path, ["mass"], 2, minimum_scores(folds, ["mass"], rate))
        kept = read_box_predictions(file, ["mass"], 2)
        assert kept.keys() == predictions.keys()
        false = sum((boxes[:, 0] >= 200).sum() for _, boxes, _ in kept.values())
        assert min(rate * 20, 20 * 6) - 1 < false <= rate * 20


def test_the_command_offers_the_rates_that_are_validated() -> None:
    (action,) = [own for own in predict._parser()._actions if own.dest == "false_positives"]
    assert action.choices == FALSE_POSITIVE_RATES
