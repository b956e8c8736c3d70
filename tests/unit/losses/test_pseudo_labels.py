"""Cross entropy and Dice on confident pseudo labels, against loops and nnU-Net's own losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax

from nnunet_kd.errors import SettingsError
from nnunet_kd.losses import build_loss


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 4, 5, 6, generator=random, dtype=torch.float64) for _ in range(2))
    return student, teacher


def rows(values: torch.Tensor) -> np.ndarray:
    return values.movedim(1, -1).reshape(-1, values.shape[1]).numpy()


def test_softmax_against_a_loop(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = map(rows, logits)
    sure = [row for row in range(len(teacher)) if softmax(teacher[row]).max() > 0.7]
    assert 10 < len(sure) < len(teacher) - 10
    entropy = -np.mean([log_softmax(student[row])[teacher[row].argmax()] for row in sure])
    dice = []
    for label in (1, 2, 3):
        inside = [float(teacher[row].argmax() == label) for row in sure]
        likely = [softmax(student[row])[label] for row in sure]
        dice.append(2 * np.dot(inside, likely) / (sum(inside) + sum(likely)))
    loss = build_loss("logits", "pseudo_label", confidence=0.7)
    assert loss(*logits).item() == pytest.approx(entropy + 1 - np.mean(dice))
    alone = build_loss("logits", "pseudo_label", confidence=0.7, dice=False)
    assert alone(*logits).item() == pytest.approx(entropy)


def test_sigmoid_against_a_loop(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = map(rows, logits)
    entropies, dice = [], []
    for region in range(4):
        p, t = expit(student[:, region]), expit(teacher[:, region])
        sure = np.maximum(t, 1 - t) > 0.8
        inside = t > 0.5
        entropies += list(-np.log(np.where(inside, p, 1 - p))[sure])
        dice.append(2 * p[sure & inside].sum() / (p[sure].sum() + (sure & inside).sum()))
    loss = build_loss("logits", "pseudo_label", nonlinearity="sigmoid")
    assert loss(*logits).item() == pytest.approx(np.mean(entropies) + 1 - np.mean(dice))


def test_voxels_that_are_not_valid_or_not_sure_get_no_gradient(logits: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, teacher = logits[0].requires_grad_(), logits[1]
    valid = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    loss = build_loss("logits", "pseudo_label", confidence=0.7)
    loss(student, teacher, valid=valid).backward()
    sure = valid & (teacher.softmax(1).amax(1, keepdim=True) > 0.7)
    moved = student.grad.abs().amax(1, keepdim=True) > 0
    assert torch.equal(moved, sure)
    nobody = loss(student, torch.zeros_like(teacher))  # nothing is sure
    assert nobody.item() == 0


def test_a_perfect_student_is_the_minimum() -> None:
    labels = torch.randint(0, 3, (2, 1, 6, 7), generator=torch.Generator().manual_seed(0))
    teacher = 20.0 * torch.nn.functional.one_hot(labels[:, 0], 3).movedim(-1, 1)
    loss = build_loss("logits", "pseudo_label")
    assert loss(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-5)
    assert loss(-3 * teacher, teacher).item() > 10


def test_classes_that_do_not_occur_do_not_count() -> None:
    teacher, student = torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4)
    teacher[:, 1, :2], teacher[:, 0, 2:] = 20, 20
    student[:, 1, :2], student[:, 0, 2:] = 20, 20
    assert build_loss("logits", "pseudo_label")(student, teacher).item() == pytest.approx(0, abs=1e-5)
    student[:, 3, 2:] = 40  # now the student claims another class there
    value = build_loss("logits", "pseudo_label")(student, teacher).item()
    assert value == pytest.approx(10 + (0 + 1) / 2, rel=1e-3)  # cross entropy 20 in half of the voxels; Dice 1 and 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 0.3}, "'confidence'.*at least 0.5"),
        ({"confidence": 1.0}, "'confidence'.*less than 1"),
        ({"temperature": 2.0}, "no temperature"),
        ({"dice": 1}, "'dice'.*true or false"),
    ],
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build_loss("logits", "pseudo_label", **options)
