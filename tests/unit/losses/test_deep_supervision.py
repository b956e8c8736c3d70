"""One teacher at full resolution for all levels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d

from nnunet_kd.losses import build_loss
from nnunet_kd.losses.deep_supervision import deep_supervision_loss

GRIDS = [(8, 8, 4), (4, 4, 4), (2, 2, 2)]
WEIGHTS = [4 / 7, 2 / 7, 1 / 7]


@pytest.fixture
def levels() -> dict[str, list[Tensor]]:
    random = torch.Generator().manual_seed(0)
    return {
        "students": [torch.randn(2, 3, *grid, generator=random) for grid in GRIDS],
        "targets": [torch.randint(0, 3, (2, 1, *grid), generator=random) for grid in GRIDS],
        "valids": [torch.rand(2, 1, *grid, generator=random) < 0.7 for grid in GRIDS],
    }


@pytest.fixture
def teacher() -> Tensor:
    return torch.randn(2, 3, 8, 8, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("with_masks", [True, False])
def test_weighted_sum_with_averaged_teacher(levels: dict[str, list[Tensor]], teacher: Tensor, with_masks: bool) -> None:
    loss = build_loss("logits", "kl", balance="class")
    teachers = [teacher, avg_pool3d(teacher, (2, 2, 1)), avg_pool3d(teacher, (4, 4, 2))]
    expected = 0.0
    for level, weight in enumerate(WEIGHTS):
        masks = {"target": levels["targets"][level], "valid": levels["valids"][level]} if with_masks else {}
        expected += weight * loss(levels["students"][level], teachers[level], **masks).item()
    masks = {"targets": levels["targets"], "valids": levels["valids"]} if with_masks else {}
    value = deep_supervision_loss(loss, levels["students"], teacher, WEIGHTS, **masks)
    assert value.item() == pytest.approx(expected)


def test_levels_of_weight_zero_are_not_touched(levels: dict[str, list[Tensor]], teacher: Tensor) -> None:
    students = [student.requires_grad_() for student in levels["students"]]
    students[2] = torch.full((1, 1, 1, 1), torch.nan)  # not even a shape that fits
    deep_supervision_loss(build_loss("logits", "kl"), students, teacher, [0.5, 0.5, 0.0]).backward()
    assert students[0].grad.abs().sum() > 0
    assert students[1].grad.abs().sum() > 0


def test_teacher_is_averaged_in_float32(levels: dict[str, list[Tensor]], teacher: Tensor) -> None:
    loss, weights = build_loss("logits", "kl"), [0.0, 0.0, 1.0]
    rounded = teacher.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = deep_supervision_loss(loss, levels["students"], rounded, weights)
    assert value.dtype == torch.float32
    assert torch.equal(value, deep_supervision_loss(loss, levels["students"], rounded.float(), weights))


def test_a_teacher_gets_no_gradient(levels: dict[str, list[Tensor]], teacher: Tensor) -> None:
    students = [student.requires_grad_() for student in levels["students"]]
    teacher.requires_grad_()
    deep_supervision_loss(build_loss("logits", "cwd"), students, teacher, WEIGHTS).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", ["weights", "targets", "valids"])
def test_as_many_of_everything_as_levels(levels: dict[str, list[Tensor]], teacher: Tensor, name: str) -> None:
    arguments = {"weights": WEIGHTS, "targets": levels["targets"], "valids": levels["valids"]}
    arguments[name] = arguments[name][:2]
    with pytest.raises(ValueError, match=f"3 levels of student logits, but 2 {name}"):
        deep_supervision_loss(build_loss("logits", "kl"), levels["students"], teacher, **arguments)
