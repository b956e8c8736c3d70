"""Features imitated inside and around boxes, against a loop over positions, channels and boxes."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_kd.losses import build_loss
from nnunet_kd.losses.imitation import scale_mask

dimensions = pytest.mark.parametrize("dimension", [2, 3])
GRIDS = {2: (5, 6), 3: (4, 3, 5)}
PATCHES = {2: (20, 18), 3: (16, 9, 20)}  # strides (4, 3) and (4, 3, 4)
BOXES = {
    2: [[[0, 0, 7, 9], [4, 3, 8, 6], [17, 16, 20, 18]], [], [[6, 2, 6.5, 2.5]]],
    3: [[[0, 0, 0, 7, 9, 8], [4, 3, 4, 8, 6, 8]], [], [[9, 4, 18, 9.5, 4.5, 20]]],
}


class Batch:
    """Student and teacher [3, 4, *grid]; the first patch has boxes that overlap, the second none, the third one."""

    def __init__(self, dimension: int) -> None:
        random = torch.Generator().manual_seed(dimension)
        self.student, self.teacher = torch.randn(2, 3, 4, *GRIDS[dimension], generator=random, dtype=torch.float64)
        self.boxes = [torch.tensor(boxes).view(-1, 2 * dimension) for boxes in BOXES[dimension]]
        self.patch = PATCHES[dimension]

    @property
    def where(self) -> tuple[list[Tensor], tuple[int, ...]]:
        return self.boxes, self.patch


def loop_over_boxes(boxes: Tensor, patch: tuple[int, ...], grid: tuple[int, ...]) -> np.ndarray:
    """Scale mask [*grid]: of each position, 1 / (positions of the smallest box that touches it)."""
    dimension, mask = len(grid), np.zeros(grid)
    for box in boxes.tolist():
        covered = []
        for position in product(*map(range, grid)):
            touches = True
            for axis, index in enumerate(position):
                step = patch[axis] / grid[axis]
                touches &= box[axis] < (index + 1) * step and box[axis + dimension] > index * step
            if touches:
                covered.append(position)
        for position in covered:
            mask[position] = max(mask[position], 1 / len(covered))
    return mask


def attention(features: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Over positions [*grid] and over channels [C] of one sample [C, *grid]."""
    magnitude = np.abs(features)
    spatial = magnitude[0].size * softmax(magnitude.mean(0) / temperature)
    return spatial, len(features) * softmax(magnitude.reshape(len(features), -1).mean(1) / temperature)


@dimensions
@pytest.mark.parametrize("standardise", [True, False])
def test_against_a_loop(dimension: int, standardise: bool) -> None:
    batch, temperature, weights = Batch(dimension), 0.7, {"alpha": 0.9, "beta": 0.6, "gamma": 1.3}
    foreground, background, scales, attentions = 0.0, [], 0.0, []
    for sample in range(3):
        pair = [features[sample].numpy() for features in (batch.student, batch.teacher)]
        if standardise:
            axes = tuple(range(1, dimension + 1))
            pair = [(f - f.mean(axes, keepdims=True)) / np.sqrt(f.var(axes, keepdims=True) + 1e-5) for f in pair]
        (student_spatial, student_channel), (spatial, channel) = (attention(f, temperature) for f in pair)
        attentions.append(np.abs(student_spatial - spatial).mean() + np.abs(student_channel - channel).mean())
        scale = loop_over_boxes(batch.boxes[sample], batch.patch, GRIDS[dimension])
        for position in product(*map(range, GRIDS[dimension])):
            error = 0.0
            for c in range(4):
                error += channel[c] * (pair[0][c][position] - pair[1][c][position]) ** 2 / 4
            error *= spatial[position]
            if scale[position]:
                foreground += scale[position] * error
                scales += scale[position]
            else:
                background.append(error)
    expected = 0.9 * foreground / scales + 0.6 * np.mean(background) + 1.3 * np.mean(attentions)
    loss = build_loss("boxes", "imitation", temperature=temperature, standardise=standardise, **weights)
    assert loss(batch.student, batch.teacher, *batch.where).item() == pytest.approx(expected, rel=1e-6)


@dimensions
def test_scale_mask_against_a_loop(dimension: int) -> None:
    batch = Batch(dimension)
    for boxes in batch.boxes:
        expected = loop_over_boxes(boxes, batch.patch, GRIDS[dimension])
        np.testing.assert_allclose(scale_mask(boxes, batch.patch, GRIDS[dimension]), expected, rtol=1e-6)


