"""What keeps a weak teacher from hurting (our design; architecture.md section 1 has the facts that led here)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

COMPETENCE_MOMENTUM = 0.98  # about the last 50 steps
SMALL = 1e-8


class Competence(ABC):
    """Compares teacher and student by how well they do a task on the training batches of about the last 50 steps.

    All counts stay on the device; nothing is synchronised.
    """

    measure: ClassVar[str]

    def __init__(self) -> None:
        self.counts: Tensor | None = None  # [2 (student, teacher), ...]

    @abstractmethod
    def scores(self) -> tuple[Tensor, Tensor]:
        """The measure of student and teacher, each a scalar tensor in [0, 1]."""

    def factor(self, margin: float | None, exponent: float = 0.0) -> Tensor | float:
        """Trust in [0, 1]: the teacher's score to the power of ``exponent``, less while it is behind the student.

        With a ``margin`` it falls linearly to 0 where the teacher is that much behind. The absolute part matters where
        both are equally poor: there a poor teacher would hold its student on its own level.
        """
        if self.counts is None:
            return 1.0
        student, teacher = self.scores()
        trust = teacher**exponent
        return trust if margin is None else trust * (1 - (student - teacher) / max(margin, SMALL)).clamp(0, 1)

    def _add(self, student: Tensor, teacher: Tensor) -> None:
        counts = torch.stack([student, teacher])
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
    """Soft Dice of the class probabilities p of all anchors and their truth y: 2 sum(p y) / (sum(p^2) + sum(y)).

    Counts: [2, 3 (sum of p y, of p^2, of y)].
    """

    measure = "soft Dice of anchors"

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, matches: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
        """Add a batch: class logits [B, N, classes] of both, per image the box of each anchor and the boxes' labels."""
        truth = torch.stack(
            [_classes_of_anchors(match, own, student.shape[2]) for match, own in zip(matches, labels, strict=True)]
        )
        self._add(*(_sum_anchors(logits, truth) for logits in (student, teacher)))

    def scores(self) -> tuple[Tensor, Tensor]:
        """Over all classes together; 0 where no box has been seen."""
        overlap, squares, truth = self._counts().unbind(1)
        student, teacher = (2 * overlap / (squares + truth).clamp(min=SMALL)).unbind(0)
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


def _classes_of_anchors(match: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """1 where an anchor [N] is matched to a box of the class, else 0: [N, classes]."""
    if not len(labels):
        return torch.zeros(len(match), num_classes, device=match.device)
    classes = labels.to(match.device)[match.long().clamp(min=0)]
    of_class = classes[:, None] == torch.arange(num_classes, device=match.device)
    return (of_class & (match >= 0)[:, None]).float()


def _sum_anchors(logits: Tensor, truth: Tensor) -> Tensor:
    probabilities = logits.float().sigmoid()
    return torch.stack([(probabilities * truth).sum(), probabilities.square().sum(), truth.sum()])
