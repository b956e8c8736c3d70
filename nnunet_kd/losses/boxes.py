"""Losses between detections on the same anchors: classes of all anchors (kl), boxes of the confident ones (giou).

float16 and bfloat16 are computed and returned as float32, float64 as float64; autocast changes nothing here, because
it leaves element-wise operations and sums in the type of their inputs. Nothing waits for the device.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from nnunet_kd.errors import SettingsError
from nnunet_kd.losses.base import require_number
from nnunet_kd.losses.logits import sigmoid_divergence


class BoxClassLoss(nn.Module):
    """KL divergence of the student's class probabilities from the teacher's, mean over anchors weighted by quality.

    Each class of an anchor is a Bernoulli distribution of its own, as the detection head is trained; with p = sigmoid:
    temperature^2 * sum_n w_n sum_c KL(p_teacher || p_student) / sum_n w_n, probabilities softened by the temperature,
    w_n = max_c max(p_teacher, p_student)^exponent, not softened and without gradient; n runs over the batch's anchors.

    Nearly all of a patch's anchors are easy background on which both agree; a plain mean over 1e5 of them would hide
    the few that claim an object. With the default exponent it takes 10^4 anchors at p = 0.01 to outweigh one at p = 1.
    An anchor counts as soon as one of the two claims an object, so that the student unlearns its false positives too.

    Args:
        temperature: Divides both logits (> 0).
        exponent: Of the quality (>= 0); 0 is the plain mean over anchors.

    Source: the teacher's probability as a soft label and a power of 2 that quiets easy anchors are those of quality
    focal loss (Li et al., NeurIPS 2020, arXiv 2006.04388, eq. 2), which however weighs each class by |label - p|^2;
    one weight per anchor from the greater confidence, its normalisation and the temperature are our design.
    """

    def __init__(self, *, temperature: float = 1.0, exponent: float = 2.0) -> None:
        super().__init__()
        self.temperature = require_number("temperature", temperature, above=0.0)
        self.exponent = require_number("exponent", exponent, at_least=0.0)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss; 0 with a gradient of zeros without anchors.

        Args:
            student: Logits [B, N, classes], receive the gradient.
            teacher: Logits [B, N, classes] of the same anchors and classes, detached here.

        Raises:
            ValueError: If the shapes do not fit; both are printed.
        """
        if student.shape != teacher.shape or student.ndim != 3:
            msg = (
                f"BoxClassLoss compares two tensors [batch, anchors, classes] of one shape, but the student has "
                f"{tuple(student.shape)} and the teacher {tuple(teacher.shape)}; "
                "bring both to the same anchors and classes first."
            )
            raise ValueError(msg)
        student, teacher = _prepare(student, teacher)
        divergence = sigmoid_divergence(student / self.temperature, teacher / self.temperature).sum(dim=2)
        quality = torch.maximum(student.detach(), teacher).amax(dim=2).sigmoid()
        return self.temperature**2 * weighted_mean(divergence, quality.pow(self.exponent))


class BoxRegressionLoss(nn.Module):
    """1 - GIoU of paired boxes, in [0, 2], mean weighted by the teacher's scores.

    Args:
        threshold: In [0, 1]. Not used here: the caller keeps the anchors whose teacher score is above it.

    A box of a negative length has no volume. One that is not finite makes the loss NaN, on which a gradient scaler
    skips the step; MONAI's GIoU raises in both cases, waits for the device and computes in float32 only.

    Source: Rezatofighi et al., CVPR 2019 (arXiv 1902.09630), algorithm 1. Weights: our design.
    """

    def __init__(self, *, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = require_number("threshold", threshold, at_least=0.0)
        if threshold > 1:
            raise SettingsError(f"Option 'threshold' of the loss is {threshold}; it must be at most 1.")

    def forward(self, student: Tensor, teacher: Tensor, scores: Tensor) -> Tensor:
        """Return the loss; 0 with a gradient of zeros without boxes.

        Args:
            student: Boxes [M, 2 * dim] in voxels, lower corner then upper corner, 2D or 3D; receive the gradient.
            teacher: The teacher's box of the same anchor [M, 2 * dim], detached here.
            scores: Weight of each pair [M], in [0, 1], detached here.

        Raises:
            ValueError: If the shapes do not fit; all are printed.
        """
        paired = student.shape == teacher.shape and scores.shape == student.shape[:1]
        if not paired or student.ndim != 2 or student.shape[1] not in (4, 6):
            msg = (
                f"BoxRegressionLoss compares boxes in pairs, [M, 4 or 6] each, with scores [M], but the student has "
                f"{tuple(student.shape)}, the teacher {tuple(teacher.shape)} and the scores {tuple(scores.shape)}; "
                "take all three at the same anchors."
            )
            raise ValueError(msg)
        student, teacher = _prepare(student, teacher)
        return weighted_mean(1 - pairwise_giou(student, teacher), scores.detach().to(student.dtype))


def pairwise_giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised intersection over union of boxes in pairs, [M, 2 * dim] each -> [M] in [-1, 1]."""
    epsilon = 1e-6  # voxels^dim; on both sides of the IoU, so that it is 1 also between equal boxes without volume
    (first_lower, first_upper), (second_lower, second_upper) = first.chunk(2, dim=1), second.chunk(2, dim=1)
    intersection = _volume(torch.maximum(first_lower, second_lower), torch.minimum(first_upper, second_upper))
    union = _volume(first_lower, first_upper) + _volume(second_lower, second_upper) - intersection
    hull = _volume(torch.minimum(first_lower, second_lower), torch.maximum(first_upper, second_upper))
    return (intersection + epsilon) / (union + epsilon) - (hull - union) / (hull + epsilon)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of ``values`` with ``weights`` (>= 0) of the same shape; 0 with a gradient of zeros if all weights are 0."""
    return (values * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def _volume(lower: Tensor, upper: Tensor) -> Tensor:
    """Volume [M] between corners [M, dim]; 0 where an upper one is below the lower one."""
    # not torch.prod, whose gradient asks the device whether there are zeros
    return reduce(torch.mul, (upper - lower).clamp(min=0).unbind(dim=1))


def _prepare(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the precision to compute in, the teacher without gradient."""
    precision = torch.promote_types(student.dtype, torch.float32)
    return student.to(precision), teacher.detach().to(precision)
