"""Class-masked feature imitation: small structures weigh as much as large ones."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_kd.losses.base import FeatureLoss, require_integer, require_number
from nnunet_kd.losses.voxels import all_valid, blank, class_of_voxel, count_classes, mean_of_samples, standardise


class ClassMaskedLoss(FeatureLoss):
    """Mean over valid voxels v and channels c of scale_v * spatial_v * channel_c * (student - teacher)^2.

    With V valid voxels in a sample and C channels:
    scale_v is proportional to 1 / (voxels of v's class), scaled to the sum V;
    spatial = V * softmax over voxels of (mean_c |teacher| / temperature);
    channel = C * softmax over channels of (mean_v |teacher| / temperature).
    Both features are standardised per sample and channel first, so that all of this is without unit.

    Needs ``target``.

    Args:
        temperature: Of both attention maps (> 0); smaller is sharper.
        num_classes: At least the number of classes in ``target``; larger labels share the last class. A bound is
            needed because looking into ``target`` would make the device wait.

    Source: our design after FGD (Yang et al., CVPR 2022, arXiv 2111.11837; boxes become classes) and
    the idea of ReCo-KD (arXiv 2601.08301), whose equations we have not seen.
    """

    def __init__(self, *, temperature: float = 0.5, num_classes: int = 256) -> None:
        super().__init__()
        self.temperature = require_number("temperature", temperature, above=0.0)
        self.num_classes = require_integer("num_classes", num_classes, at_least=1)

    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the weighted mean, see :class:`ClassMaskedLoss`."""
        if target is None:
            raise ValueError("The loss 'class_masked' needs a target: the labels tell which voxels form a class.")
        student, teacher = standardise(student, valid), standardise(teacher, valid)
        valid = all_valid(student) if valid is None else valid
        spatial_axes = tuple(range(2, student.ndim))
        num_voxels = valid.sum(spatial_axes, keepdim=True)  # [B, 1, 1, 1(, 1)]

        classes = class_of_voxel(target, valid, self.num_classes)
        counts = count_classes(classes, valid, self.num_classes)
        num_present = (counts > 0).sum(dim=1).view_as(num_voxels).clamp(min=1)
        voxels_of_class = counts.gather(1, classes.flatten(1)).view_as(classes).clamp(min=1)
        scale = num_voxels / (voxels_of_class * num_present)

        magnitude = teacher.abs()
        # Finite, so that a sample without valid voxels has no NaN in its gradient.
        lowest = torch.finfo(magnitude.dtype).min
        activation = (magnitude.mean(dim=1, keepdim=True) / self.temperature).masked_fill(~valid, lowest)
        spatial = num_voxels * activation.flatten(1).softmax(dim=1).view_as(activation)
        response = magnitude.sum(spatial_axes, keepdim=True) / num_voxels.clamp(min=1)
        channel = student.shape[1] * (response / self.temperature).softmax(dim=1)

        error = ((student - teacher).square() * channel).mean(dim=1, keepdim=True)
        weighted = blank(scale * spatial * error, valid)
        per_sample = weighted.flatten(1).sum(dim=1) / num_voxels.flatten().clamp(min=1)
        return mean_of_samples(per_sample, valid)
