"""Losses between logits of one label space: voxel by voxel (kl, dkd, l1) and by correlation (dist)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from nnunet_kd.errors import SettingsError
from nnunet_kd.losses.base import LogitsLoss, Nonlinearity, require_choice, require_flag, require_number
from nnunet_kd.losses.voxels import all_valid, balanced_weights, blank, class_of_voxel, masked_mean


class KullbackLeiblerLoss(LogitsLoss):
    """KL divergence of the student's softened probabilities from the teacher's.

    temperature^2 * mean over voxels of sum_c p_teacher log(p_teacher / p_student), p = softmax(logits / temperature).
    With "sigmoid" every region is a distribution of its own (inside, outside); their divergences are summed.

    Args:
        nonlinearity: See :class:`LogitsLoss`.
        temperature: Divides both logits (> 0). The loss is multiplied by its square so that gradients keep their size.
        balance: "voxel" is the mean over all voxels, in which the background of a medical image outweighs small
            structures. "class" is the mean within each class, then over the classes present in the batch; with
            "sigmoid", for each region, the mean inside and the mean outside count the same. The classes are those of
            ``target`` or, without it, the teacher's most probable ones.
        agreement: Weight every voxel by the probability in [0, 1] that the teacher gives to its label (temperature 1),
            so that a teacher that misses a structure says nothing about it. Without ``target`` it changes nothing.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531 (2015), section 2. Sigmoid, "class", agreement: our design.
    """

    def __init__(
        self,
        *,
        nonlinearity: Nonlinearity = "softmax",
        temperature: float = 4.0,
        balance: Literal["voxel", "class"] = "voxel",
        agreement: bool = False,
    ) -> None:
        super().__init__(nonlinearity=nonlinearity, temperature=temperature)
        self.balance = require_choice("balance", balance, ("voxel", "class"))
        self.agreement = require_flag("agreement", agreement)

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the divergence, see :class:`KullbackLeiblerLoss`."""
        if self.nonlinearity == "softmax":
            divergence = softmax_divergence(student / self.temperature, teacher / self.temperature)
            if self.agreement and target is not None:
                labels = class_of_voxel(target, valid, student.shape[1])
                divergence = divergence * teacher.softmax(dim=1).gather(1, labels)
            if self.balance == "voxel":
                loss = masked_mean(divergence, valid)
            else:
                labels = teacher.argmax(dim=1, keepdim=True) if target is None else target
                classes = class_of_voxel(labels, valid, student.shape[1])
                loss = (divergence * balanced_weights(classes, valid, student.shape[1], divergence.dtype)).sum()
        else:
            divergence = sigmoid_divergence(student / self.temperature, teacher / self.temperature)
            if self.agreement and target is not None:
                divergence = divergence * torch.where(target.bool(), teacher, -teacher).sigmoid()
            if self.balance == "voxel":
                loss = masked_mean(divergence.sum(dim=1, keepdim=True), valid)
            else:
                inside = teacher > 0 if target is None else target.bool()
                loss = (divergence * _inside_outside_weights(inside, valid, divergence.dtype)).sum()
        return self.temperature**2 * loss


class DecoupledLoss(LogitsLoss):
    """Decoupled distillation: how sure the teacher is of the target class, and how it ranks the other classes.

    temperature^2 * mean over voxels of (alpha * KL of (p_target, 1 - p_target) + beta * KL among the other classes).
    With two classes there is only one other class, so that the second part is 0.

    Args:
        nonlinearity: Only "softmax": a region has no other classes.
        temperature: Divides both logits (> 0).
        alpha: Weight of the target class (>= 0).
        beta: Weight of the other classes (>= 0). The source's 8 is for single images of 100 classes. In plain KL this
            part weighs 1 - p_target, nearly 0 at the easy background voxels that fill a patch, and here it weighs the
            same everywhere; 2, the top of the source's range for ImageNet, keeps them from outweighing the rest. Our
            choice, not measured.

    Without ``target`` the teacher's most probable class is the target.

    Source: Zhao et al., CVPR 2022 (arXiv 2203.08679), per voxel. Differs from it: mean over voxels.
    """

    def __init__(
        self,
        *,
        nonlinearity: Nonlinearity = "softmax",
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 2.0,
    ) -> None:
        super().__init__(nonlinearity=nonlinearity, temperature=temperature)
        if nonlinearity == "sigmoid":
            raise SettingsError(
                "The loss 'dkd' needs one class per voxel, but this dataset has regions (sigmoid); "
                "use 'kl', 'dist' or 'cwd'."
            )
        self.alpha = require_number("alpha", alpha, at_least=0.0)
        self.beta = require_number("beta", beta, at_least=0.0)

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the weighted sum of both parts, see :class:`DecoupledLoss`."""
        student, teacher = student / self.temperature, teacher / self.temperature
        labels = teacher.argmax(dim=1, keepdim=True) if target is None else target
        classes = class_of_voxel(labels, valid, student.shape[1])
        target_class = torch.zeros_like(student, dtype=torch.bool).scatter_(1, classes, True)
        binary = softmax_divergence(_target_and_rest(student, target_class), _target_and_rest(teacher, target_class))
        others = softmax_divergence(_without(student, target_class), _without(teacher, target_class))
        return self.temperature**2 * masked_mean(self.alpha * binary + self.beta * others, valid)


class AbsoluteErrorLoss(LogitsLoss):
    """Mean absolute difference over channels and voxels.

    Args:
        nonlinearity: See :class:`LogitsLoss`.
        temperature: Divides both logits (> 0); 1, the default here, leaves them as they are.
        of: "logits" as in the source; "probabilities" lie between 0 and 1 whatever the scale of the logits (our
            option).

    Source: self-distillation of Oh and Ye, ECCV 2022 (arXiv 2104.05892).
    """

    def __init__(
        self,
        *,
        nonlinearity: Nonlinearity = "softmax",
        temperature: float = 1.0,
        of: Literal["logits", "probabilities"] = "logits",
    ) -> None:
        super().__init__(nonlinearity=nonlinearity, temperature=temperature)
        self.of = require_choice("of", of, ("logits", "probabilities"))

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the mean, see :class:`AbsoluteErrorLoss`."""
        del target
        student, teacher = student / self.temperature, teacher / self.temperature
        if self.of == "probabilities":
            softmax = self.nonlinearity == "softmax"
            student, teacher = (own.softmax(1) if softmax else own.sigmoid() for own in (student, teacher))
        return masked_mean((student - teacher).abs().mean(1, keepdim=True), valid)


