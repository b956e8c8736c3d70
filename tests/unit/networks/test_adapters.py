"""Projectors bring the student's feature to the teacher's width and both to the coarser grid."""

from __future__ import annotations

import pytest
import torch

from nnunet_kd.networks.adapters import Projector, resize


@pytest.mark.parametrize("dimension", [2, 3])
def test_one_grid_needs_only_the_convolution(dimension: int) -> None:
    projector = Projector(dimension, 3, 5)
    student, teacher = torch.randn(2, 3, *[4] * dimension), torch.randn(2, 5, *[4] * dimension)
    projected, target = projector(student, teacher)
    weight, bias = projector.convolution.weight.flatten(1), projector.convolution.bias
    expected = torch.einsum("oc,bc...->bo...", weight, student) + bias.view(1, -1, *[1] * dimension)
    torch.testing.assert_close(projected, expected)
    assert target is teacher


def test_both_come_to_the_coarser_grid_per_axis() -> None:
    projector = Projector(3, 2, 2)
    with torch.no_grad():
        projector.convolution.weight.copy_(torch.eye(2).view(2, 2, 1, 1, 1))
        projector.convolution.bias.zero_()
    student, teacher = torch.randn(1, 2, 4, 8, 4), torch.randn(1, 2, 8, 4, 4)
    projected, target = projector(student, teacher)
    expected_student = student.view(1, 2, 4, 4, 2, 4).mean(4)
    expected_teacher = teacher.view(1, 2, 4, 2, 4, 4).mean(3)
    torch.testing.assert_close(projected, expected_student)
    torch.testing.assert_close(target, expected_teacher)


def test_half_precision_teacher_is_read_in_the_students_precision() -> None:
    projected, target = Projector(2, 1, 1)(torch.randn(1, 1, 4, 4), torch.randn(1, 1, 2, 2, dtype=torch.bfloat16))
    assert projected.dtype == target.dtype == torch.float32


def test_gradient_reaches_student_and_projector_not_the_teacher() -> None:
    projector = Projector(2, 1, 1)
    student, teacher = torch.randn(1, 1, 4, 4, requires_grad=True), torch.randn(1, 1, 4, 4)
    projected, target = projector(student, teacher)
    (projected - target).square().sum().backward()
    assert student.grad is not None
    assert projector.convolution.weight.grad is not None


def test_resize_to_the_same_grid_copies_nothing() -> None:
    feature = torch.randn(1, 1, 3, 3)
    assert resize(feature, [3, 3]) is feature
