"""What keeps a weak teacher from hurting (our design; architecture.md section 1 has the facts that led here)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, distributed

from nnunet_kd.tasks.box_merging import paired_iou

COMPETENCE_MOMENTUM = 0.98  # about the last 50 steps
SMALL = 1e-8
NEAR = 0.1  # an anchor with this IoU is beside a box, not a false alarm; detection is scored from this IoU on


class Competence(ABC):
    """Compares teacher and student by how well they do a task on the training batches of about the last 50 steps.

    All counts stay on the device, and nothing waits for them. Processes that share a batch add theirs up, so that they
    weigh their terms alike, and as one process would.
    """

    measure: ClassVar[str]
    strictness: ClassVar[float] = 1.0  # multiplies the guard's exponent

    def __init__(self) -> None:
        self.counts: Tensor | None = None  # [2 (student, teacher), ...]

    @abstractmethod
    def scores(self) -> tuple[Tensor, Tensor]:
        """The measure of student and teacher, each a scalar tensor in [0, 1]."""

    def factor(self, margin: float | None, exponent: float = 0.0) -> Tensor | float:
        """Trust in [0, 1]: the teacher's score to the power of ``exponent`` times the task's ``strictness``.

        It is less while the teacher is behind the student.

        With a ``margin`` it falls linearly to 0 where the teacher is that much behind. The absolute part matters where
        both are equally poor: there a poor teacher would hold its student on its own level.
        """
        if self.counts is None:
            return 1.0
        student, teacher = self.scores()
        trust = teacher ** (exponent * self.strictness)
        return trust if margin is None else trust * (1 - (student - teacher) / max(margin, SMALL)).clamp(0, 1)

    def _add(self, student: Tensor, teacher: Tensor) -> None:
        counts = torch.stack([student, teacher])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts)
        self.counts = counts if self.counts is None else self.counts.lerp(counts, 1 - COMPETENCE_MOMENTUM)

    def _counts(self) -> Tensor:
        assert self.counts is not None
        return self.counts


class SegmentationCompetence(Competence):
    """Mean foreground Dice. Counts: [2, 3 (tp, fp, fn), channels]."""

    measure = "Dice"

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, target: Tensor, valid: Tensor | None, regions: bool) -> None:
        """Add a batch: logits [B, C, *S] of both, target and valid as in ``common_target``."""
        self._add(*(_count_voxels(logits, target, valid, regions) for logits in (student, teacher)))

    def scores(self) -> tuple[Tensor, Tensor]:
        """Mean over the classes that occur."""
        tp, fp, fn = self._counts().unbind(1)
        dice = 2 * tp / (2 * tp + fp + fn).clamp(min=SMALL)
        occurring = (tp + fn).sum(0) > 0
        return _mean_of(dice, occurring)


class ClassificationCompetence(Competence):
    """Youden's J, sensitivity + specificity - 1 and at least 0. Counts: [2, 4 (tp, fp, fn, tn), all targets' classes].

    Unlike accuracy it is 0 where always the same class is predicted, however frequent that is. Source: Youden,
    Cancer 1950.
    """

    measure = "Youden's J"
    # J of a teacher worth listening to is 0.3 where Dice is 0.8; measured, as the README says
    strictness = 0.25

    @torch.no_grad()
    def update(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        multilabel: Mapping[str, bool],
    ) -> None:
        """Add a batch: of each target the logits [B, C] of both and the labels [B, C], NaN where unknown."""
        own, other = (
            torch.cat([_count_cases(logits[name], labels[name], multilabel[name]) for name in labels], 1)
            for logits in (student, teacher)
        )
        self._add(own, other)

    def scores(self) -> tuple[Tensor, Tensor]:
        """Mean over the classes of which cases with and cases without occur."""
        tp, fp, fn, tn = self._counts().unbind(1)
        with_class, without = tp + fn, tn + fp
        sensitivity, specificity = tp / with_class.clamp(min=SMALL), tn / without.clamp(min=SMALL)
        occurring = (with_class.sum(0) > 0) & (without.sum(0) > 0)
        return _mean_of((sensitivity + specificity - 1).clamp(min=0), occurring)


class DetectionCompetence(Competence):
    """Soft Dice of boxes: 2 sum(b) / (boxes + sum(b) + sum(f)).

    b is a true box's highest class probability among the anchors matched to it, f an image's highest probability among
    the anchors that hardly overlap any of its boxes. The anchors beside a matched one say nothing: they fire as well,
    and suppression drops them. Counts: [2, 3 (sum of b, of f, boxes)].
    """

    measure = "soft Dice of boxes"
    strictness = 0.25  # as for classes

    @torch.no_grad()
    def update(
        self,
        student: Tensor,
        teacher: Tensor,
        anchors: Tensor,
        matches: Sequence[Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> None:
        """Add a batch.

        Args:
            student: Class logits [B, N, classes].
            teacher: The same of the teacher.
            anchors: [N, 2 * dim].
            matches: Per image [N], the box of each anchor or -1.
            boxes: Per image [n, 2 * dim].
            labels: Per image [n].
        """
        counts = []
        for image, (match, own, classes) in enumerate(zip(matches, boxes, labels, strict=True)):
            own = own.to(anchors)
            is_matched = match == torch.arange(len(own), device=match.device)[:, None]  # [n, N]
            is_near = (paired_iou(own[:, None], anchors) >= NEAR) | is_matched
            both = torch.stack((student[image], teacher[image])).float().sigmoid()  # [2, N, classes]
            of_boxes = both[:, :, classes.to(match.device)].transpose(1, 2).where(is_matched, 0.0).amax(2)
            false_alarm = both.amax(2).where(~is_near.any(0), 0.0).amax(1)
            found = of_boxes.sum(1)
            counts.append(torch.stack((found, false_alarm, torch.full_like(found, len(own))), 1))
        self._add(*torch.stack(counts).sum(0))

    def scores(self) -> tuple[Tensor, Tensor]:
        """Over all classes together; 0 where no box has been seen."""
        found, false_alarms, boxes = self._counts().unbind(1)
        student, teacher = (2 * found / (boxes + found + false_alarms).clamp(min=SMALL)).unbind(0)
        return student, teacher


COMPETENCE: dict[str, type[Competence]] = {
    "segmentation": SegmentationCompetence,
    "classification": ClassificationCompetence,
    "detection": DetectionCompetence,
}


def _mean_of(values: Tensor, occurring: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each row of ``values`` [2, C] over the classes that occur; 0 if there are none."""
    weights = occurring / occurring.sum().clamp(min=1)
    student, teacher = (values * weights).sum(1).unbind(0)
    return student, teacher


