"""The generator of AdaIN-based domain adaptation: translation and segmentation by one network without skips.

Source: Oh and Ye, ECCV 2022 (arXiv 2104.05892), after StarGAN v2 (arXiv 1912.01865). Widths, strides and kernels are
those of the plans (the paper: 64 to 512 at 256 x 256 pixels), so that small machines can train it. Their second input
stem, for masks, is left out: the released code skips every translation that starts from a mask, so it never trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_kd.networks.residual_blocks import SLOPE, ResidualBlock, initialize_he
from nnunet_kd.networks.task_codes import DOMAINS, STYLE_DIM, TaskCodeNetwork

MAX_DOWN, NUM_BOTTLENECK = 4, 2
SELF = len(DOMAINS)  # row of the self code


class StarGenerator(TaskCodeNetwork):
    """Residual encoder and decoder, two heads, and codes that choose the task.

    Translation takes its code in the decoder, segmentation none, the one-step segmentation one in the encoder. Blocks
    of the encoder have a scale and a shift of their own beside AdaIN, those of the decoder have not.

    Args:
        input_channels: Of the image.
        num_classes: Segmentation outputs.
        n_stages: Of the plans; four at most are left of those that downsample.
        features_per_stage: Widths.
        conv_op: nn.Conv2d or nn.Conv3d.
        kernel_sizes: Per stage and axis.
        strides: Per stage and axis; the first are ones.
        deep_supervision: There is none; nnU-Net sets it.
    """

    codes: Tensor

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_stages: int,
        features_per_stage: Sequence[int],
        conv_op: Any,
        kernel_sizes: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        del deep_supervision
        last = min(MAX_DOWN, n_stages - 1)
        widths, kernels = list(features_per_stage[: last + 1]), [list(kernel) for kernel in kernel_sizes[: last + 1]]
        steps = [list(stride) for stride in strides[1 : last + 1]]
        still = [1] * len(kernels[0])
        self.stem = conv_op(input_channels, widths[0], kernels[0], padding=[size // 2 for size in kernels[0]])

        def block(stage_in: int, stage_out: int, stride: Sequence[int], **options: Any) -> ResidualBlock:
            kernel = kernels[max(stage_in, stage_out)]
            return ResidualBlock(
                widths[stage_in], widths[stage_out], conv_op, kernel, stride, style_dim=STYLE_DIM, **options
            )

        down = [block(stage, stage + 1, step, affine=True) for stage, step in enumerate(steps)]
        up = [block(stage + 1, stage, step, up=True, affine=False) for stage, step in reversed(list(enumerate(steps)))]
        before, after = (
            [block(last, last, still, affine=affine) for _ in range(NUM_BOTTLENECK)] for affine in (True, False)
        )
        self.encoder: Any = nn.ModuleList([*down, *before])
        self.decoder: Any = nn.ModuleList([*after, *up])
        norm = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[len(still)]

        def head(channels: int) -> nn.Sequential:
            return nn.Sequential(norm(widths[0], affine=True), nn.LeakyReLU(SLOPE), conv_op(widths[0], channels, 1))

        self.image_head, self.segmentation_head = head(input_channels), head(num_classes)
        # styles of source and target, and the self code: prediction needs no network that makes codes
        self.register_buffer("codes", torch.zeros(len(DOMAINS) + 1, STYLE_DIM))

    def _features(self, image: Tensor, encoder_code: Tensor | None, decoder_code: Tensor | None) -> Tensor:
        feature = self.stem(image)
        for block in self.encoder:
            feature = block(feature, encoder_code)
        for block in self.decoder:
            feature = block(feature, decoder_code)
        return feature

    def segment(self, image: Tensor) -> Tensor:
        """Logits [B, classes, *S] of ``image`` [B, C, *S]; no code is used."""
        return self.segmentation_head(self._features(image, None, None))

    def segment_in_one_step(self, image: Tensor, code: Tensor | None) -> Tensor:
        """Logits [B, classes, *S]; ``code`` [B, style_dim] goes into the encoder."""
        code = self.stored_code(SELF, image) if code is None else code
        return self.segmentation_head(self._features(image, code, None))

    def translate(self, image: Tensor, code: Tensor) -> Tensor:
        """The image [B, C, *S] in the style ``code`` [B, style_dim], which goes into the decoder."""
        return self.image_head(self._features(image, None, code))

    def stored_code(self, domain: int, image: Tensor) -> Tensor:
        """A row of ``codes`` for each image."""
        return self.codes[domain].expand(len(image), -1)

    @torch.no_grad()
    def start_self_code(self) -> None:
        """Give AdaIN in the encoder the scales and shifts of the norms beside it, whatever the code."""
        for block in self.encoder:
            for own in (block.norm1, block.norm2):
                own.scale_and_shift.weight.zero_()
                own.scale_and_shift.bias.copy_(torch.cat((own.norm.weight - 1, own.norm.bias)))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """nnU-Net's measure of memory: values in the feature maps of one patch of ``input_size``."""
        size, total = [float(side) for side in input_size], 0.0
        for block in (*self.encoder, *self.decoder):
            if block.up:
                size = [side * step for side, step in zip(size, block.stride, strict=True)]
            else:
                size = [side / step for side, step in zip(size, block.stride, strict=True)]
            voxels = 1.0
            for side in size:
                voxels *= side
            total += voxels * (block.conv1.out_channels + block.conv2.out_channels)
        return int(total)

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """What nnU-Net applies to every module."""
        initialize_he(module)
