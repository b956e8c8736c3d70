"""The supervised loss of a dataset with several tasks: nnU-Net's own, classification, detection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_kd.networks.multitask import TaskOutputs
from nnunet_kd.settings import TaskSettings
from nnunet_kd.tasks.classification import ClassificationLoss
from nnunet_kd.tasks.detection import DetectionTask


class TaskLoss(nn.Module):
    """Weighted sum of the losses of a dataset's tasks; a task without labels in the batch adds 0.

    The trainer names the batch's labels (:meth:`set_batch`) before each step. Called with a segmentation alone, as
    nnU-Net's validation step does, it is the segmentation's loss.

    Args:
        segmentation: nnU-Net's loss; None where the dataset has no segmentations.
        classification: Target's name to its loss; their mean counts.
        detection: The dataset's boxes; None without.
        weights: Of the tasks.
    """

    def __init__(
        self,
        segmentation: nn.Module | None,
        classification: Mapping[str, ClassificationLoss],
        detection: DetectionTask | None,
        weights: TaskSettings,
    ) -> None:
        super().__init__()
        self.segmentation = segmentation
        self.classification = nn.ModuleList(classification.values())
        self.targets = tuple(classification)
        self.detection = detection
        self.weights = weights
        self.class_labels: dict[str, Tensor] = {}
        self.boxes: Sequence[Tensor] = ()
        self.box_labels: Sequence[Tensor] = ()
        self.matches: Sequence[Tensor] = ()  # of the last output, see DetectionTask.matches

    @property
    def multilabel(self) -> dict[str, bool]:
        """Target's name to whether a case may have several of its classes."""
        losses: Any = self.classification
        return {name: loss.multilabel for name, loss in zip(self.targets, losses, strict=True)}

    def set_batch(self, batch: Mapping[str, Any], device: torch.device) -> None:
        """Take the labels of the next batch to the device."""
        labels = batch.get("class_labels", {})
        self.class_labels = {name: value.to(device, non_blocking=True) for name, value in labels.items()}
        self.boxes = [value.to(device, non_blocking=True) for value in batch.get("boxes", ())]
        self.box_labels = [value.to(device, non_blocking=True) for value in batch.get("box_labels", ())]

    def forward(self, output: Any, target: Any) -> Tensor:
        """Return the scalar loss of ``output``: :class:`TaskOutputs`, or a segmentation as nnU-Net's networks give."""
        if not isinstance(output, TaskOutputs):
            return self._of_segmentation(output, target)
        several = isinstance(target, (list, tuple))
        weighted = []
        if output.segmentation:
            outputs = output.segmentation if several else output.segmentation[0]
            weighted.append(self.weights.segmentation * self._of_segmentation(outputs, target))
        if output.classification is not None and self.targets:
            losses = [
                loss(output.classification[name], self.class_labels[name])
                for name, loss in zip(self.targets, self.classification, strict=True)
            ]
            weighted.append(self.weights.classification * torch.stack(losses).mean())
        if output.detection is not None and self.detection is not None:
            self.matches = self.detection.matches(output.detection, self.boxes)
            parts = self.detection.loss(output.detection, self.boxes, self.box_labels, self.matches)
            weighted += [self.weights.detection * part for part in parts.values()]
        return torch.stack(weighted).sum()

    def _of_segmentation(self, output: Any, target: Any) -> Tensor:
        assert self.segmentation is not None  # a network that is trained without gives no outputs
        loss: Tensor = self.segmentation(output, target)
        return loss
