"""Features imitated inside and around boxes (FGD, its focal part)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_kd.losses.base import FeatureLoss, require_flag, require_number
from nnunet_kd.losses.boxes import weighted_mean
from nnunet_kd.losses.voxels import masked_mean, standardise


class ImitationLoss(FeatureLoss):
    """Squared difference of features, apart inside and outside boxes, where and in which channels the teacher attends.

    alpha * foreground + beta * background + gamma * attention. With V positions and C channels in a sample and
    A^S = V * softmax over positions of (mean_c |F| / temperature), A^C = C * softmax over channels of
    (mean_v |F| / temperature), both of mean 1, the error of position v is
    A^S_v(teacher) * mean_c A^C_c(teacher) * (F_teacher - F_student)^2 and

    - foreground is its mean over the positions in boxes, each with the weight 1 / (positions in its smallest box), so
      that every box of the batch counts the same whatever its size;
    - background is its plain mean over the positions in no box;
    - attention is mean_v |difference of A^S| + mean_c |difference of A^C| between student and teacher.

    A batch without boxes has no foreground, one that boxes fill has no background.

    Args:
        temperature: Of both attention maps (> 0); smaller is sharper.
        alpha: Weight of the foreground (>= 0).
        beta: Weight of the background (>= 0).
        gamma: Weight of the attention (>= 0).
        standardise: First bring each sample and channel to mean 0 and variance 1. The scale of a channel of an
            instance-normalised network is what its affine weights happen to be, and the next convolution undoes it;
            so the temperature means the same in every network, no channel outweighs the others, and random features
            give about 1.5 with the default weights. False is the source's.

    Source: Yang et al. (FGD), CVPR 2022 (arXiv 2111.11837), equations 5 to 9; the defaults have the proportions of
    the released settings for RetinaNet (1e-3, 5e-4, 5e-4). Differs from it: 2D and 3D; means over channels, boxes and
    positions, where the source sums over channels and boxes, and in the attention over positions, so that the value
    does not grow with batch, width or grid; standardised; a box ends where it ends on the grid, not one position
    later; no global part (its GcBlock has weights to train).
    """

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        alpha: float = 0.5,
        beta: float = 0.25,
        gamma: float = 0.25,
        standardise: bool = True,
    ) -> None:
        super().__init__()
        self.temperature = require_number("temperature", temperature, above=0.0)
        self.alpha = require_number("alpha", alpha, at_least=0.0)
        self.beta = require_number("beta", beta, at_least=0.0)
        self.gamma = require_number("gamma", gamma, at_least=0.0)
        self.standardise = require_flag("standardise", standardise)

    def forward(  # type: ignore[override]  # boxes take the place of the masks
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor], patch_shape: Sequence[int]
    ) -> Tensor:
        """Return the loss.

        Args:
            student: [B, C, *S], receives the gradient.
            teacher: [B, C, *S], detached here.
            boxes: B tensors [n, 2 * dim] in voxels of the patch, array order, lower corner then upper corner, end
                exclusive; n may be 0.
            patch_shape: Voxels per axis of the patch that the features cover.

        Raises:
            ValueError: If the shapes do not fit; they are printed.
        """
        grid = student.shape[2:]
        fit = all(of_sample.ndim == 2 and of_sample.shape[1] == 2 * len(grid) for of_sample in boxes)
        if not fit or len(boxes) != len(student) or len(patch_shape) != len(grid):
            msg = (
                f"ImitationLoss has features {tuple(student.shape)}, a patch {tuple(patch_shape)} and boxes "
                f"{[tuple(of_sample.shape) for of_sample in boxes]}; it needs one tensor [n, {2 * len(grid)}] of boxes "
                f"for each of the {len(student)} samples and {len(grid)} lengths of the patch."
            )
            raise ValueError(msg)
        scale = torch.stack([scale_mask(of_sample, patch_shape, grid) for of_sample in boxes])
        return super().forward(student, teacher, target=scale.unsqueeze(1).to(student.device))

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the weighted sum of the three parts; ``target`` is the scale mask [B, 1, *S]."""
        assert target is not None  # forward has made it
        if self.standardise:
            student, teacher = standardise(student, valid), standardise(teacher, valid)
        spatial, channel = self._attention(teacher)
        student_spatial, student_channel = self._attention(student)
        error = spatial * (channel * (student - teacher).square()).mean(dim=1, keepdim=True)
        foreground = weighted_mean(error, target.to(error.dtype))
        background = masked_mean(error, target == 0)
        attention = (student_spatial - spatial).abs().mean() + (student_channel - channel).abs().mean()
        return self.alpha * foreground + self.beta * background + self.gamma * attention

    def _attention(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over positions [B, 1, *S] and over channels [B, C, 1, 1(, 1)], each of mean 1 in a sample."""
        magnitude = features.abs()
        activation = magnitude.mean(dim=1, keepdim=True)
        spatial = (activation / self.temperature).flatten(1).softmax(dim=1).view_as(activation)
        response = magnitude.mean(dim=tuple(range(2, features.ndim)), keepdim=True)
        channel = (response / self.temperature).softmax(dim=1)
        return spatial * math.prod(features.shape[2:]), channel * features.shape[1]


def scale_mask(boxes: Tensor, patch_shape: Sequence[int], grid: Sequence[int]) -> Tensor:
    """1 / (positions in the smallest box here), 0 where there is no box: a float32 map [*grid] on the boxes' device.

    A box covers every position that it touches, and at least one.

    Args:
        boxes: [n, 2 * dim] in voxels of the patch, which they lie in.
        patch_shape: Voxels per axis.
        grid: Positions per axis.
    """
    dimension = len(grid)
    inside = []  # of each axis, [n, size]
    for axis, (size, length) in enumerate(zip(grid, patch_shape, strict=True)):
        # multiplied first: whole edges stay exact, where size / length would be rounded
        edges = boxes[:, axis::dimension].float() * size / length
        start = edges[:, :1].floor().clamp(min=0, max=size - 1)
        end = torch.maximum(edges[:, 1:].ceil(), start + 1)
        position = torch.arange(size, device=boxes.device)
        inside.append((position >= start) & (position < end))
    mask = torch.zeros(tuple(grid), device=boxes.device)
    for of_axes in zip(*inside, strict=True):  # one box at a time: all at once would need n maps
        box = torch.ones((), device=boxes.device)
        for of_axis in of_axes:
            box = box.unsqueeze(-1) * (of_axis / of_axis.sum())
        mask = torch.maximum(mask, box)
    return mask