def _count_voxels(logits: Tensor, target: Tensor, valid: Tensor | None, regions: bool) -> Tensor:
    """True positives, false positives, false negatives per foreground channel: [3, C].

    Where two classes are equally probable both are predicted. Written for speed: on a CPU argmax over the channels and
    sums of booleans take ten times as long as the rest.
    """
    if regions:
        predicted, inside = logits > 0, target.bool()
    else:
        shape = (1, -1, *[1] * (logits.ndim - 2))
        logits, best = logits[:, 1:], logits.amax(1, keepdim=True)
        classes = torch.arange(1, logits.shape[1] + 1, device=logits.device).view(shape)
        predicted, inside = logits == best, target == classes
    if valid is not None:
        predicted, inside = predicted & valid, inside & valid
    tp, num_predicted, num_inside = (
        mask.flatten(2).count_nonzero((0, 2)) for mask in (predicted & inside, predicted, inside)
    )
    return torch.stack([tp, num_predicted - tp, num_inside - tp]).float()


def _count_cases(logits: Tensor, labels: Tensor, multilabel: bool) -> Tensor:
    """True and false positives, false and true negatives of each class among the labelled cases: [4, C]."""
    if multilabel:
        known, predicted = ~labels.isnan(), logits > 0
    else:
        known = ~labels.isnan().any(1, keepdim=True)
        predicted = logits.argmax(1, keepdim=True) == torch.arange(logits.shape[1], device=logits.device)
    present = labels > 0.5
    cells = (predicted & present, predicted & ~present, ~predicted & present, ~predicted & ~present)
    return torch.stack([(cell & known).sum(0) for cell in cells]).float()