def test_scale_mask_by_hand() -> None:
    boxes = torch.tensor([[0, 0, 8, 8], [4, 4, 8, 12]])  # 2 x 2 positions, and 1 x 2 that share one with it
    expected = [[1 / 4, 1 / 4, 0], [1 / 4, 1 / 2, 1 / 2], [0, 0, 0]]
    assert scale_mask(boxes, (12, 12), (3, 3)).tolist() == expected


@pytest.mark.parametrize("box", [[0, 0, 0, 0], [48.5, 20, 48.6, 20], [49, 49, 49, 49], [50, 50, 50, 50], [3, 3, 2, 2]])
def test_a_box_covers_at_least_one_position(box: list[float]) -> None:
    assert sorted(scale_mask(torch.tensor([box]), (49, 49), (7, 7)).flatten().tolist())[-2:] == [0, 1]


@pytest.mark.parametrize("stride", [1, 4, 7])
def test_whole_edges_are_exact(stride: int) -> None:
    """A box of one position is not rounded into the next one; multiplying by the rounded 1 / 7 would do so."""
    for position in range(25):
        box = torch.tensor([[stride * position, 0, stride * (position + 1), 1]])
        mask = scale_mask(box, (25 * stride, 1), (25, 1)).flatten()
        assert mask.nonzero().flatten().tolist() == [position]


def test_boxes_count_the_same_whatever_their_size() -> None:
    """The same error at every position of a box of 1 and of a box of 16."""
    teacher = torch.ones(1, 2, 8, 8, dtype=torch.float64)  # all positions have one attention
    boxes = [torch.tensor([[0, 0, 1, 1], [4, 4, 8, 8]])]
    loss = build_loss("boxes", "imitation", standardise=False, alpha=1, beta=0, gamma=0)

    def error_in(start: int, end: int) -> float:
        student = teacher.clone()
        student[:, :, start:end, start:end] += 0.1
        return loss(student, teacher, boxes, (8, 8)).item()

    assert error_in(0, 1) == pytest.approx(0.1**2 / 2)
    assert error_in(4, 8) == pytest.approx(0.1**2 / 2)
    assert error_in(2, 3) == 0  # background


def test_without_boxes_only_the_background_remains() -> None:
    batch = Batch(3)
    none = [torch.zeros(0, 6)] * 3
    whole = [torch.tensor([[0, 0, 0, *batch.patch]])] * 3

    def value(boxes: list[Tensor], alpha: float, beta: float) -> float:
        loss = build_loss("boxes", "imitation", alpha=alpha, beta=beta, gamma=0)
        return loss(batch.student, batch.teacher, boxes, batch.patch).item()

    assert value(none, 1, 0) == value(whole, 0, 1) == 0
    assert value(none, 0, 1) == pytest.approx(value(whole, 1, 0)) != 0
    student = batch.student.requires_grad_()
    loss = build_loss("boxes", "imitation", beta=0, gamma=0)
    loss(student, batch.teacher, none, batch.patch).backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


@dimensions
@pytest.mark.parametrize("standardise", [True, False])
def test_equal_features_are_the_minimum_of_zero(dimension: int, standardise: bool) -> None:
    batch, loss = Batch(dimension), build_loss("boxes", "imitation", standardise=standardise)
    at_minimum = batch.teacher.clone().requires_grad_()
    value = loss(at_minimum, batch.teacher, *batch.where)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert at_minimum.grad.abs().max() < 1e-12
    for sample in range(3):
        other = batch.teacher.clone()
        other[sample, 1] = batch.student[sample, 1]
        assert loss(other, batch.teacher, *batch.where) > 1e-3


@dimensions
@pytest.mark.parametrize("standardise", [True, False])
def test_gradient_is_that_of_finite_differences(dimension: int, standardise: bool) -> None:
    batch, loss = Batch(dimension), build_loss("boxes", "imitation", standardise=standardise)
    student = batch.student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values: loss(values, batch.teacher, *batch.where), (student,), fast_mode=True
    )


def test_gradient_reaches_the_student_and_not_the_teacher() -> None:
    batch, loss = Batch(3), build_loss("boxes", "imitation")
    student, teacher = batch.student.requires_grad_(), batch.teacher.requires_grad_()
    loss(student, teacher, *batch.where).backward()
    assert teacher.grad is None
    assert student.grad.flatten(2).abs().sum(dim=2).min() > 0  # every sample and channel


def test_order_of_boxes_channels_and_samples_does_not_matter() -> None:
    batch, loss = Batch(3), build_loss("boxes", "imitation")
    expected = loss(batch.student, batch.teacher, *batch.where)
    samples, channels = [2, 0, 1], [3, 1, 0, 2]
    student, teacher = (features[samples][:, channels] for features in (batch.student, batch.teacher))
    boxes = [batch.boxes[sample].flip(0) for sample in samples]
    torch.testing.assert_close(loss(student, teacher, boxes, batch.patch), expected)


