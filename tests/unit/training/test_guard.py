"""The guard's numbers against counting voxels, cases and anchors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnunet_kd.training.guard import (
    COMPETENCE_MOMENTUM,
    ClassificationCompetence,
    DetectionCompetence,
    SegmentationCompetence,
)


def one_hot_logits(labels: Tensor, channels: int) -> Tensor:
    return torch.nn.functional.one_hot(labels[:, 0], channels).movedim(-1, 1).float()


def brute_dice(predicted: Tensor, target: Tensor, valid: Tensor, classes: list[int]) -> float:
    values = []
    for label in classes:
        p, t = (predicted == label) & valid, (target == label) & valid
        if t.any():
            values.append(float(2 * (p & t).sum() / (p.sum() + t.sum())))
    return sum(values) / len(values)


@pytest.mark.parametrize("masked", [False, True])
def test_dice_of_labels(masked: bool) -> None:
    torch.manual_seed(0)
    target = torch.randint(0, 3, (2, 1, 8, 8))  # class 3 does not occur
    student, teacher = torch.randint(0, 4, (2, 1, 8, 8)), torch.randint(0, 4, (2, 1, 8, 8))
    valid = torch.rand(2, 1, 8, 8) > 0.3
    competence = SegmentationCompetence()
    given = valid if masked else None
    competence.update(one_hot_logits(student, 4), one_hot_logits(teacher, 4), target, given, False)
    counted = valid if masked else torch.ones_like(valid)
    expected = [brute_dice(predicted, target, counted, [1, 2, 3]) for predicted in (student, teacher)]
    assert [float(value) for value in competence.scores()] == pytest.approx(expected)


@pytest.mark.parametrize("masked", [False, True])
def test_dice_of_regions(masked: bool) -> None:
    torch.manual_seed(0)
    target = torch.rand(2, 2, 8, 8) > 0.5
    student, teacher = torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    valid = torch.rand(2, 1, 8, 8) > 0.3
    competence = SegmentationCompetence()
    competence.update(student, teacher, target, valid if masked else None, True)
    counted = (valid if masked else torch.ones_like(valid))[:, 0]
    for own, logits in zip(competence.scores(), (student, teacher), strict=True):
        each = []
        for region in range(2):
            p, t = (logits[:, region] > 0) & counted, target[:, region] & counted
            each.append(float(2 * (p & t).sum() / (p.sum() + t.sum())))
        assert float(own) == pytest.approx(sum(each) / 2)


def test_counts_are_averaged_over_steps() -> None:
    target = torch.ones(1, 1, 4, 4, dtype=torch.long)
    right, wrong = one_hot_logits(target, 2), one_hot_logits(1 - target, 2)
    competence = SegmentationCompetence()
    competence.update(right, right, target, None, False)
    for _ in range(3):
        competence.update(right, wrong, target, None, False)
    kept = COMPETENCE_MOMENTUM**3
    student, teacher = competence.scores()
    assert float(student) == pytest.approx(1)
    assert float(teacher) == pytest.approx(2 * kept / (2 * kept + (1 - kept)))  # tp shrink, the rest is missed


@pytest.mark.parametrize(("margin", "expected"), [(0.5, 0.6), (0.2, 0.0), (0.1, 0.0), (1.0, 0.8)])
def test_factor_falls_linearly_over_the_margin(margin: float, expected: float) -> None:
    competence = SegmentationCompetence()
    # Dice 0.8 and 0.6: tp, fp, fn
    competence.counts = torch.tensor([[[8.0], [2.0], [2.0]], [[6.0], [4.0], [4.0]]])
    assert float(competence.factor(margin)) == pytest.approx(expected, abs=1e-6)


def test_factor_of_a_better_or_unknown_teacher_is_one() -> None:
    competence = SegmentationCompetence()
    assert competence.factor(0.1) == 1
    competence.counts = torch.tensor([[[6.0], [4.0], [4.0]], [[8.0], [2.0], [2.0]]])
    assert float(competence.factor(0.1)) == 1
    assert float(competence.factor(0.0)) == 1


def test_batches_without_any_foreground_do_no_harm() -> None:
    competence = SegmentationCompetence()
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    competence.update(one_hot_logits(nothing, 3), one_hot_logits(nothing, 3), nothing, None, False)
    assert [float(value) for value in competence.scores()] == [0, 0]
    assert float(competence.factor(0.1)) == 1


def test_factor_of_a_poor_teacher_is_small_even_where_the_student_is_as_poor() -> None:
    competence = SegmentationCompetence()
    competence.counts = torch.tensor([[[4.0], [6.0], [6.0]], [[4.0], [6.0], [6.0]]])  # Dice 0.4 both
    assert float(competence.factor(None, 2.0)) == pytest.approx(0.16)
    assert float(competence.factor(0.1, 2.0)) == pytest.approx(0.16)
    competence.counts = torch.tensor([[[9.0], [1.0], [1.0]], [[8.0], [2.0], [2.0]]])  # student 0.9, teacher 0.8
    assert float(competence.factor(0.2, 1.0)) == pytest.approx(0.8 * 0.5)


def test_the_absolute_part_is_milder_for_classes_and_boxes() -> None:
    """J and the soft Dice of boxes are far lower than Dice where a teacher is worth listening to."""
    classes, boxes = ClassificationCompetence(), DetectionCompetence()
    classes.counts = torch.tensor([[[5.0], [5.0], [5.0], [5.0]], [[6.0], [3.0], [4.0], [7.0]]])  # J 0 and 0.3
    boxes.counts = torch.tensor([[2.0, 4.0, 4.0], [4.0, 4.0, 8.0]])  # soft Dice 0.4 and 0.5
    assert float(classes.factor(0.1, 4.0)) == pytest.approx(0.3)
    assert float(boxes.factor(0.1, 4.0)) == pytest.approx(0.5)


# --- classification ---------------------------------------------------------------------------------------------------
def youden(predicted: list[list[bool]], truth: list[list[float]]) -> float:
    """Mean over the classes with positive and negative cases, by counting; NaN is left out."""
    values = []
    for c in range(len(truth[0])):
        pairs = [(p[c], t[c]) for p, t in zip(predicted, truth, strict=True) if t[c] == t[c]]
        positive = [p for p, t in pairs if t == 1]
        negative = [not p for p, t in pairs if t == 0]
        if positive and negative:
            values.append(max(0.0, sum(positive) / len(positive) + sum(negative) / len(negative) - 1))
    return sum(values) / len(values)


def test_youden_of_several_targets() -> None:
    nan = float("nan")
    grades = [[1.0, 0, 0], [0, 1.0, 0], [nan, nan, nan], [0, 1.0, 0]]  # the third class does not occur
    findings = [[1.0, 0.0], [nan, 1.0], [0.0, 1.0], [1.0, 0.0]]
    generator = torch.Generator().manual_seed(0)
    logits = [
        {"grade": torch.randn(4, 3, generator=generator), "findings": torch.randn(4, 2, generator=generator)}
        for _ in range(2)
    ]
    logits[1]["grade"] = torch.tensor(grades).nan_to_num() + 0.1 * logits[1]["grade"]  # the teacher knows the grades
    competence = ClassificationCompetence()
    labels = {"grade": torch.tensor(grades), "findings": torch.tensor(findings)}
    competence.update(*logits, labels, {"grade": False, "findings": True})
    for score, own in zip(competence.scores(), logits, strict=True):
        decided = [[c == int(row.argmax()) for c in range(3)] for row in own["grade"]]
        found = (own["findings"] > 0).tolist()
        number = {"grade": 2, "findings": 2}  # classes that occur with and without
        expected = (number["grade"] * youden(decided, grades) + number["findings"] * youden(found, findings)) / 4
        assert float(score) == pytest.approx(expected)


def test_always_the_same_class_is_no_competence() -> None:
    competence = ClassificationCompetence()
    labels = {"grade": torch.tensor([[1.0, 0.0]] * 9 + [[0.0, 1.0]])}
    always, right = {"grade": torch.tensor([[1.0, 0.0]] * 10)}, {"grade": labels["grade"].clone()}
    competence.update(always, right, labels, {"grade": False})
    assert [float(score) for score in competence.scores()] == [0, 1]


def test_batch_without_labels_does_no_harm() -> None:
    competence = ClassificationCompetence()
    logits = {"grade": torch.randn(2, 3)}
    competence.update(logits, logits, {"grade": torch.full((2, 3), float("nan"))}, {"grade": False})
    assert [float(score) for score in competence.scores()] == [0, 0]


# --- detection --------------------------------------------------------------------------------------------------------
ANCHORS = torch.tensor([[0, 0, 4, 4], [1, 1, 5, 5], [0, 3, 4, 7], [20, 20, 24, 24], [8, 8, 12, 12]]).float()


def brute_iou(first: list[float], second: list[float]) -> float:
    sides = [max(0, min(first[a + 2], second[a + 2]) - max(first[a], second[a])) for a in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])


def test_soft_dice_of_boxes() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(3, 5, 2, generator=generator), torch.randn(3, 5, 2, generator=generator)
    matches = [torch.tensor([0, 0, -1, -1, 1]), torch.full((5,), -1), torch.tensor([-1, -1, -1, 0, -1])]
    boxes = [
        torch.tensor([[0, 0, 4, 5], [8, 8, 12, 12]]).float(),
        torch.zeros(0, 4),
        torch.tensor([[19, 19, 25, 25.0]]),
    ]
    labels = [torch.tensor([1, 0]), torch.zeros(0, dtype=torch.long), torch.tensor([1])]
    competence = DetectionCompetence()
    competence.update(student, teacher, ANCHORS, matches, boxes, labels)
    for score, logits in zip(competence.scores(), (student, teacher), strict=True):
        found = false = 0.0
        for image, p in enumerate(logits.sigmoid().tolist()):
            own = boxes[image].tolist()
            for index, label in enumerate(labels[image].tolist()):
                found += max(p[a][label] for a in range(5) if matches[image][a] == index)
            far = [a for a in range(5) if matches[image][a] < 0]
            far = [a for a in far if all(brute_iou(ANCHORS[a].tolist(), box) < 0.1 for box in own)]
            false += max((max(p[a]) for a in far), default=0.0)
        assert float(score) == pytest.approx(2 * found / (3 + found + false))


def test_no_box_at_all_is_no_competence() -> None:
    competence = DetectionCompetence()
    none = [torch.full((5,), -1)], [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.long)]
    competence.update(torch.zeros(1, 5, 2), torch.zeros(1, 5, 2), ANCHORS, *none)
    assert [float(score) for score in competence.scores()] == [0, 0]


def test_a_good_detector_is_trusted_and_a_poor_one_is_not() -> None:
    """Probabilities as trained detectors give them: neighbours of a match fire as well, far anchors hardly do."""
    good, poor = torch.tensor([0.5, 0.8, 0.6, 0.05, 0.1]), torch.tensor([0.15, 0.2, 0.15, 0.2, 0.15])
    competence = DetectionCompetence()
    matches, boxes, labels = [torch.tensor([-1, 0, -1, -1, -1])], [torch.tensor([[1, 1, 5, 5.0]])], [torch.tensor([0])]
    competence.update(poor.logit()[None, :, None], good.logit()[None, :, None], ANCHORS, matches, boxes, labels)
    student, teacher = (float(score) for score in competence.scores())
    assert teacher**4 > 0.4
    assert student**4 < 0.01
