"""kl, dkd and dist against loops over voxels, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax
from scipy.stats import pearsonr
from torch import Tensor
from torch.nn.functional import kl_div

from nnunet_kd.errors import SettingsError
from nnunet_kd.losses import build_loss


class Voxels:
    """Logits [2, C, 3, 4] with masks, and the same as a list of voxels."""

    def __init__(self, num_channels: int, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.student = 2 * torch.randn(2, num_channels, 3, 4, generator=random, dtype=torch.float64)
        self.teacher = 2 * torch.randn(2, num_channels, 3, 4, generator=random, dtype=torch.float64)
        self.labels = torch.randint(0, num_channels, (2, 1, 3, 4), generator=random)
        self.labels[self.labels == 1] = 0  # a class that is not present
        self.regions = torch.rand(2, num_channels, 3, 4, generator=random) < 0.3
        self.regions[:, 0] = False  # a region without inside
        self.valid = torch.rand(2, 1, 3, 4, generator=random) < 0.8

    def rows(self, values: Tensor) -> np.ndarray:
        """The valid voxels' values, [voxels, channels]."""
        everything = values.movedim(1, -1).reshape(-1, values.shape[1]).numpy()
        return everything[self.valid.flatten().numpy()]


def bernoulli_divergence(teacher: float, student: float) -> float:
    return float(rel_entr(teacher, student) + rel_entr(1 - teacher, 1 - student))


# --- kl ---------------------------------------------------------------------------------------------------------------
def test_kl_by_hand() -> None:
    teacher = torch.tensor([math.log(3.0), 0.0]).view(1, 2, 1, 1)  # 3/4, 1/4
    student = torch.zeros(1, 2, 1, 1)  # 1/2, 1/2
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert build_loss("logits", "kl", temperature=1)(student, teacher).item() == pytest.approx(by_hand)
    twice = build_loss("logits", "kl", temperature=2)(2 * student, 2 * teacher)
    assert twice.item() == pytest.approx(4 * by_hand)


def test_kl_is_the_mean_over_valid_voxels() -> None:
    voxels, temperature = Voxels(4), 3.0
    teacher, student = (softmax(voxels.rows(v) / temperature, axis=1) for v in (voxels.teacher, voxels.student))
    expected = temperature**2 * np.mean([rel_entr(t, s).sum() for t, s in zip(teacher, student, strict=True)])
    value = build_loss("logits", "kl", temperature=temperature)(
        voxels.student, voxels.teacher, target=voxels.labels, valid=voxels.valid
    )
    assert value.item() == pytest.approx(expected)


def test_kl_agreement_weighs_a_voxel_by_the_teachers_probability_of_its_label() -> None:
    voxels, temperature = Voxels(4), 3.0
    teacher, student = (softmax(voxels.rows(v) / temperature, axis=1) for v in (voxels.teacher, voxels.student))
    trusted = softmax(voxels.rows(voxels.teacher), axis=1)
    labels = voxels.rows(voxels.labels)[:, 0]
    parts = [p[label] * rel_entr(t, s).sum() for p, label, t, s in zip(trusted, labels, teacher, student, strict=True)]
    loss = build_loss("logits", "kl", temperature=temperature, agreement=True)
    value = loss(voxels.student, voxels.teacher, target=voxels.labels, valid=voxels.valid)
    assert value.item() == pytest.approx(temperature**2 * np.mean(parts))
    plain = build_loss("logits", "kl", temperature=temperature)(voxels.student, voxels.teacher, valid=voxels.valid)
    torch.testing.assert_close(loss(voxels.student, voxels.teacher, valid=voxels.valid), plain)


def test_kl_agreement_for_regions() -> None:
    voxels = Voxels(3)
    teacher, student = (expit(voxels.rows(v)) for v in (voxels.teacher, voxels.student))
    inside = voxels.rows(voxels.regions)
    expected = np.mean(
        [
            sum((t if i else 1 - t) * bernoulli_divergence(t, s) for t, s, i in zip(*row, strict=True))
            for row in zip(teacher, student, inside, strict=True)
        ]
    )
    loss = build_loss("logits", "kl", nonlinearity="sigmoid", temperature=1, agreement=True)
    value = loss(voxels.student, voxels.teacher, target=voxels.regions, valid=voxels.valid)
    assert value.item() == pytest.approx(expected)


