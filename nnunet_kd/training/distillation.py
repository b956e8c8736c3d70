"""The student's loss: the stock supervised loss plus a list of terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_kd.errors import SettingsError
from nnunet_kd.losses import build_loss
from nnunet_kd.losses.deep_supervision import deep_supervision_loss
from nnunet_kd.losses.schedules import schedule_weight
from nnunet_kd.networks.multitask import TaskOutputs
from nnunet_kd.settings import Guard, Settings, Term
from nnunet_kd.spaces.labels import LabelMap
from nnunet_kd.teachers.output import TeacherOutput
from nnunet_kd.training.guard import Competence


@dataclass
class BuiltTerm:
    """A term with its loss module. ``name`` is how it appears in the log."""

    name: str
    settings: Term
    loss: nn.Module

    def weight(self, progress: float) -> float:
        """Scheduled weight at ``progress`` in [0, 1] of the training."""
        schedule = self.settings.schedule
        factor = schedule_weight(schedule.kind, progress, warmup=schedule.warmup, start=schedule.start)
        return self.settings.weight * factor


def build_terms(settings: Settings, regions_of_teacher: Mapping[str, bool]) -> list[BuiltTerm]:
    """Build every term of the settings.

    Args:
        settings: Validated settings.
        regions_of_teacher: Whether student and teacher are compared in regions (sigmoid), per teacher.

    Raises:
        SettingsError: An unknown loss or option; names the term.
    """
    terms = []
    for index, term in enumerate(settings.terms):
        options = dict(term.options)
        if term.temperature is not None:
            options["temperature"] = term.temperature
        if term.on == "logits":
            options["nonlinearity"] = "sigmoid" if regions_of_teacher[term.teacher] else "softmax"
        try:
            loss = build_loss(term.on, term.loss, **options)
        except SettingsError as error:
            raise SettingsError(f"terms[{index}]: {error}") from error
        kind = (term.teacher, term.on, term.loss)
        earlier = sum((own.teacher, own.on, own.loss) == kind for own in settings.terms[:index])
        name = ".".join(kind) + (f".{earlier + 1}" if earlier else "")
        terms.append(BuiltTerm(name, term, loss))
    return terms


class DistillationLoss(nn.Module):
    """Supervised loss + sum of weight * term.

    The trainer puts the teachers' outputs of the batch into ``teacher_outputs`` before a training step and removes them
    afterwards; without them (validation) only the supervised loss is computed.

    Args:
        supervised: Stock nnU-Net's loss, with deep supervision if it is on.
        level_weights: nnU-Net's deep supervision weights, highest resolution first; (1,) without deep supervision.
        terms: Built terms.
        student_maps: Per teacher, the map from the student's label space to the common one.
        projectors: Projector name to module, see :func:`projector_name`.
        levels: Levels in the order of the tapped features.
        guard: What keeps a weak teacher from hurting.
    """

    def __init__(
        self,
        supervised: nn.Module,
        level_weights: Sequence[float],
        terms: Sequence[BuiltTerm],
        student_maps: Mapping[str, LabelMap],
        projectors: Mapping[str, nn.Module],
        levels: Sequence[str],
        guard: Guard,
    ) -> None:
        super().__init__()
        self.supervised = supervised
        self.level_weights = tuple(float(weight) for weight in level_weights)
        self.terms = tuple(terms)
        self.student_maps = dict(student_maps)
        self._projectors = projectors
        self.levels = tuple(levels)
        self.guard = guard
        self.competence = {name: Competence(label_map.target.num_channels) for name, label_map in student_maps.items()}
        self.teacher_outputs: dict[str, TeacherOutput] = {}
        self.progress = 0.0
        self.logged: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self, output: Any, target: Any) -> Tensor:
        """``output`` is the network's: outputs alone, or while training also the tapped features or all tasks."""
        several = isinstance(target, (list, tuple))
        targets = list(target) if several else [target]
        if isinstance(output, TaskOutputs):
            outputs, features = output.segmentation, output.features
            total: Tensor = self.supervised(output, target)
        else:
            found, features = output if _has_features(output) else (output, [])
            outputs = list(found) if isinstance(found, (list, tuple)) else [found]
            total = self.supervised(outputs if several else outputs[0], target)
        if not self.teacher_outputs:
            return total
        tapped = dict(zip(self.levels, features, strict=True))
        if self.guard.watches_dice:
            self._update_competence(outputs[0], targets[0])
        for term in self.terms:
            weight: Tensor | float = term.weight(self.progress)
            if weight == 0:
                continue
            teacher = self.teacher_outputs[term.settings.teacher]
            label_map = self.student_maps[term.settings.teacher]
            if term.settings.on == "logits":
                raw = self._logit_term(term, outputs, targets, teacher, label_map)
            else:
                raw = self._feature_term(term, tapped, targets[0], teacher, label_map)
            if self.guard.watches_dice:
                competence = self.competence[term.settings.teacher]
                weight = weight * competence.factor(self.guard.margin, self.guard.exponent)
            scaled = weight * raw
            total = total + scaled
            self.logged[term.name] = (raw.detach(), scaled.detach())
        return total

    def _logit_term(
        self,
        term: BuiltTerm,
        outputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        teacher: TeacherOutput,
        label_map: LabelMap,
    ) -> Tensor:
        assert teacher.logits is not None
        weights = self.level_weights if term.settings.deep_supervision else (1.0,)
        used = [level for level, weight in enumerate(weights) if weight != 0]
        pairs = [common_target(targets[level], label_map) for level in used]
        return deep_supervision_loss(
            term.loss,
            [label_map(outputs[level]) for level in used],
            teacher.logits,
            [weights[level] for level in used],
            targets=[labels for labels, _ in pairs],
            valids=None if label_map.source.ignore is None else [valid for _, valid in pairs if valid is not None],
        )

    def _feature_term(
        self, term: BuiltTerm, tapped: Mapping[str, Tensor], target: Tensor, teacher: TeacherOutput, label_map: LabelMap
    ) -> Tensor:
        labels, valid = common_target(target, label_map)
        losses = []
        for level in term.settings.levels:
            projector = self._projectors[projector_name(term.settings.teacher, level)]
            student_feature, teacher_feature = projector(tapped[level], teacher.features[level])
            losses.append(term.loss(student_feature, teacher_feature, target=labels, valid=valid))
        return torch.stack(losses).mean()

    def _update_competence(self, output: Tensor, target: Tensor) -> None:
        for name, teacher in self.teacher_outputs.items():
            assert teacher.logits is not None  # the trainer asks for them where the guard watches the Dice
            label_map = self.student_maps[name]
            labels, valid = common_target(target, label_map)
            self.competence[name].update(
                label_map(output.detach()), teacher.logits, labels, valid, label_map.target.regions
            )


