"""Losses on detections against loops over anchors and boxes."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from monai.data.box_utils import box_pair_giou
from scipy.special import expit, rel_entr
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_kd.losses import build_loss

dimensions = pytest.mark.parametrize("dimension", [2, 3])
half_types = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])


def random_logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Student and teacher [2, 5, 3]: two patches, five anchors, three classes."""
    random = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, 2, 5, 3, generator=random, dtype=torch.float64) - 1
    return student.to(dtype), teacher.to(dtype)


def random_boxes(dimension: int, count: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher [count, 2 * dimension] that overlap, or not, and scores [count]."""
    random = torch.Generator().manual_seed(dimension)
    lower = 6 * torch.rand(2, count, dimension, generator=random, dtype=torch.float64)
    length = 2 + 8 * torch.rand(2, count, dimension, generator=random, dtype=torch.float64)
    student, teacher = torch.cat([lower, lower + length], dim=2)
    return student, teacher, torch.rand(count, generator=random, dtype=torch.float64)


# --- kl ---------------------------------------------------------------------------------------------------------------
def test_kl_by_hand() -> None:
    """Two anchors: the teacher claims an object at the first, and the second is background for both."""
    teacher = torch.tensor([math.log(3.0), -30.0]).view(1, 2, 1)  # p = 3/4, about 0
    student = torch.tensor([0.0, -29.0]).view(1, 2, 1)  # p = 1/2, about 0
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert build_loss("boxes", "kl")(student, teacher).item() == pytest.approx(by_hand)
    assert build_loss("boxes", "kl", exponent=0)(student, teacher).item() == pytest.approx(by_hand / 2)


@pytest.mark.parametrize(("temperature", "exponent"), [(1.0, 2.0), (3.0, 2.0), (2.0, 0.5)])
def test_kl_against_a_loop(temperature: float, exponent: float) -> None:
    student, teacher = random_logits()
    total, weights = 0.0, 0.0
    for of_student, of_teacher in zip(student.numpy().reshape(-1, 3), teacher.numpy().reshape(-1, 3), strict=True):
        weight = max(*expit(of_student), *expit(of_teacher)) ** exponent
        p_student, p_teacher = expit(of_student / temperature), expit(of_teacher / temperature)
        divergence = rel_entr(p_teacher, p_student).sum() + rel_entr(1 - p_teacher, 1 - p_student).sum()
        total, weights = total + weight * divergence, weights + weight
    value = build_loss("boxes", "kl", temperature=temperature, exponent=exponent)(student, teacher)
    assert value.item() == pytest.approx(temperature**2 * total / weights)


def test_kl_gradient_treats_the_quality_as_constant() -> None:
    student, teacher = random_logits()
    weight = torch.maximum(student, teacher).sigmoid().amax(dim=2).square()  # of the starting point

    def by_hand(logits: Tensor) -> Tensor:
        p, q = teacher.sigmoid(), logits.sigmoid()
        divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(2)
        return (divergence * weight).sum() / weight.sum()

    loss = build_loss("boxes", "kl")
    gradients = []
    for function in (by_hand, lambda logits: loss(logits, teacher)):
        start = student.clone().requires_grad_()
        function(start).backward()
        gradients.append(start.grad)
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(by_hand, (student.clone().requires_grad_(),))
    plain = build_loss("boxes", "kl", exponent=0)  # without quality the loss itself can be checked
    assert torch.autograd.gradcheck(lambda logits: plain(logits, teacher), (student.clone().requires_grad_(),))


def test_kl_is_zero_only_where_both_agree() -> None:
    student, teacher = random_logits()
    loss = build_loss("boxes", "kl")
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    for anchor in range(5):
        other = teacher.clone()
        other[1, anchor, 2] = student[1, anchor, 2]
        assert loss(other, teacher).item() > 1e-4


def test_kl_does_not_depend_on_the_order_of_anchors_or_on_how_they_fall_into_patches() -> None:
    student, teacher = random_logits()
    expected = build_loss("boxes", "kl")(student, teacher)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    shuffled = [logits.flatten(0, 1)[order].view(1, 10, 3) for logits in (student, teacher)]
    torch.testing.assert_close(build_loss("boxes", "kl")(*shuffled), expected)


def test_kl_is_not_swamped_by_easy_background() -> None:
    """A missed object among 1e5 background anchors, on which the two hardly differ."""
    teacher = torch.full((1, 100_001, 1), -8.0)
    student = torch.full((1, 100_001, 1), -9.0)
    teacher[0, 0], student[0, 0] = 3.0, -3.0
    alone = build_loss("boxes", "kl")(student[:, :1], teacher[:, :1])
    weighted, plain = (build_loss("boxes", "kl", exponent=exponent)(student, teacher) for exponent in (2.0, 0.0))
    assert weighted > 0.95 * alone
    assert plain < 0.001 * alone


def test_kl_of_a_false_positive_of_the_student_counts() -> None:
    teacher = torch.full((1, 1000, 1), -8.0)
    student = teacher.clone()
    student[0, 0] = 3.0
    assert build_loss("boxes", "kl")(student, teacher).item() == pytest.approx(math.log1p(math.exp(3)), rel=0.01)


def test_kl_refuses_other_shapes_and_prints_both() -> None:
    loss = build_loss("boxes", "kl")
    with pytest.raises(ValueError, match=r"\(2, 5, 3\).*\(2, 4, 3\)"):
        loss(torch.zeros(2, 5, 3), torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match=r"anchors, classes.*\(5, 3\)"):
        loss(torch.zeros(5, 3), torch.zeros(5, 3))


# --- giou -------------------------------------------------------------------------------------------------------------
def giou_by_loop(first: list[float], second: list[float]) -> float:
    """Of two boxes [lower corner, upper corner] in plain numbers."""
    dimension = len(first) // 2
    intersection = hull = 1.0
    for axis in range(dimension):
        edges = [(box[axis], box[axis + dimension]) for box in (first, second)]
        intersection *= max(0.0, min(edges[0][1], edges[1][1]) - max(edges[0][0], edges[1][0]))
        hull *= max(edges[0][1], edges[1][1]) - min(edges[0][0], edges[1][0])
    sizes = [math.prod(box[axis + dimension] - box[axis] for axis in range(dimension)) for box in (first, second)]
    union = sum(sizes) - intersection
    return intersection / union - (hull - union) / hull


def test_giou_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0, 3.0, 2.0], [2.0, 0.0, 3.0, 1.0]])
    losses = [1 - 2 / 6, 1 - (0 - 1 / 3)]  # overlap by a third of the union; a gap of a third of the hull
    value = build_loss("boxes", "giou")(student, teacher, torch.tensor([1.0, 0.5]))
    assert value.item() == pytest.approx((losses[0] + 0.5 * losses[1]) / 1.5, rel=1e-5)


@dimensions
def test_giou_against_a_loop_and_monai(dimension: int) -> None:
    student, teacher, scores = random_boxes(dimension)
    each = np.array([1 - giou_by_loop(s, t) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)])
    assert each.min() < 1 < each.max()  # overlapping and separate boxes
    value = build_loss("boxes", "giou")(student, teacher, scores)
    assert value.item() == pytest.approx(np.average(each, weights=scores.numpy()))
    of_monai = 1 - box_pair_giou(student.float(), teacher.float())
    torch.testing.assert_close(value.float(), (of_monai * scores.float()).sum() / scores.float().sum())


@dimensions
def test_giou_gradient_is_that_of_finite_differences(dimension: int) -> None:
    student, teacher, scores = random_boxes(dimension)
    loss = build_loss("boxes", "giou")
    assert torch.autograd.gradcheck(lambda boxes: loss(boxes, teacher, scores), (student.requires_grad_(),))


@dimensions
def test_giou_falls_along_its_gradient_also_between_separate_boxes(dimension: int) -> None:
    teacher = torch.tensor([[20.0] * dimension + [24.0] * dimension], dtype=torch.float64)
    student = (teacher - 15).requires_grad_()
    loss, values = build_loss("boxes", "giou"), []
    for _ in range(100):
        values.append(loss(student, teacher, torch.ones(1)))
        (gradient,) = torch.autograd.grad(values[-1], student)
        student = (student - 0.1 * gradient / gradient.norm()).detach().requires_grad_()
    assert values[0] > 1.5
    assert all(later < earlier for earlier, later in pairwise(values))


@dimensions
def test_giou_does_not_depend_on_order_place_or_unit(dimension: int) -> None:
    student, teacher, scores = random_boxes(dimension)
    loss = build_loss("boxes", "giou")
    expected = loss(student, teacher, scores)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(student[order], teacher[order], scores[order]), expected)
    torch.testing.assert_close(loss(3 * student - 50, 3 * teacher - 50, 0.5 * scores), expected)
    assert loss(teacher, teacher, scores).item() == pytest.approx(0, abs=1e-12)


@dimensions
def test_giou_of_degenerate_boxes_is_finite(dimension: int) -> None:
    """Of no length, of a negative length, and both; as a student at its start may predict."""
    proper = torch.tensor([1.0] * dimension + [4.0] * dimension)
    flat, inverted = proper.clone(), proper.clone()
    flat[dimension] = 1.0
    inverted[dimension:] = 0.0
    student = torch.stack([flat, inverted, flat, proper]).requires_grad_()
    teacher = torch.stack([proper, proper, flat, flat])
    for index, expected in enumerate([1.0, 1.0, 0.0, 1.0]):
        value = build_loss("boxes", "giou")(student[[index]], teacher[[index]], torch.ones(1))
        assert value.item() == pytest.approx(expected, abs=1e-6)
    build_loss("boxes", "giou")(student, teacher, torch.ones(4)).backward()
    assert student.grad.isfinite().all()


def test_giou_of_an_overflow_reaches_the_gradient_scaler() -> None:
    student, teacher, scores = random_boxes(3)
    student[3, 4] = torch.inf
    assert build_loss("boxes", "giou")(student, teacher, scores).isnan()


def test_giou_refuses_other_shapes_and_prints_them() -> None:
    loss = build_loss("boxes", "giou")
    with pytest.raises(ValueError, match=r"\(5, 6\).*\(4, 6\).*\(5,\)"):
        loss(torch.zeros(5, 6), torch.zeros(4, 6), torch.zeros(5))
    with pytest.raises(ValueError, match=r"scores \(4,\)"):
        loss(torch.zeros(5, 6), torch.zeros(5, 6), torch.zeros(4))
    with pytest.raises(ValueError, match=r"\(5, 5\)"):
        loss(torch.zeros(5, 5), torch.zeros(5, 5), torch.zeros(5))


def test_giou_keeps_its_threshold_for_the_caller() -> None:
    assert build_loss("boxes", "giou").threshold == 0.5
    assert build_loss("boxes", "giou", threshold=0).threshold == 0
    assert build_loss("boxes", "giou", threshold=1.0).threshold == 1


# --- both -------------------------------------------------------------------------------------------------------------
def test_nothing_to_compare_is_zero_with_a_gradient_of_zeros() -> None:
    for loss, width in ((build_loss("boxes", "kl"), 3), (build_loss("boxes", "giou"), 6)):
        maps = torch.randn(4, width, requires_grad=True)
        none = maps[:0].expand(2, 0, 3) if width == 3 else maps[:0]
        value = loss(none, none.detach(), *([] if width == 3 else [torch.zeros(0)]))
        value.backward()
        assert value.item() == 0
        assert torch.equal(maps.grad, torch.zeros_like(maps))


def test_scores_of_zero_are_zero_with_a_gradient_of_zeros() -> None:
    student, teacher, scores = random_boxes(3)
    value = build_loss("boxes", "giou")(student.requires_grad_(), teacher, 0 * scores)
    value.backward()
    assert value.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


@half_types
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    boxes = random_boxes(3)
    for loss, inputs in ((build_loss("boxes", "kl"), random_logits()), (build_loss("boxes", "giou"), boxes)):
        exact = loss(*inputs)
        near = [values.to(dtype) for values in inputs]
        near[0].requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(*near)
        value.backward()
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(*[values.float() for values in near]))
        torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=0)
        assert near[0].grad.dtype == dtype
        assert near[0].grad.isfinite().all()


def test_huge_logits_and_boxes_stay_finite_in_half_precision() -> None:
    for sign in (1, -1):
        student = torch.full((1, 4, 2), sign * 6e4, dtype=torch.float16, requires_grad=True)
        value = build_loss("boxes", "kl")(student, torch.full_like(student, -6e4))
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()
    student = torch.tensor([[-3e4] * 3 + [3e4] * 3], dtype=torch.float16, requires_grad=True)
    value = build_loss("boxes", "giou")(student, student.detach() / 2, torch.ones(1))
    value.backward()
    assert value.item() == pytest.approx(7 / 8)
    assert student.grad.isfinite().all()


def test_gradient_does_not_reach_the_teacher_or_the_scores() -> None:
    student, teacher, scores = (values.requires_grad_() for values in random_boxes(3))
    build_loss("boxes", "giou")(student, teacher, scores).backward()
    assert student.grad.abs().sum(dim=1).min() > 0
    assert (teacher.grad, scores.grad) == (None, None)
    student, teacher = (logits.requires_grad_() for logits in random_logits())
    build_loss("boxes", "kl")(student, teacher).backward()
    assert student.grad.abs().min() > 0
    assert teacher.grad is None


def test_nothing_waits_for_the_device() -> None:
    with FakeTensorMode():
        logits = torch.empty(2, 9, 3, requires_grad=True)
        build_loss("boxes", "kl")(logits, torch.empty(2, 9, 3)).backward()
        boxes = torch.empty(4, 6, requires_grad=True)
        build_loss("boxes", "giou")(boxes, torch.empty(4, 6), torch.empty(4)).backward()


@pytest.mark.gpu
def test_cuda_equals_cpu_and_never_waits() -> None:
    for loss, inputs in ((build_loss("boxes", "kl"), random_logits()), (build_loss("boxes", "giou"), random_boxes(3))):
        expected = loss(*inputs)
        on_gpu = [values.cuda() for values in inputs]
        on_gpu[0].requires_grad_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast("cuda"):
                value = loss(*on_gpu)
            value.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(value.cpu(), expected)
