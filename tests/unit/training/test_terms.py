"""Default terms of a dataset's tasks, terms that do not fit it, and who judges a term."""

from __future__ import annotations

from typing import Any

import pytest

from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import SettingsError
from nnunet_kd.settings import Term, parse_settings
from nnunet_kd.tasks.detection_plan import DetectionPlan
from nnunet_kd.training.student import nnUNetTrainerKDStudent
from nnunet_kd.training.terms import asked_task, default_terms, fit_terms, judging_task

CLASSIFICATION = {"file": "classification.csv", "column": "size", "classes": ["small", "large"]}
DETECTION = {"file": "boxes.json", "classes": ["lesion"]}
PLAN = DetectionPlan(strides=((1, 2, 2), (2, 4, 4)), anchors=(((6.0,) * 3,), ((12.0,) * 3,)), classes=("lesion",))


def tasks_of(**declared: Any) -> Tasks:
    return Tasks.from_dataset_json({"nnunet_kd": {"tasks": declared}})


CLASSES = tasks_of(segmentation=False, classification=CLASSIFICATION)
BOXES = tasks_of(segmentation=False, detection=DETECTION)
EVERYTHING = tasks_of(classification=CLASSIFICATION, detection=DETECTION)


def kinds(tasks: Tasks) -> list[str]:
    return [f"{term['on']}.{term['loss']}" for term in default_terms(tasks)]


def test_default_terms_follow_the_tasks() -> None:
    assert default_terms(Tasks()) == [
        {"on": "logits", "loss": "kl", "temperature": 4.0, "weight": 1.0},
        {"on": "features", "loss": "mse", "levels": ["bottleneck", "decoder@1/2"], "weight": 15.0},
    ]
    assert kinds(CLASSES) == ["features.mse", "classification.kl"]
    assert kinds(BOXES) == ["features.mse", "boxes.kl", "boxes.giou"]
    assert kinds(EVERYTHING) == ["logits.kl", "features.mse", "classification.kl", "boxes.kl", "boxes.giou"]
    for tasks, plan in ((Tasks(), None), (CLASSES, None), (BOXES, PLAN), (EVERYTHING, PLAN)):
        terms = parse_settings({"teachers": {"joint": {}}, "terms": default_terms(tasks)}).terms
        assert fit_terms(terms, "Dataset001_A", tasks, plan) == terms


@pytest.mark.parametrize(
    ("tasks", "term", "named"),
    [
        (CLASSES, Term(on="logits"), "has no segmentations"),
        (CLASSES, Term(on="boxes"), "no head for detection"),
        (BOXES, Term(on="classification"), "no head for classification"),
        (Tasks(), Term(on="boxes", loss="imitation"), "no head for detection"),
        (BOXES, Term(on="features", loss="class_masked", levels=["bottleneck"]), "needs segmentations"),
        (CLASSES, Term(on="features", loss="intra_class", levels=["bottleneck"]), "needs segmentations"),
    ],
)
def test_term_that_does_not_fit_the_dataset(tasks: Tasks, term: Term, named: str) -> None:
    plan = None if tasks.detection is None else PLAN
    with pytest.raises(SettingsError, match=r"terms\[1\].*Dataset001_A") as error:
        fit_terms([Term(on="features", loss="mse", levels=["bottleneck"]), term], "Dataset001_A", tasks, plan)
    assert named in str(error.value)


def test_imitation_takes_the_levels_of_the_detection_head() -> None:
    own = Term(on="boxes", loss="imitation", levels=["bottleneck"])
    open_one, kept = fit_terms([Term(on="boxes", loss="imitation"), own], "Dataset001_A", BOXES, PLAN)
    assert open_one.levels == ["decoder@1/2", "decoder@1/4"]
    assert kept == own


@pytest.mark.parametrize(
    ("term", "common", "judge"),
    [
        (Term(on="logits"), ("segmentation", "detection"), "segmentation"),
        (Term(on="classification"), ("segmentation", "classification"), "classification"),
        (Term(on="boxes"), ("segmentation", "classification", "detection"), "detection"),
        (Term(on="features"), ("segmentation", "classification"), "segmentation"),
        (Term(on="features"), ("classification", "detection"), "classification"),
        (Term(on="features"), (), None),
        (Term(on="boxes", loss="imitation"), ("segmentation", "detection"), "detection"),
        (Term(on="boxes", loss="imitation"), ("segmentation",), "segmentation"),
    ],
)
def test_judge(term: Term, common: tuple[str, ...], judge: str | None) -> None:
    assert judging_task(term, common) == judge


def test_features_ask_for_no_head() -> None:
    assert asked_task(Term(on="features")) is None
    assert asked_task(Term(on="boxes", loss="imitation")) is None
    assert asked_task(Term(on="boxes", loss="giou")) == "detection"
    assert asked_task(Term(on="classification", loss="cosine")) == "classification"


class AnotherMethod(nnUNetTrainerKDStudent):
    preset = {"terms": [{"on": "features", "loss": "cosine", "levels": ["bottleneck"]}]}  # noqa: RUF012


@pytest.mark.parametrize("tasks", [Tasks(), CLASSES])
@pytest.mark.parametrize("trainer", [nnUNetTrainerKDStudent, AnotherMethod])
def test_a_method_is_a_trainer_with_another_list_of_terms(
    trainer: type[nnUNetTrainerKDStudent], tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNetKD_settings", raising=False)
    student = trainer.__new__(trainer)
    student.planned_tasks, student.planned_boxes = tasks, None
    plans = {"dataset_name": "Dataset001_A", "plans_name": "p", "nnunet_kd": {"teachers": {"x": {"model": "m"}}}}
    terms = student.resolve_settings(plans, "2d", 0).terms
    expected = AnotherMethod.preset["terms"] if trainer is AnotherMethod else default_terms(tasks)
    assert [(term.teacher, term.on, term.loss) for term in terms] == [("x", own["on"], own["loss"]) for own in expected]
