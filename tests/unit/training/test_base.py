"""The loss without its Dice part, and which settings a training must keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from nnunet_kd.settings import resolve_settings
from nnunet_kd.training.base import NoDice, _differences

DICE = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}


def without_dice(loss: nn.Module) -> nn.Module:
    loss.dc = NoDice()
    return loss


def test_cross_entropy_remains() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 1, 8, 8)).float()
    loss = without_dice(DC_and_CE_loss(DICE, {}, ignore_label=None, dice_class=MemoryEfficientSoftDiceLoss))
    torch.testing.assert_close(loss(logits, labels), cross_entropy(logits, labels[:, 0].long()))
    loss = without_dice(DC_and_CE_loss(DICE, {}, ignore_label=2, dice_class=MemoryEfficientSoftDiceLoss))
    known = labels[:, 0] != 2
    expected = cross_entropy(logits.movedim(1, -1)[known], labels[:, 0][known].long())
    torch.testing.assert_close(loss(logits, labels), expected)


@pytest.mark.parametrize("ignored", [False, True])
def test_cross_entropy_of_regions_remains(ignored: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 8, 8)
    target = torch.randint(0, 2, (2, 3 if ignored else 2, 8, 8)).float()
    loss = without_dice(DC_and_BCE_loss({}, DICE, use_ignore_label=ignored, dice_class=MemoryEfficientSoftDiceLoss))
    each = binary_cross_entropy_with_logits(logits, target[:, :2], reduction="none")
    known = 1 - target[:, 2:] if ignored else torch.ones(2, 1, 8, 8)
    torch.testing.assert_close(loss(logits, target), (each * known).sum() / (known.sum() if ignored else each.numel()))


def test_a_batch_without_annotations_still_has_a_gradient() -> None:
    logits = torch.randn(1, 3, 8, 8, requires_grad=True)
    loss = without_dice(DC_and_CE_loss(DICE, {}, ignore_label=3, dice_class=MemoryEfficientSoftDiceLoss))
    loss(logits, torch.full((1, 1, 8, 8), 3.0)).backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_weights_may_move_but_not_change() -> None:
    def settings(**own: str) -> dict[str, Any]:
        teacher = {"kind": "foundation", "foundation": own}
        return resolve_settings({"teachers": {"foundation": teacher}}).to_dict()

    before = settings(weights="/a/model.safetensors", sha256="aa")
    assert _differences(before, settings(weights="/b/model.safetensors", sha256="aa")) == []
    assert len(_differences(before, settings(weights="/b/model.safetensors", sha256="bb"))) == 2
    unchecked = (settings(weights=file) for file in ("/a/model.safetensors", "/b/model.safetensors"))
    assert len(_differences(*unchecked)) == 1