class CorrelationLoss(LogitsLoss):
    """1 - Pearson correlation of probabilities: over the classes of a voxel, and over the voxels of a class.

    temperature^2 * (beta * mean over voxels of (1 - r over classes) + gamma * mean over classes of (1 - r over the
    batch's voxels)). A correlation ignores scale and offset, so that a student may be less sure than its teacher.

    Args:
        nonlinearity: See :class:`LogitsLoss`.
        temperature: Divides both logits (> 0).
        beta: Weight of the correlation over classes (>= 0). With two softmax classes it can only be 1 or -1 and has no
            gradient; with one region it is left out.
        gamma: Weight of the correlation over voxels (>= 0).

    Source: Huang et al. (DIST), NeurIPS 2022 (arXiv 2205.10536). Differs from it: the covariance gets
    the same small constant as both variances, so that 0 is reached also where probabilities hardly vary.
    """

    EPSILON = 1e-8

    def __init__(
        self,
        *,
        nonlinearity: Nonlinearity = "softmax",
        temperature: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
    ) -> None:
        super().__init__(nonlinearity=nonlinearity, temperature=temperature)
        self.beta = require_number("beta", beta, at_least=0.0)
        self.gamma = require_number("gamma", gamma, at_least=0.0)

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the weighted sum of both parts, see :class:`CorrelationLoss`."""
        del target
        valid = all_valid(student) if valid is None else valid
        student, teacher = self._probabilities(student), self._probabilities(teacher)
        num_channels, voxel_axes = student.shape[1], (0, *range(2, student.ndim))

        loss = student.new_zeros(())
        if num_channels > 1:
            centred = (student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True))
            loss = self.beta * masked_mean(1 - self._correlation(*centred, axes=(1,), count=num_channels), valid)

        count = valid.sum().clamp(min=1)
        student, teacher = (_centred(values, valid, voxel_axes, count) for values in (student, teacher))
        over_voxels = 1 - self._correlation(student, teacher, axes=voxel_axes, count=count)
        return self.temperature**2 * (loss + self.gamma * over_voxels.mean() * valid.any())

    def _probabilities(self, logits: Tensor) -> Tensor:
        logits = logits / self.temperature
        return logits.softmax(dim=1) if self.nonlinearity == "softmax" else logits.sigmoid()

    def _correlation(self, student: Tensor, teacher: Tensor, *, axes: tuple[int, ...], count: Tensor | int) -> Tensor:
        covariance = (student * teacher).sum(axes, keepdim=True) / count
        student_variance = student.square().sum(axes, keepdim=True) / count
        teacher_variance = teacher.square().sum(axes, keepdim=True) / count
        scale = (student_variance + self.EPSILON).sqrt() * (teacher_variance + self.EPSILON).sqrt()
        return (covariance + self.EPSILON) / scale


def softmax_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of softmax over channels, from the teacher: logits [B, C, *S] -> [B, 1, *S]."""
    student_log, teacher_log = log_softmax(student, dim=1), log_softmax(teacher, dim=1)
    return (teacher_log.exp() * (teacher_log - student_log)).sum(dim=1, keepdim=True)


def sigmoid_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of Bernoulli distributions, from the teacher, per channel: logits [B, C, *S] -> [B, C, *S]."""
    inside = teacher.sigmoid() * (logsigmoid(teacher) - logsigmoid(student))
    outside = (-teacher).sigmoid() * (logsigmoid(-teacher) - logsigmoid(-student))
    return inside + outside


def _inside_outside_weights(inside: Tensor, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weights [B, R, *S]: for each region, inside and outside have the same sum, and both together 1."""
    axes = (0, *range(2, inside.ndim))
    num_inside = blank(inside, valid).sum(axes, keepdim=True)
    num_outside = blank(~inside, valid).sum(axes, keepdim=True)
    num_present = ((num_inside > 0).to(dtype) + (num_outside > 0).to(dtype)).clamp(min=1)
    count = torch.where(inside, num_inside, num_outside).clamp(min=1)
    return blank(1 / (count * num_present), valid)


def _target_and_rest(logits: Tensor, target_class: Tensor) -> Tensor:
    """Logits [B, 2, *S] of the target class and of all others together."""
    lowest = torch.finfo(logits.dtype).min
    target = logits.masked_fill(~target_class, 0).sum(dim=1, keepdim=True)
    rest = logits.masked_fill(target_class, lowest).logsumexp(dim=1, keepdim=True)
    return torch.cat([target, rest], dim=1)


def _without(logits: Tensor, target_class: Tensor) -> Tensor:
    """The logits with the target class so low that its probability and its gradient are 0."""
    return logits.masked_fill(target_class, torch.finfo(logits.dtype).min / 4)


def _centred(values: Tensor, valid: Tensor, axes: tuple[int, ...], count: Tensor) -> Tensor:
    """``values`` less their mean over the valid voxels, 0 elsewhere."""
    mean = blank(values, valid).sum(axes, keepdim=True) / count
    return blank(values - mean, valid)
