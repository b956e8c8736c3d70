"""Scores of the tasks on an epoch's validation patches: they choose checkpoint_best and are drawn, no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nnunet_kd.data.side_files import CaseBoxes
from nnunet_kd.data.tasks import Tasks
from nnunet_kd.evaluation.detection import PredictedBoxes, evaluate_detection
from nnunet_kd.tasks.classification import macro_auroc, probabilities
from nnunet_kd.tasks.detection import Detections


class TaskScores:
    """Collects patches and scores them: macro AUROC of each classification target, AP at IoU 0.1 of detection.

    A patch counts as an image of its own, so the scores are rougher than those of the final validation.
    """

    def __init__(self, tasks: Tasks) -> None:
        self.tasks = tasks
        self.scores: dict[str, list[NDArray[np.float32]]] = {target.name: [] for target in tasks.classification}
        self.labels: dict[str, list[NDArray[np.float32]]] = {target.name: [] for target in tasks.classification}
        self.detections: list[PredictedBoxes] = []
        self.boxes: list[CaseBoxes] = []

    @property
    def names(self) -> list[str]:
        """Names of the scores, in order."""
        detection = [] if self.tasks.detection is None else ["AP"]
        return [f"AUROC {target.name}" for target in self.tasks.classification] + detection

    def add(
        self,
        logits: Mapping[str, Tensor] | None,
        detections: Sequence[Detections] | None,
        batch: Mapping[str, Any],
    ) -> None:
        """Add a batch: logits [B, classes] per target, B detections, and the batch with its labels."""
        for target in self.tasks.classification if logits is not None else ():
            assert logits is not None
            self.scores[target.name].append(
                probabilities(logits[target.name], multilabel=target.multilabel).numpy(force=True)
            )
            self.labels[target.name].append(batch["class_labels"][target.name].numpy(force=True))
        if detections is not None:
            for found, boxes, labels in zip(detections, batch["boxes"], batch["box_labels"], strict=True):
                self.detections.append(
                    (
                        found.labels.numpy(force=True),
                        found.boxes.double().numpy(force=True),
                        found.scores.double().numpy(force=True),
                    )
                )
                self.boxes.append(CaseBoxes(labels.numpy(force=True), boxes.double().numpy(force=True)))

    def values(self) -> dict[str, float]:
        """Each score in [0, 1]; NaN where it is not defined, for example without a positive patch."""
        result: dict[str, float] = {}
        for target in self.tasks.classification:
            parts = self.scores[target.name], self.labels[target.name]
            known = bool(parts[0])
            result[f"AUROC {target.name}"] = macro_auroc(*map(np.concatenate, parts)) if known else float("nan")
        if self.tasks.detection is not None:
            images = [str(index) for index in range(len(self.boxes))]
            scores = evaluate_detection(
                dict(zip(images, self.boxes, strict=True)),
                dict(zip(images, self.detections, strict=True)),
                self.tasks.detection.classes,
                num_resamples=0,
            )
            result["AP"] = scores.mean.ap_10
        return result

    @staticmethod
    def of_epoch(outputs: Sequence[Mapping[str, Any]], collected: Sequence[TaskScores]) -> dict[str, float]:
        """All scores of a dataset; NaN where one is not defined.

        Args:
            outputs: Of nnU-Net's ``validation_step``; those of segmentations hold counts per class.
            collected: Of every process; empty where segmentation is the only task.
        """
        dice = pseudo_dice(outputs)
        known = [value for value in dice if not np.isnan(value)]
        scores = {"Dice": float(np.mean(known)) if known else float("nan")} if dice else {}
        return {**scores, **(TaskScores.joined(collected).values() if collected else {})}

    @classmethod
    def joined(cls, parts: Sequence[TaskScores]) -> TaskScores:
        """All that several processes collected."""
        joined = cls(parts[0].tasks)
        for part in parts:
            for name in joined.scores:
                joined.scores[name] += part.scores[name]
                joined.labels[name] += part.labels[name]
            joined.detections += part.detections
            joined.boxes += part.boxes
        return joined


def pseudo_dice(outputs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Dice per class over all patches, NaN for a class that does not occur; empty without a segmentation."""
    counted = [output for output in outputs if "tp_hard" in output]
    if not counted:
        return []
    tp, fp, fn = (np.sum([output[key] for output in counted], 0) for key in ("tp_hard", "fp_hard", "fn_hard"))
    with np.errstate(invalid="ignore"):
        dice: list[float] = (2 * tp / (2 * tp + fp + fn)).tolist()
    return dice


def mean_score(scores: Mapping[str, float]) -> float:
    """Mean of the scores that are defined; NaN if none is."""
    known = [score for score in scores.values() if not np.isnan(score)]
    return float(np.mean(known)) if known else float("nan")


class LatestScores:
    """The last defined value of every score of every dataset.

    A few validation patches may lack what a score needs. Were it left out of the mean then, epochs would be compared
    in different tasks; were it 0, one of them would be punished for its patches.
    """

    def __init__(self, values: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self.values = {dataset: dict(own) for dataset, own in (values or {}).items()}

    def update(self, dataset: str, scores: Mapping[str, float]) -> None:
        """Take over those scores of an epoch that are defined."""
        known = {name: score for name, score in scores.items() if not np.isnan(score)}
        self.values.setdefault(dataset, {}).update(known)

    def joint(self) -> float:
        """Mean over datasets of the mean over their scores; NaN as long as none was defined."""
        return mean_score({dataset: mean_score(own) for dataset, own in self.values.items()})