def test_kl_agreement_says_nothing_about_a_structure_that_the_teacher_misses() -> None:
    teacher = torch.tensor([30.0, -30.0]).view(1, 2, 1, 1)
    student = torch.zeros(1, 2, 1, 1, requires_grad=True)
    loss = build_loss("logits", "kl", temperature=1, balance="class", agreement=True)
    loss(student, teacher, target=torch.ones(1, 1, 1, 1, dtype=torch.long)).backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-12


def test_kl_agrees_with_torch() -> None:
    voxels = Voxels(3)
    rows = [v.movedim(1, -1).reshape(-1, 3).log_softmax(1) for v in (voxels.student, voxels.teacher)]
    expected = kl_div(*rows, log_target=True, reduction="batchmean")
    torch.testing.assert_close(build_loss("logits", "kl", temperature=1)(voxels.student, voxels.teacher), expected)


@pytest.mark.parametrize("with_target", [True, False])
def test_kl_balanced_is_the_mean_of_class_means(with_target: bool) -> None:
    voxels, temperature = Voxels(4), 3.0
    teacher, student = (softmax(voxels.rows(v) / temperature, axis=1) for v in (voxels.teacher, voxels.student))
    divergence = np.array([rel_entr(t, s).sum() for t, s in zip(teacher, student, strict=True)])
    labels = voxels.rows(voxels.labels)[:, 0] if with_target else teacher.argmax(axis=1)
    expected = temperature**2 * np.mean([divergence[labels == label].mean() for label in np.unique(labels)])
    value = build_loss("logits", "kl", temperature=temperature, balance="class")(
        voxels.student, voxels.teacher, target=voxels.labels if with_target else None, valid=voxels.valid
    )
    assert value.item() == pytest.approx(expected)


def test_kl_of_regions_is_the_sum_over_regions() -> None:
    voxels, temperature = Voxels(3), 2.0
    teacher, student = (expit(voxels.rows(v) / temperature) for v in (voxels.teacher, voxels.student))
    per_voxel = [
        sum(bernoulli_divergence(t, s) for t, s in zip(*pair, strict=True))
        for pair in zip(teacher, student, strict=True)
    ]
    value = build_loss("logits", "kl", nonlinearity="sigmoid", temperature=temperature)(
        voxels.student, voxels.teacher, valid=voxels.valid
    )
    assert value.item() == pytest.approx(temperature**2 * np.mean(per_voxel))


@pytest.mark.parametrize("with_target", [True, False])
def test_kl_of_regions_balances_inside_and_outside(with_target: bool) -> None:
    voxels, temperature = Voxels(3), 2.0
    teacher, student = (expit(voxels.rows(v) / temperature) for v in (voxels.teacher, voxels.student))
    inside = voxels.rows(voxels.regions) if with_target else teacher > 0.5
    expected = 0.0
    for region in range(3):
        divergence = np.array(
            [bernoulli_divergence(t, s) for t, s in zip(teacher[:, region], student[:, region], strict=True)]
        )
        groups = [divergence[inside[:, region]], divergence[~inside[:, region]]]
        expected += np.mean([group.mean() for group in groups if group.size])
    value = build_loss("logits", "kl", nonlinearity="sigmoid", temperature=temperature, balance="class")(
        voxels.student, voxels.teacher, target=voxels.regions if with_target else None, valid=voxels.valid
    )
    assert value.item() == pytest.approx(temperature**2 * expected)


def test_a_region_is_two_classes() -> None:
    voxels = Voxels(1)
    student, teacher = (torch.cat([v, torch.zeros_like(v)], dim=1) for v in (voxels.student, voxels.teacher))
    for balance in ("voxel", "class"):
        of_region = build_loss("logits", "kl", nonlinearity="sigmoid", balance=balance)
        of_classes = build_loss("logits", "kl", balance=balance)
        torch.testing.assert_close(of_region(voxels.student, voxels.teacher), of_classes(student, teacher))


def test_balancing_keeps_a_small_structure_from_vanishing() -> None:
    """One voxel of 400 is wrong: the plain mean sees 1/400 of its divergence, the balanced one half."""
    teacher = torch.zeros(1, 2, 20, 20)
    teacher[:, 0] = 4
    teacher[0, :, 3, 3] = torch.tensor([0.0, 4.0])
    student = teacher.clone()
    student[0, :, 3, 3] = torch.tensor([4.0, 0.0])
    plain = build_loss("logits", "kl", temperature=1)(student, teacher)
    balanced = build_loss("logits", "kl", temperature=1, balance="class")(student, teacher)
    assert (balanced / plain).item() == pytest.approx(200, rel=1e-4)


