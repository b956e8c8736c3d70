"""The teacher's forward on patches that its strides do not divide."""

from __future__ import annotations

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_kd.networks.taps import find_stage, forward_unet
from nnunet_kd.teachers.nnunet import _TeacherForward


def test_features_cover_the_patch_and_not_its_padding() -> None:
    torch.manual_seed(0)
    network = PlainConvUNet(
        input_channels=1,
        n_stages=4,
        features_per_stage=[2, 3, 4, 5],
        conv_op=nn.Conv2d,
        kernel_sizes=3,
        strides=[1, 2, 2, 2],
        n_conv_per_stage=1,
        num_classes=2,
        n_conv_per_stage_decoder=1,
        nonlin=nn.LeakyReLU,
    ).eval()
    stages = [find_stage(network, level) for level in ("bottleneck", "encoder@1/1", "decoder@1/2")]
    image = torch.randn(1, 1, 20, 9)  # padded to 24 x 16
    padded = torch.zeros(1, 1, 24, 16)
    padded[:, :, :20, :9] = image
    with torch.no_grad():
        logits, features = _TeacherForward(network, stages)(image)
        outputs, uncropped = forward_unet(network, padded, stages)
    assert [tuple(feature.shape[2:]) for feature in features] == [(3, 2), (20, 9), (10, 5)]
    torch.testing.assert_close(logits, outputs[0][..., :20, :9])
    for feature, whole in zip(features, uncropped, strict=True):
        torch.testing.assert_close(feature, whole[..., : feature.shape[2], : feature.shape[3]])