def common_target(target: Tensor, label_map: LabelMap) -> tuple[Tensor, Tensor | None]:
    """nnU-Net's target of one level in the common space, and the voxels that count.

    Args:
        target: [B, 1, *S] labels, or [B, regions (+ ignore), *S] one-hot regions.
        label_map: From the student's space to the common one.

    Returns:
        [B, 1, *S] int64 channel indices or [B, regions, *S] bool; and [B, 1, *S] bool, None if all voxels count.
    """
    source, common = label_map.source, label_map.target
    if source.regions:
        valid = None if source.ignore is None else ~target[:, -1:].bool()
        regions = target[:, : source.num_channels].bool()
        order = [group[0] for group in label_map.groups]
        return (regions if label_map.is_identity else regions[:, order]), valid
    labels = target.long()
    valid = None if source.ignore is None else labels != source.ignore
    if valid is not None:
        labels = torch.where(valid, labels, 0)
    if common.regions:
        inside = [torch.stack([labels[:, 0] == label for label in group]).any(0) for group in label_map.groups]
        return torch.stack(inside, 1), valid
    if label_map.is_identity:
        return labels, valid
    return _channel_of_label(label_map, labels.device)[labels], valid


@cache
def _channel_of_label(label_map: LabelMap, device: torch.device) -> Tensor:
    """Common channel of each of the source's labels, copied to the device once."""
    channels = torch.zeros(label_map.source.num_channels, dtype=torch.long)
    for channel, group in enumerate(label_map.groups):
        channels[list(group)] = channel
    return channels.to(device)


def projector_name(teacher: str, level: str) -> str:
    """Key of a projector; nn.ModuleDict allows no dots."""
    return f"{teacher} {level}".replace(".", "_")


def _has_features(output: Any) -> bool:
    return isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], list)