# --- dkd --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("with_target", [True, False])
def test_dkd_against_a_loop(with_target: bool) -> None:
    voxels, temperature, alpha, beta = Voxels(4), 3.0, 0.7, 1.9
    logits = [voxels.rows(v) / temperature for v in (voxels.teacher, voxels.student)]
    labels = voxels.rows(voxels.labels)[:, 0] if with_target else logits[0].argmax(axis=1)
    per_voxel = []
    for teacher_logits, student_logits, label in zip(*logits, labels, strict=True):
        teacher, student = softmax(teacher_logits), softmax(student_logits)
        others = np.arange(4) != label
        among_others = rel_entr(softmax(teacher_logits[others]), softmax(student_logits[others])).sum()
        per_voxel.append(alpha * bernoulli_divergence(teacher[label], student[label]) + beta * among_others)
    value = build_loss("logits", "dkd", temperature=temperature, alpha=alpha, beta=beta)(
        voxels.student, voxels.teacher, target=voxels.labels if with_target else None, valid=voxels.valid
    )
    assert value.item() == pytest.approx(temperature**2 * np.mean(per_voxel))


def test_dkd_of_two_classes_is_kl() -> None:
    voxels = Voxels(2)
    value = build_loss("logits", "dkd", beta=5.0)(voxels.student, voxels.teacher, target=voxels.labels)
    torch.testing.assert_close(value, build_loss("logits", "kl")(voxels.student, voxels.teacher))


def test_dkd_adds_up_to_kl_when_the_second_part_is_weighted_by_the_rest() -> None:
    """KL = KL(target, rest) + (1 - p_target) * KL(among the rest), at a single voxel."""
    voxels = Voxels(5)
    student, teacher = voxels.student[:1, :, :1, :1], voxels.teacher[:1, :, :1, :1]
    target = voxels.labels[:1, :, :1, :1]
    rest = 1 - teacher.softmax(1).gather(1, target).item()
    value = build_loss("logits", "dkd", temperature=1, beta=rest)(student, teacher, target=target)
    torch.testing.assert_close(value, build_loss("logits", "kl", temperature=1)(student, teacher))


def test_dkd_refuses_regions() -> None:
    with pytest.raises(SettingsError, match=r"dkd.*regions"):
        build_loss("logits", "dkd", nonlinearity="sigmoid")


# --- dist -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("nonlinearity", ["softmax", "sigmoid"])
def test_dist_against_pearson(nonlinearity: str) -> None:
    voxels, temperature, beta, gamma = Voxels(4), 1.5, 0.6, 1.7
    teacher, student = (
        softmax(rows, axis=1) if nonlinearity == "softmax" else expit(rows)
        for rows in (voxels.rows(v) / temperature for v in (voxels.teacher, voxels.student))
    )
    over_classes = np.mean([1 - pearsonr(t, s).statistic for t, s in zip(teacher, student, strict=True)])
    over_voxels = np.mean([1 - pearsonr(t, s).statistic for t, s in zip(teacher.T, student.T, strict=True)])
    value = build_loss("logits", "dist", nonlinearity=nonlinearity, temperature=temperature, beta=beta, gamma=gamma)(
        voxels.student, voxels.teacher, valid=voxels.valid
    )
    expected = temperature**2 * (beta * over_classes + gamma * over_voxels)
    assert value.item() == pytest.approx(expected, rel=1e-4)  # the loss adds a small constant


def test_dist_of_one_region_compares_voxels_only() -> None:
    voxels = Voxels(1)
    teacher, student = (expit(voxels.rows(v))[:, 0] for v in (voxels.teacher, voxels.student))
    value = build_loss("logits", "dist", nonlinearity="sigmoid")(voxels.student, voxels.teacher, valid=voxels.valid)
    assert value.item() == pytest.approx(1 - pearsonr(teacher, student).statistic, rel=1e-5)


def test_dist_is_zero_at_equality_where_probabilities_hardly_vary() -> None:
    certain = torch.zeros(1, 3, 4, 4)
    certain[:, 0] = 30.0
    for nonlinearity in ("softmax", "sigmoid"):
        value = build_loss("logits", "dist", nonlinearity=nonlinearity)(certain, certain)
        assert value.item() == pytest.approx(0, abs=1e-6)
