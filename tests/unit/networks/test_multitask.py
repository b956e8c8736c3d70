"""The multi-task network against the stock network, built as nnU-Net builds them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_kd.errors import SettingsError
from nnunet_kd.networks.multitask import (
    UNTRAINED,
    MultiTaskUNet,
    TaskOutputs,
    multitask_architecture,
    planned_heads,
    stock_architecture,
    stock_weights,
)
from nnunet_kd.networks.taps import find_stage
from nnunet_kd.networks.width import scale_width
from nnunet_kd.tasks.detection_head import PRIOR_PROBABILITY

CLASSIFICATION = {"targets": [["grade", 4], ["sex", 2]], "pooling": "attention", "stages": 2}
DETECTION = {"strides": [[1, 1], [2, 2]], "anchors": [[[4, 4], [6, 6]], [[9, 9], [12, 12]]], "classes": ["a", "b", "c"]}


def stock_plans(kind: str, features: list[int], strides: list[int], kernel: int = 3) -> dict[str, Any]:
    stages = len(features)
    blocks = {"plain": {"n_conv_per_stage": [2] * stages}, "residual": {"n_blocks_per_stage": [1] * stages}}[kind]
    name = {"plain": "PlainConvUNet", "residual": "ResidualEncoderUNet"}[kind]
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": features,
            "conv_op": "torch.nn.modules.conv.Conv2d",
            "kernel_sizes": [[kernel, kernel]] * stages,
            "strides": [[step, step] for step in strides],
            "n_conv_per_stage_decoder": [2 if kind == "plain" else 1] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
            **blocks,
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def build(architecture: dict[str, Any], deep_supervision: bool = False) -> Any:
    torch.manual_seed(0)
    plans = json.loads(json.dumps(architecture))
    return get_network_from_plans(
        plans["network_class_name"],
        plans["arch_kwargs"],
        plans["_kw_requires_import"],
        1,
        3,
        deep_supervision=deep_supervision,
    )


@pytest.fixture(params=["plain", "residual"])
def stock(request: pytest.FixtureRequest) -> dict[str, Any]:
    return stock_plans(request.param, [8, 12, 16], [1, 2, 2])


def as_list(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return outputs if isinstance(outputs, list) else [outputs]


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_segmentation_is_the_stock_networks_from_the_same_seed(stock: dict[str, Any], deep_supervision: bool) -> None:
    plain = build(stock, deep_supervision)
    network = build(multitask_architecture(stock, CLASSIFICATION, DETECTION), deep_supervision)
    assert isinstance(network, MultiTaskUNet)
    image = torch.randn(2, 1, 16, 16)
    expected, outputs = as_list(plain(image)), as_list(network(image))
    in_one_pass = network(image, tasks=True)
    assert isinstance(in_one_pass, TaskOutputs)
    assert len(expected) == len(outputs) == len(in_one_pass.segmentation) == (2 if deep_supervision else 1)
    for one, other, third in zip(expected, outputs, in_one_pass.segmentation, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(third, one)


def test_weights_without_heads_are_the_stock_ones_in_keys_and_order(stock: dict[str, Any]) -> None:
    plain, network = build(stock), build(multitask_architecture(stock, CLASSIFICATION, DETECTION))
    assert list(stock_weights(network.state_dict())) == list(plain.state_dict())
    for weight in plain.parameters():
        nn.init.normal_(weight)
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert {key.split(".")[0] for key in missing} == {"heads"}
    image = torch.randn(1, 1, 16, 16)
    assert torch.equal(network(image), plain(image))
    plain.load_state_dict(stock_weights(network.state_dict()))


def test_task_outputs_have_the_planned_shapes(stock: dict[str, Any]) -> None:
    network = build(multitask_architecture(stock, CLASSIFICATION, DETECTION)).eval()
    image = torch.randn(2, 1, 16, 16)
    outputs = network.forward_tasks(image)
    assert {name: tuple(logits.shape) for name, logits in outputs.classification.items()} == {
        "grade": (2, 4),
        "sex": (2, 2),
    }
    skips = network.encoder(image)
    assert [value.shape[1] for value in outputs.pooled.values] == [12, 16]  # the deepest two stages
    torch.testing.assert_close(network.heads.classification(skips)["grade"], outputs.classification["grade"])
    assert [tuple(level.shape[1:]) for level in outputs.detection.class_logits] == [(6, 16, 16), (6, 8, 8)]
    assert [tuple(level.shape[1:]) for level in outputs.detection.box_regression] == [(8, 16, 16), (8, 8, 8)]


def test_features_come_from_the_same_pass(stock: dict[str, Any]) -> None:
    network = build(multitask_architecture(stock, CLASSIFICATION, DETECTION)).eval()
    image = torch.randn(1, 1, 16, 16)
    network.tapped_stages = (find_stage(network, "bottleneck"), find_stage(network, "decoder@1/1"))
    outputs = network(image, tasks=True)
    torch.testing.assert_close(outputs.features[0], network.encoder(image)[-1])
    torch.testing.assert_close(network.decoder.seg_layers[-1](outputs.features[1]), outputs.segmentation[0])


def test_classification_alone_can_leave_the_decoder_out(stock: dict[str, Any]) -> None:
    network = build(multitask_architecture(stock, CLASSIFICATION, None)).eval()
    image = torch.randn(1, 1, 16, 16)
    whole, outputs = network(image, tasks=True), network(image, tasks=True, segmentation=False)
    assert outputs.segmentation == []
    assert outputs.detection is None
    torch.testing.assert_close(outputs.classification["grade"], whole.classification["grade"])
    outputs.pooled.values[0].sum().backward()
    assert all(weight.grad is None for weight in network.decoder.seg_layers.parameters())


COARSE = {"strides": [[2, 2]], "anchors": [[[9, 9]]], "classes": ["a"]}


@pytest.mark.parametrize("boxes", [None, DETECTION, COARSE], ids=["classes", "all levels", "one coarse level"])
def test_without_segmentation_all_that_the_tasks_use_is_trained_and_nothing_else(
    stock: dict[str, Any], boxes: dict[str, Any] | None
) -> None:
    network = build(multitask_architecture(stock, CLASSIFICATION, boxes)).train()
    network.train_tasks(segments=False)
    outputs = network(torch.randn(2, 1, 32, 32))
    used = list(outputs.classification.values()) + (list(outputs.detection.class_logits) if boxes else [])
    used += list(outputs.detection.box_regression) if boxes else []
    sum(output.square().sum() for output in used).backward()
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert all(parameter.requires_grad for parameter in network.encoder.parameters())


def test_heads_keep_their_own_initialisation(stock: dict[str, Any]) -> None:
    """nnU-Net initialises all convolutions after construction, also those of the heads."""
    heads = build(multitask_architecture(stock, CLASSIFICATION, DETECTION)).heads
    torch.testing.assert_close(
        heads.detection.classify.bias.sigmoid(), torch.full_like(heads.detection.classify.bias, PRIOR_PROBABILITY)
    )
    assert heads.detection.regress.weight.std() < 0.02
    assert all(not pool.score.weight.any() for pool in heads.classification.pools)


def test_feature_map_size_is_counted_for_backbone_and_heads(stock: dict[str, Any]) -> None:
    plain = build(stock, True)
    network = build(multitask_architecture(stock, CLASSIFICATION, DETECTION), True)
    counted = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        counted += output.numel()

    for module in network.heads.detection.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network(torch.zeros(1, 1, 16, 16), tasks=True)
    assert network.compute_conv_feature_map_size((16, 16)) == plain.compute_conv_feature_map_size((16, 16)) + counted


def test_a_segmentation_that_was_never_trained_is_warned_of_once(
    stock: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    architecture = multitask_architecture(stock, CLASSIFICATION, None, segmentation=False)
    assert stock_architecture(architecture) == stock
    network, image = build(architecture), torch.zeros(1, 1, 16, 16)
    network.train()(image)
    network.eval()(image, tasks=True)
    build(multitask_architecture(architecture, CLASSIFICATION, None)).eval()(image)
    assert capsys.readouterr().out == ""
    network(image)
    network(image)
    assert capsys.readouterr().out == f"\nWARNING: {UNTRAINED}\n"


def test_plans_block_can_be_rewrapped_scaled_and_unwrapped(stock: dict[str, Any]) -> None:
    wrapped = multitask_architecture(stock, CLASSIFICATION, None)
    assert wrapped["arch_kwargs"]["strides"] == stock["arch_kwargs"]["strides"]  # nnU-Net reads them there
    assert stock_architecture(multitask_architecture(wrapped, None, DETECTION)) == stock
    assert multitask_architecture(wrapped, None, DETECTION) == multitask_architecture(stock, None, DETECTION)
    assert stock_architecture(scale_width(wrapped, 0.5, 2)) == scale_width(stock, 0.5, 2)
    assert planned_heads(wrapped) == (CLASSIFICATION, None)
    assert planned_heads(stock) is None
    image = torch.zeros(1, 1, 16, 16)
    assert build(scale_width(wrapped, 0.5, 2))(image, tasks=True).classification["grade"].shape == (1, 4)


def test_wrong_settings_are_named(stock: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="'poling'"):
        build(multitask_architecture(stock, {**CLASSIFICATION, "poling": "mean"}, None))
    with pytest.raises(SettingsError, match="'targets'"):
        build(multitask_architecture(stock, {}, None))
    with pytest.raises(SettingsError, match=r"\[16, 16\]"):
        build(multitask_architecture(stock, None, {**DETECTION, "strides": [[1, 1], [16, 16]]}))
    broken = multitask_architecture(stock, None, None)
    broken["arch_kwargs"]["backbone"] = "no.such.Network"
    with pytest.raises(SettingsError, match=r"no\.such\.Network"):
        build(broken)


@pytest.mark.parametrize("finest", [1, 2, 4])
def test_a_step_with_all_heads_costs_at_most_a_tenth_more(finest: int) -> None:
    """Floating point operations of forward and backward on a usual 2D plan, wherever the finest level is."""
    architecture = stock_plans("plain", [32, 64, 128, 256, 512, 512, 512], [1, *[2] * 6])
    detection = {
        "strides": [[finest * 2**level] * 2 for level in range(4)],
        "anchors": [[[8, 8], [8, 16], [16, 8]]] * 4,
        "classes": ["a", "b", "c"],
    }
    classification = {"targets": [["grade", 4]], "pooling": "attention"}
    with torch.device("meta"):
        network = build(multitask_architecture(architecture, classification, detection), True)
        image = torch.empty(2, 1, 256, 256)
    flops = []
    for tasks in (False, True):
        with FlopCounterMode(display=False) as counter:
            outputs = network(image, tasks=tasks)
            if tasks:
                flat = [*outputs.segmentation, *outputs.classification.values(), *sum(outputs.detection, ())]
            else:
                flat = outputs
            sum(output.sum() for output in flat).backward()
        flops.append(counter.get_total_flops())
    assert 1 < flops[1] / flops[0] <= 1.10
