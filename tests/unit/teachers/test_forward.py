"""The teacher's forward: patches that its strides do not divide, and nothing that nobody asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_kd.networks.joint import Head, JointUNet, Route
from nnunet_kd.networks.multitask import MultiTaskUNet
from nnunet_kd.networks.taps import find_stage, forward_unet
from nnunet_kd.teachers.forward import TeacherForward, drop_detection, pooled_channels, speaking_heads

BACKBONE = {
    "input_channels": 1,
    "n_stages": 4,
    "features_per_stage": [2, 3, 4, 5],
    "conv_op": nn.Conv2d,
    "kernel_sizes": 3,
    "strides": [1, 2, 2, 2],
    "n_conv_per_stage": 1,
    "num_classes": 2,
    "n_conv_per_stage_decoder": 1,
    "nonlin": nn.LeakyReLU,
}
CLASSIFICATION = {"targets": [["grade", 3]]}
DETECTION = {"strides": [[2, 2], [4, 4]], "anchors": [[[4.0, 4.0]], [[8.0, 8.0]]], "classes": ["lesion"]}


def with_heads() -> MultiTaskUNet:
    torch.manual_seed(0)
    backbone = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    network = MultiTaskUNet(backbone=backbone, classification=CLASSIFICATION, detection=DETECTION, **BACKBONE)
    return network.eval()


def joint_with_heads() -> JointUNet:
    torch.manual_seed(0)
    heads = {"Dataset001_A": {"classification": CLASSIFICATION, "detection": DETECTION}}
    routes = {"Dataset001_A": Route((0,), 0, 2), "Dataset002_B": Route((0,), 0, 2)}
    unet = PlainConvUNet(**BACKBONE)
    unet.initialize = lambda module: None
    network = JointUNet(unet, routes, [Head(0, 2, False)], heads)
    network.select("Dataset001_A")
    return network.eval()


def test_features_cover_the_patch_and_not_its_padding() -> None:
    torch.manual_seed(0)
    network = PlainConvUNet(**BACKBONE).eval()
    stages = [find_stage(network, level) for level in ("bottleneck", "encoder@1/1", "decoder@1/2")]
    image = torch.randn(1, 1, 20, 9)  # padded to 24 x 16
    padded = torch.zeros(1, 1, 24, 16)
    padded[:, :, :20, :9] = image
    with torch.no_grad():
        found = TeacherForward(network, stages)(image)
        outputs, uncropped = forward_unet(network, padded, stages)
    assert [tuple(feature.shape[2:]) for feature in found.features] == [(3, 2), (20, 9), (10, 5)]
    torch.testing.assert_close(found.segmentation[0], outputs[0][..., :20, :9])
    for feature, whole in zip(found.features, uncropped, strict=True):
        torch.testing.assert_close(feature, whole[..., : feature.shape[2], : feature.shape[3]])


@pytest.mark.parametrize("make", [with_heads, joint_with_heads])
def test_boxes_cover_the_patch_and_not_its_padding(make: Callable[[], Any]) -> None:
    network = make()
    image = torch.randn(1, 1, 20, 12)  # padded to 24 x 16
    padded = torch.zeros(1, 1, 24, 16)
    padded[:, :, :20, :12] = image
    with torch.no_grad():
        found = TeacherForward(network, [])(image, heads=True)
        whole = network(padded, tasks=True)
    assert [tuple(level.shape[2:]) for level in found.detection.class_logits] == [(10, 6), (5, 3)]
    for part, complete in zip(found.detection, whole.detection, strict=True):
        for level, uncropped in zip(part, complete, strict=True):
            torch.testing.assert_close(level, uncropped[..., : level.shape[2], : level.shape[3]])
    torch.testing.assert_close(found.classification["grade"], whole.classification["grade"])
    torch.testing.assert_close(found.segmentation[0], whole.segmentation[0][..., :20, :12])


@pytest.mark.parametrize("make", [with_heads, joint_with_heads])
def test_classes_and_encoder_features_need_no_decoder(make: Callable[[], Any]) -> None:
    network = make()
    stages = [find_stage(network, "bottleneck")]
    image = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        whole = TeacherForward(network, stages)(image, heads=True)
        drop_detection(speaking_heads(network))
        network.decoder.stages = None  # whoever needs it fails
        found = TeacherForward(network, stages)(image, segmentation=False, heads=True)
    torch.testing.assert_close(found.classification["grade"], whole.classification["grade"])
    torch.testing.assert_close(found.features[0], whole.features[0])
    assert found.segmentation == []
    assert found.detection is None
    pooled = torch.cat(found.pooled.values, 1)
    assert pooled.shape == (2, pooled_channels(speaking_heads(network))) == (2, 14)
