"""The student's loss: the stock supervised loss plus a list of terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_kd.data.tasks import ClassificationTarget
from nnunet_kd.errors import SettingsError
from nnunet_kd.losses import build_loss
from nnunet_kd.losses.deep_supervision import deep_supervision_loss
from nnunet_kd.losses.schedules import schedule_weight
from nnunet_kd.networks.adapters import to_common_grid
from nnunet_kd.networks.multitask import TaskOutputs
from nnunet_kd.settings import Guard, Settings, Term
from nnunet_kd.spaces.labels import LabelMap
from nnunet_kd.teachers.output import Taught, TeacherOutput
from nnunet_kd.training.guard import (
    COMPETENCE,
    ClassificationCompetence,
    Competence,
    DetectionCompetence,
    SegmentationCompetence,
)
from nnunet_kd.training.task_terms import AnchorMaps, ClassLogitsLoss, as_map, box_regression_term
from nnunet_kd.training.terms import asked_task, is_imitation, is_pooled, judging_task

POOLED = "pooled"  # stands for a level where projectors are named


@dataclass
class BuiltTerm:
    """A term with its loss module. ``name`` is how it appears in the log."""

    name: str
    settings: Term
    loss: nn.Module

    def weight(self, progress: float) -> float:
        """Scheduled weight at ``progress`` in [0, 1] of the training."""
        schedule = self.settings.schedule
        factor = schedule_weight(
            schedule.kind, progress, warmup=schedule.warmup, start=schedule.start, final=schedule.final
        )
        return self.settings.weight * factor


def build_terms(
    settings: Settings, regions_of_teacher: Mapping[str, bool], targets: Sequence[ClassificationTarget] = ()
) -> list[BuiltTerm]:
    """Build every term of the settings.

    Args:
        settings: Validated settings.
        regions_of_teacher: Whether student and teacher are compared in regions (sigmoid), per teacher with terms on
            logits.
        targets: What the student classifies.

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
            if term.on == "classification" and not is_pooled(term):
                loss: nn.Module = ClassLogitsLoss(term.loss, targets, **options)
            else:
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
        supervised: Stock nnU-Net's loss, with deep supervision if it is on; :class:`TaskLoss` where the network gives
            :class:`TaskOutputs`.
        level_weights: nnU-Net's deep supervision weights, highest resolution first; (1,) without deep supervision.
        terms: Built terms.
        taught: Per teacher, what it can teach.
        projectors: Projector name to module, see :func:`projector_name`.
        levels: Levels in the order of the tapped features.
        guard: What keeps a weak teacher from hurting.
    """

    def __init__(
        self,
        supervised: nn.Module,
        level_weights: Sequence[float],
        terms: Sequence[BuiltTerm],
        taught: Mapping[str, Taught],
        projectors: Mapping[str, nn.Module],
        levels: Sequence[str],
        guard: Guard,
    ) -> None:
        super().__init__()
        self.supervised: Any = supervised
        self.level_weights = tuple(float(weight) for weight in level_weights)
        self.terms = tuple(terms)
        self.taught = dict(taught)
        self._projectors = projectors
        self.levels = tuple(levels)
        self.guard = guard
        self.judges: dict[str, str | None] = {}  # term's name to the task by which the guard judges it
        self.competence: dict[str, dict[str, Competence]] = {name: {} for name in taught}
        for term in terms if guard.watches else ():
            teacher = term.settings.teacher
            judge = self.judges[term.name] = judging_task(term.settings, taught[teacher].tasks)
            if judge is not None and judge not in self.competence[teacher]:
                self.competence[teacher][judge] = COMPETENCE[judge]()
        self.teacher_outputs: dict[str, TeacherOutput] = {}
        self.groups: dict[str, slice] = {}  # of a semi-supervised batch: which samples are labelled, ...
        self.progress = 0.0
        self.logged: dict[str, tuple[Tensor, Tensor]] = {}

    def asked(self, progress: float | None = None) -> dict[str, set[str]]:
        """Which tasks' outputs to ask of which teacher.

        Args:
            progress: Only for the terms that have a weight then; None means all terms.

        Returns:
            Teacher to tasks, which may be none: then features are enough.
        """
        asked: dict[str, set[str]] = {}
        for term in self.terms:
            if progress is None or term.weight(progress) != 0:
                tasks = {asked_task(term.settings), self.judges.get(term.name)}
                asked.setdefault(term.settings.teacher, set()).update(task for task in tasks if task is not None)
        return asked

    def forward(self, output: Any, target: Any) -> Tensor:
        """``output`` is the network's: outputs alone, or while training also the tapped features or all tasks."""
        several = isinstance(target, (list, tuple))
        targets = list(target) if several else [target]
        if isinstance(output, TaskOutputs):
            student = output
            total: Tensor = self.supervised(output, target)
        else:
            found, features = output if _has_features(output) else (output, [])
            student = TaskOutputs(list(found) if isinstance(found, (list, tuple)) else [found], features)
            total = self.supervised(student.segmentation if several else student.segmentation[0], target)
        if not student.segmentation:
            # the features of a term that has no weight yet: under DDP every parameter must get a gradient
            total = total + sum(feature.sum() for feature in student.features) * 0
        if not self.teacher_outputs:
            return total
        tapped = dict(zip(self.levels, student.features, strict=True))
        anchor_maps = self._anchor_maps(student)
        self._update_competence(student, targets, anchor_maps)
        for term in self.terms:
            weight: Tensor | float = term.weight(self.progress)
            if weight == 0 or not self._has_samples(term):
                continue
            raw = self._compare(term, student, tapped, targets, anchor_maps)
            judge = self.judges.get(term.name)
            if judge is not None:
                competence = self.competence[term.settings.teacher][judge]
                weight = weight * competence.factor(self.guard.margin, self.guard.exponent)
            scaled = weight * raw
            total = total + scaled
            self.logged[term.name] = (raw.detach(), scaled.detach())
        return total

    def _anchor_maps(self, student: TaskOutputs) -> dict[str | None, AnchorMaps]:
        """What is said of all anchors by the student (None) and by each teacher that was asked for boxes."""
        boxes = {name: teacher.boxes for name, teacher in self.teacher_outputs.items() if teacher.boxes is not None}
        if not boxes or student.detection is None:
            return {}
        flatten = self.supervised.detection.flatten
        return {None: flatten(student.detection), **{name: flatten(maps) for name, maps in boxes.items()}}

    def _compare(
        self,
        term: BuiltTerm,
        student: TaskOutputs,
        tapped: Mapping[str, Tensor],
        targets: Sequence[Tensor],
        anchor_maps: Mapping[str | None, AnchorMaps],
    ) -> Tensor:
        """The raw value of a term. All that it needs is there: terms are checked before training starts."""
        name, on = term.settings.teacher, term.settings.on
        teacher, tasks = self.teacher_outputs[name], self.supervised
        value: Tensor
        if on == "logits":
            value = self._logit_term(term, student.segmentation, targets, teacher)
        elif on == "features":
            value = self._feature_term(term, tapped, targets[0], teacher)
        elif is_pooled(term.settings):
            assert student.pooled is not None
            assert teacher.pooled is not None
            projector = self._projectors[projector_name(name, POOLED)]
            value = term.loss(*projector(as_map(torch.cat(student.pooled.values, 1)), as_map(teacher.pooled)))
        elif on == "classification":
            value = term.loss(student.classification, teacher.classification, tasks.class_labels)
        elif is_imitation(term.settings):
            value = self._imitation_term(term, tapped, targets[0].shape[2:], teacher)
        elif term.settings.loss == "giou":
            assert student.detection is not None
            anchors = tasks.detection.anchors(student.detection)
            value = box_regression_term(term.loss, tasks.detection.coder, anchors, anchor_maps[None], anchor_maps[name])
        else:
            value = term.loss(anchor_maps[None][0], anchor_maps[name][0])
        return value

    def _logit_term(
        self, term: BuiltTerm, outputs: Sequence[Tensor], targets: Sequence[Tensor], teacher: TeacherOutput
    ) -> Tensor:
        label_map, rows = self.taught[term.settings.teacher].label_map, self._rows(term)
        assert teacher.logits is not None
        assert label_map is not None
        weights = self.level_weights if term.settings.deep_supervision else (1.0,)
        used = [level for level, weight in enumerate(weights) if weight != 0]
        pairs = [common_target(targets[level][rows], label_map) for level in used]
        return deep_supervision_loss(
            term.loss,
            [label_map(outputs[level][rows]) for level in used],
            teacher.logits[rows],
            [weights[level] for level in used],
            targets=[labels for labels, _ in pairs],
            valids=None if label_map.source.ignore is None else [valid for _, valid in pairs if valid is not None],
        )

    def _feature_term(
        self, term: BuiltTerm, tapped: Mapping[str, Tensor], target: Tensor, teacher: TeacherOutput
    ) -> Tensor:
        label_map = self.taught[term.settings.teacher].label_map
        labels, valid = (None, None) if label_map is None else common_target(target[self._rows(term)], label_map)
        if term.settings.foreground_only:
            assert labels is not None  # checked with the settings
            valid = _in_foreground_patches(labels, valid)
        pairs = self._projected(term, tapped, teacher)
        return torch.stack([term.loss(own, other, target=labels, valid=valid) for own, other in pairs]).mean()

    def _imitation_term(
        self, term: BuiltTerm, tapped: Mapping[str, Tensor], patch_shape: Sequence[int], teacher: TeacherOutput
    ) -> Tensor:
        boxes = self.supervised.boxes
        pairs = self._projected(term, tapped, teacher)
        return torch.stack([term.loss(own, other, boxes, patch_shape) for own, other in pairs]).mean()

    def _projected(
        self, term: BuiltTerm, tapped: Mapping[str, Tensor], teacher: TeacherOutput
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features of student and teacher at each of the term's levels, of one width and grid."""
        rows = self._rows(term)
        for level in term.settings.levels:
            bring_together = self._projectors.get(projector_name(term.settings.teacher, level), to_common_grid)
            own, other = tapped[level][rows], teacher.features[level][rows]
            if teacher.slices is not None:
                own = teacher.slices[rows].of_features(own)
            yield bring_together(own, other)

    def _has_samples(self, term: BuiltTerm) -> bool:
        """Whether the batch has any of the samples that the term compares."""
        return not term.settings.samples or any(name in self.groups for name in term.settings.samples)

    def _rows(self, term: BuiltTerm) -> slice:
        """The samples of the batch that the term compares; they follow each other, see ``fit_terms``."""
        found = [self.groups[name] for name in term.settings.samples if name in self.groups]
        return slice(min(own.start for own in found), max(own.stop for own in found)) if found else slice(None)

    def _update_competence(
        self, student: TaskOutputs, targets: Sequence[Tensor], anchor_maps: Mapping[str | None, AnchorMaps]
    ) -> None:
        for name, teacher in self.teacher_outputs.items():
            for competence in self.competence[name].values():
                if isinstance(competence, SegmentationCompetence) and teacher.logits is not None:
                    label_map = self.taught[name].label_map
                    assert label_map is not None
                    labels, valid = common_target(targets[0], label_map)
                    own = label_map(student.segmentation[0].detach())
                    competence.update(own, teacher.logits, labels, valid, label_map.target.regions)
                elif isinstance(competence, ClassificationCompetence) and teacher.classification:
                    assert student.classification is not None
                    tasks = self.supervised
                    competence.update(
                        student.classification, teacher.classification, tasks.class_labels, tasks.multilabel
                    )
                elif isinstance(competence, DetectionCompetence) and teacher.boxes is not None:
                    assert student.detection is not None
                    tasks = self.supervised
                    anchors = tasks.detection.anchors(student.detection)
                    own, other = anchor_maps[None][0], anchor_maps[name][0]
                    competence.update(own, other, anchors, tasks.matches, tasks.boxes, tasks.box_labels)


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


def _in_foreground_patches(labels: Tensor, valid: Tensor | None) -> Tensor:
    """Valid voxels [B, 1, *S] of the samples in which some foreground can be seen."""
    inside = (labels > 0).any(1, keepdim=True)
    inside = inside if valid is None else inside & valid
    has_foreground = inside.flatten(1).any(1).reshape(-1, *[1] * (labels.ndim - 1))
    shape = (len(labels), 1, *labels.shape[2:])
    return has_foreground.expand(shape) if valid is None else valid & has_foreground


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
