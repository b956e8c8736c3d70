"""The guard's numbers against Dice by counting voxels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nnunet_kd.training.guard import COMPETENCE_MOMENTUM, Competence


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
    competence = Competence(4)
    given = valid if masked else None
    competence.update(one_hot_logits(student, 4), one_hot_logits(teacher, 4), target, given, False)
    counted = valid if masked else torch.ones_like(valid)
    expected = [brute_dice(predicted, target, counted, [1, 2, 3]) for predicted in (student, teacher)]
    assert [float(value) for value in competence.dice()] == pytest.approx(expected)


@pytest.mark.parametrize("masked", [False, True])
def test_dice_of_regions(masked: bool) -> None:
    torch.manual_seed(0)
    target = torch.rand(2, 2, 8, 8) > 0.5
    student, teacher = torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    valid = torch.rand(2, 1, 8, 8) > 0.3
    competence = Competence(2)
    competence.update(student, teacher, target, valid if masked else None, True)
    counted = (valid if masked else torch.ones_like(valid))[:, 0]
    for own, logits in zip(competence.dice(), (student, teacher), strict=True):
        each = []
        for region in range(2):
            p, t = (logits[:, region] > 0) & counted, target[:, region] & counted
            each.append(float(2 * (p & t).sum() / (p.sum() + t.sum())))
        assert float(own) == pytest.approx(sum(each) / 2)


def test_counts_are_averaged_over_steps() -> None:
    target = torch.ones(1, 1, 4, 4, dtype=torch.long)
    right, wrong = one_hot_logits(target, 2), one_hot_logits(1 - target, 2)
    competence = Competence(2)
    competence.update(right, right, target, None, False)
    for _ in range(3):
        competence.update(right, wrong, target, None, False)
    kept = COMPETENCE_MOMENTUM**3
    student, teacher = competence.dice()
    assert float(student) == pytest.approx(1)
    assert float(teacher) == pytest.approx(2 * kept / (2 * kept + (1 - kept)))  # tp shrink, the rest is missed


@pytest.mark.parametrize(("margin", "expected"), [(0.5, 0.6), (0.2, 0.0), (0.1, 0.0), (1.0, 0.8)])
def test_factor_falls_linearly_over_the_margin(margin: float, expected: float) -> None:
    competence = Competence(2)
    # Dice 0.8 and 0.6: tp, fp, fn
    competence.counts = torch.tensor([[[8.0], [2.0], [2.0]], [[6.0], [4.0], [4.0]]])
    assert float(competence.factor(margin)) == pytest.approx(expected, abs=1e-6)


def test_factor_of_a_better_or_unknown_teacher_is_one() -> None:
    competence = Competence(2)
    assert competence.factor(0.1) == 1
    competence.counts = torch.tensor([[[6.0], [4.0], [4.0]], [[8.0], [2.0], [2.0]]])
    assert float(competence.factor(0.1)) == 1
    assert float(competence.factor(0.0)) == 1


def test_batches_without_any_foreground_do_no_harm() -> None:
    competence = Competence(3)
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    competence.update(one_hot_logits(nothing, 3), one_hot_logits(nothing, 3), nothing, None, False)
    assert [float(value) for value in competence.dice()] == [0, 0]
    assert float(competence.factor(0.1)) == 1


def test_factor_of_a_poor_teacher_is_small_even_where_the_student_is_as_poor() -> None:
    competence = Competence(2)
    competence.counts = torch.tensor([[[4.0], [6.0], [6.0]], [[4.0], [6.0], [6.0]]])  # Dice 0.4 both
    assert float(competence.factor(None, 2.0)) == pytest.approx(0.16)
    assert float(competence.factor(0.1, 2.0)) == pytest.approx(0.16)
    competence.counts = torch.tensor([[[9.0], [1.0], [1.0]], [[8.0], [2.0], [2.0]]])  # student 0.9, teacher 0.8
    assert float(competence.factor(0.2, 1.0)) == pytest.approx(0.8 * 0.5)
