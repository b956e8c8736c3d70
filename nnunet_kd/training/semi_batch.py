"""The batch of a semi-supervised step: labelled, unlabelled and mixed samples, and what is known (our design)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_kd.losses.voxels import resize_nearest
from nnunet_kd.settings import DinoMix
from nnunet_kd.spaces.labels import LabelSpace
from nnunet_kd.teachers.ema import LOGITS
from nnunet_kd.teachers.foundation import SEEN
from nnunet_kd.training.cutmix import ClassFrequencies, Mixed, class_members, class_probabilities, known_logits, mix

# ranges of a strong view's factors, and of its noise's standard deviation as a part of the image's
BRIGHTNESS, CONTRAST, NOISE = (0.75, 1.25), (0.65, 1.5), (0.0, 0.3)


class SupervisedPart(nn.Module):
    """The stock loss of the labelled samples, which come first; of all samples where ``num_labeled`` is None."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.num_labeled: int | None = None

    def forward(self, output: Any, target: Any) -> Tensor:
        """``output`` and ``target`` of one level, or lists of all levels."""
        rows = slice(self.num_labeled)
        if isinstance(target, (list, tuple)):
            loss: Tensor = self.loss([level[rows] for level in output], [level[rows] for level in target])
            return loss
        return self.loss(output[rows], target[rows])


class SemiSupervisedBatch:
    """Turns a batch of labelled and unlabelled samples into that of a step.

    Args:
        space: The dataset's labels.
        num_labeled: Labelled samples of a batch, which come first.
        settings: Mixed samples and confidence.
    """

    def __init__(self, space: LabelSpace, num_labeled: int, settings: DinoMix) -> None:
        self.space = space
        self.num_labeled = num_labeled
        self.settings = settings
        self.frequencies = ClassFrequencies()
        self.probabilities: Tensor | None = None
        self.drawn: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self, batch: Mapping[str, Any], unlabeled_logits: Tensor | None, num_mixes: int, progress: float
    ) -> tuple[dict[str, Any], dict[str, slice]]:
        """The batch of a step, and its groups.

        Args:
            batch: ``data`` [L + U, C, *S] and ``target`` (a level or a list of them) on one device.
            unlabeled_logits: What the teacher says of the unlabelled samples, [U, channels, *S]; None if it is not
                asked, then nothing is mixed.
            num_mixes: M.
            progress: Of the training, in [0, 1].

        Returns:
            ``data`` [L + U + M, C, *S]: labelled samples as they are, strong views of the unlabelled ones, mixed ones.
            ``target``: labels; of unlabelled voxels the teacher's most probable class. The teacher's logits
            [L + U + M, channels, *S], 20 for the true class of a known label. And which samples are labelled,
            unlabelled, mixed.
        """
        data, num_labeled = batch["data"], self.num_labeled
        levels = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
        groups = {"labeled": slice(0, num_labeled), "unlabeled": slice(num_labeled, len(data))}
        images = [data[:num_labeled], strong_views(data[num_labeled:])]
        result: dict[str, Any] = {**batch, SEEN: len(data)}
        if unlabeled_logits is not None:
            known = self._known(levels[0][:num_labeled], unlabeled_logits.shape[1])
            logits = torch.cat((known, unlabeled_logits))
            target = torch.cat((levels[0][:num_labeled], self._pseudo_target(unlabeled_logits, levels[0])))
            added, all_logits = [target[num_labeled:]], [logits]
            if num_mixes:
                mixed = self._mix(data, logits, target, num_mixes, progress)
                images.append(mixed.image)
                added.append(mixed.target)
                all_logits.append(mixed.logits)
                groups["mixed"] = slice(len(data), len(data) + num_mixes)
            levels = _all_levels(levels, torch.cat(added), num_labeled)
            result[LOGITS] = torch.cat(all_logits)
        result["data"] = torch.cat(images)
        result["target"] = levels if isinstance(batch["target"], list) else levels[0]
        return result, groups

    def _known(self, target: Tensor, num_channels: int) -> Tensor:
        return known_logits(target, num_channels, self.space.regions, self.space.ignore)

    def _pseudo_target(self, logits: Tensor, like: Tensor) -> Tensor:
        """The teacher's decisions in the form of nnU-Net's target."""
        if not self.space.regions:
            return logits.argmax(1, keepdim=True).to(like.dtype)
        target = (logits > 0).to(like.dtype)
        missing = like.shape[1] - target.shape[1]  # a channel for the ignore label
        return torch.cat((target, target.new_zeros(len(target), missing, *target.shape[2:])), 1)

    def _mix(self, data: Tensor, logits: Tensor, target: Tensor, num_mixes: int, progress: float) -> Mixed:
        members = class_members(logits, self.settings.confidence, self.space.regions)
        counts = members.flatten(2).sum(2)
        self.frequencies.update(counts[: self.num_labeled], counts[self.num_labeled :])
        self.probabilities = class_probabilities(self.frequencies.total, progress, self.settings)
        sides = self.settings.box
        mixed = mix(data, logits, target, members, self.num_labeled, self.probabilities, num_mixes, sides)
        drawn = mixed.classes.sum(0)
        self.drawn = drawn if self.drawn is None else self.drawn + drawn
        return mixed

    def take_drawn(self) -> list[int]:
        """How many boxes lay around each foreground class since the last call; waits for the device."""
        drawn, self.drawn = self.drawn, None
        return [] if drawn is None else drawn.tolist()


def _all_levels(levels: Sequence[Tensor], added: Tensor, num_labeled: int) -> list[Tensor]:
    """Targets of all levels: the stock ones of labelled samples, then the nearest voxels of ``added``."""
    return [torch.cat((level[:num_labeled], resize_nearest(added, level.shape[2:]))) for level in levels]


def strong_views(images: Tensor) -> Tensor:
    """Other brightness, contrast and noise, in addition to the augmentation that made ``images`` [B, C, *S].

    Voxels of 0 stay 0: that is what nnU-Net's masks and padding leave outside an image. The operations are those of
    batchgeneratorsv2, whose transforms wait for the device at every sample.
    """
    one_each = (*images.shape[:2], *[1] * (images.ndim - 2))

    def drawn(limits: tuple[float, float]) -> Tensor:
        return torch.empty(one_each, device=images.device).uniform_(*limits)

    axes = tuple(range(2, images.ndim))
    spread, mean = torch.std_mean(images, axes, keepdim=True)
    contrast = (images - mean) * drawn(CONTRAST) + mean
    views = contrast * drawn(BRIGHTNESS) + spread * drawn(NOISE) * torch.randn_like(images)
    return views.masked_fill(images == 0, 0)