def test_value_does_not_grow_with_batch_channels_grid_or_boxes() -> None:
    """Random features are of order 1; repeated features give the same value."""
    batch, loss = Batch(2), build_loss("boxes", "imitation")
    expected = loss(batch.student, batch.teacher, *batch.where)
    student, teacher = (torch.cat([f, f]) for f in (batch.student, batch.teacher))
    torch.testing.assert_close(loss(student, teacher, 2 * batch.boxes, batch.patch), expected)
    student, teacher = (torch.cat([f, f], dim=1) for f in (batch.student, batch.teacher))
    torch.testing.assert_close(loss(student, teacher, *batch.where), expected)
    fine = [f.repeat_interleave(2, dim=2).repeat_interleave(3, dim=3) for f in (batch.student, batch.teacher)]
    whole_positions = [torch.tensor([[4, 3, 12, 9]]), torch.zeros(0, 4), torch.tensor([[0, 0, 4, 18]])]
    expected = loss(batch.student, batch.teacher, whole_positions, batch.patch)
    torch.testing.assert_close(loss(*fine, whole_positions, batch.patch), expected)
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 32, 16, 16, 16, generator=random)
    for count in (1, 10):
        lower = torch.randint(0, 48, (count, 3), generator=random)
        boxes = 2 * [torch.cat([lower, lower + 12], dim=1)]
        assert 1 < loss(student, teacher, boxes, (64, 64, 64)) < 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    batch, loss = Batch(3), build_loss("boxes", "imitation")
    exact = loss(batch.student, batch.teacher, *batch.where)
    student, teacher = batch.student.to(dtype).requires_grad_(), batch.teacher.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher, *batch.where)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(student.float(), teacher.float(), *batch.where))
    torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=0)
    assert student.grad.dtype == dtype
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("size", [0.0, 1.0, 6e4])
def test_constant_and_huge_features_stay_finite(standardise: bool, size: float) -> None:
    batch, loss = Batch(3), build_loss("boxes", "imitation", standardise=standardise)
    student = (size * batch.student.sign()).half().requires_grad_()
    for teacher in (torch.full_like(student, size), -student):
        value = loss(student, teacher, *batch.where)
        value.backward()
        assert value.isfinite()
        assert math.isfinite(student.grad.float().abs().max()) or size > 1  # float16 cannot hold the largest gradients


def test_a_grid_of_one_position() -> None:
    student, teacher = torch.randn(2, 2, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    boxes = [torch.tensor([[3.0, 3.0, 4.0, 5.0]]), torch.zeros(0, 4)]
    assert build_loss("boxes", "imitation", standardise=False)(student, teacher, boxes, (8, 8)) > 0.1
    assert build_loss("boxes", "imitation")(student, teacher, boxes, (8, 8)) == 0  # standardised, nothing is left


def test_shapes_that_do_not_fit_are_refused_and_printed() -> None:
    batch, loss = Batch(3), build_loss("boxes", "imitation")
    features = str(tuple(batch.student.shape))
    for boxes, patch in (
        (batch.boxes[:2], batch.patch),
        ([*batch.boxes[:2], torch.zeros(1, 4)], batch.patch),
        (batch.boxes, (16, 9)),
    ):
        with pytest.raises(ValueError, match=r"ImitationLoss.*one tensor \[n, 6\].*3 samples.*3 lengths") as error:
            loss(batch.student, batch.teacher, boxes, patch)
        assert features in str(error.value)
        assert str(patch) in str(error.value)
    with pytest.raises(ValueError, match="student has"):
        loss(batch.student, batch.teacher[:, :1], *batch.where)


def test_nothing_waits_for_the_device() -> None:
    with FakeTensorMode():
        student = torch.empty(2, 4, 4, 3, 5, requires_grad=True)
        boxes = [torch.empty(2, 6), torch.empty(0, 6)]
        build_loss("boxes", "imitation")(student, torch.empty(2, 4, 4, 3, 5), boxes, (16, 9, 20)).backward()


@pytest.mark.gpu
def test_cuda_equals_cpu_and_never_waits() -> None:
    batch, loss = Batch(3), build_loss("boxes", "imitation")
    expected = loss(batch.student, batch.teacher, *batch.where)
    student, teacher = batch.student.cuda().requires_grad_(), batch.teacher.cuda()
    boxes = [of_sample.cuda() for of_sample in batch.boxes]
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(student, teacher, boxes, batch.patch)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(value.cpu(), expected)
