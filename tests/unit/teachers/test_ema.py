"""The moving average of the student's weights as a teacher."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_kd.data.tasks import Tasks
from nnunet_kd.errors import SettingsError, TeacherError
from nnunet_kd.networks.taps import find_stage, tap
from nnunet_kd.settings import Teacher, Term
from nnunet_kd.teachers.base import HiddenCases
from nnunet_kd.teachers.ema import LOGITS, EMATeacher


def network() -> PlainConvUNet:
    return PlainConvUNet(
        1, 2, (4, 8), nn.Conv2d, 3, (1, 2), 1, 3, 1, conv_bias=True, norm_op=nn.BatchNorm2d, deep_supervision=True
    )


def student(segmentation: bool = True) -> Any:
    from nnunet_kd.spaces.labels import LabelSpace

    space = LabelSpace.from_dataset_json({"labels": {"background": 0, "a": 1, "b": 2}})
    tasks = replace(Tasks.from_dataset_json({}), segmentation=segmentation)
    return SimpleNamespace(tasks=tasks, label_space=space, dataset="Dataset001_A")


def teacher(decay: float = 0.9) -> EMATeacher:
    own = EMATeacher("ema", Teacher(kind="ema", decay=decay), student())
    own.load(torch.device("cpu"), [], set(), False, HiddenCases())
    return own


def change(net: nn.Module) -> None:
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight))
        net(torch.randn(4, 1, 8, 8))  # moves the batch norm's running mean


def test_weights_are_the_moving_average_of_the_students() -> None:
    torch.manual_seed(0)
    net, own = network(), teacher(decay=0.9)
    own.follow(net)
    first = next(net.parameters())
    expected = first.detach().numpy().copy()
    for step in range(30):
        change(net)
        own.after_step()
        decay = min(1 - 1 / (step + 1), 0.9)
        expected = decay * expected + (1 - decay) * first.detach().numpy()
    np.testing.assert_allclose(next(own.network.parameters()), expected, rtol=1e-4, atol=1e-5)
    for mine, other in zip(own.network.buffers(), net.buffers(), strict=True):
        assert torch.equal(mine, other)
    assert not any(weight.requires_grad for weight in own.network.parameters())


def test_logits_are_those_of_its_network_without_deep_supervision() -> None:
    torch.manual_seed(0)
    net, own = network(), teacher()
    tap(net, [find_stage(net, "bottleneck")])
    own.follow(net)
    image = torch.randn(2, 1, 16, 16)
    expected = copy.deepcopy(net).eval()(image)[0]
    output = own({"data": image}, {"segmentation"})
    torch.testing.assert_close(output.logits, expected.detach())
    assert not output.logits.requires_grad
    assert net.training
    known = torch.zeros(2, 3, 16, 16)
    assert own({"data": image, LOGITS: known}, {"segmentation"}).logits is known


def test_state_goes_on_where_it_was() -> None:
    torch.manual_seed(0)
    net, own = network(), teacher()
    own.follow(net)
    for _ in range(3):
        change(net)
        own.after_step()
    restored = teacher()
    restored.follow(net)
    restored.load_state(copy.deepcopy(own.state()))
    change(net)
    for other in (own, restored):
        other.after_step()
    for mine, other in zip(own.network.parameters(), restored.network.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_what_it_cannot_do() -> None:
    with pytest.raises(TeacherError, match="has no model"):
        EMATeacher("ema", Teacher(kind="ema", model="Dataset001_A/x"), student())
    with pytest.raises(TeacherError, match="teaches segmentation"):
        EMATeacher("ema", Teacher(kind="ema"), student(segmentation=False))
    with pytest.raises(SettingsError, match=r"terms\[3\].on.*logits only"):
        teacher().check_term(Term("ema", "features", "mse", levels=["bottleneck"]), "terms[3]")
