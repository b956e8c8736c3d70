"""What classification and detection say of one case, collected over tiles, mirrored views and folds.

Classification: a view's logits are those of its pooled tiles, combined as the head combines them (where tiles overlap,
their common positions count once for each tile); the logits are averaged over views and folds. Detection: the boxes of
all tiles, views and folds are merged into one set. Our design.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnunet_kd.data.tasks import ClassificationTarget
from nnunet_kd.evaluation.detection import PredictedBoxes
from nnunet_kd.networks.multitask import TaskOutputs
from nnunet_kd.tasks.box_merging import Candidates, cluster, suppress
from nnunet_kd.tasks.classification import ClassificationHead, Pooled, probabilities
from nnunet_kd.tasks.detection import Detections, DetectionTask

BoxMerging = Literal["cluster", "suppress"]


class FoldFindings(NamedTuple):
    """What one fold's network says of a case."""

    logits: dict[str, Tensor]
    """[1, classes] of each classification target, the mean over views."""
    detections: list[Detections]
    """Of each tile and view, boxes in the image."""
    tiles: list[Tensor]
    """[2 * dim], where each of these views lies in the image; it may reach into padding."""


class FoldCollector:
    """Collects the tiles and mirrored views of one case and fold.

    Args:
        classification: The head that combines and classifies what it pooled; None collects no classes.
        detection: Decodes boxes; None collects none.
        image_shape: Voxels of the preprocessed image along the axes that the network sees.
    """

    def __init__(
        self, classification: ClassificationHead | None, detection: DetectionTask | None, image_shape: Sequence[int]
    ) -> None:
        self.classification = classification
        self.detection = detection
        self.image_shape = tuple(image_shape)
        self._pooled: dict[tuple[int, ...], list[Pooled]] = {}
        self._detections: list[Detections] = []
        self._tiles: list[Tensor] = []

    def add(self, outputs: TaskOutputs, lower: Sequence[int], size: Sequence[int], flipped: tuple[int, ...]) -> None:
        """Add one tile in one view.

        Args:
            outputs: Of a batch of one.
            lower: First voxel of the tile in the image, negative in padding.
            size: Voxels of the tile.
            flipped: Spatial axes along which the network saw it mirrored.
        """
        if self.classification is not None:
            assert outputs.pooled is not None
            self._pooled.setdefault(flipped, []).append(outputs.pooled)
        if self.detection is not None:
            assert outputs.detection is not None
            (found,) = self.detection.decode(outputs.detection, size)
            boxes = mirror(found.boxes, size, flipped) + found.boxes.new_tensor([*lower, *lower])
            self._detections.append(clip_to_image(found._replace(boxes=boxes), self.image_shape))
            first = torch.tensor(list(lower), dtype=boxes.dtype)
            self._tiles.append(torch.cat((first, first + first.new_tensor(list(size)))))

    def finish(self) -> FoldFindings:
        """Combine the tiles; to be called while the network still has this fold's weights."""
        logits: dict[str, Tensor] = {}
        if self.classification is not None:
            combine, classify = self.classification.combine, self.classification.classify
            views = [classify(combine(tiles)) for tiles in self._pooled.values()]
            logits = {name: torch.stack([view[name].float() for view in views]).mean(0) for name in views[0]}
        return FoldFindings(logits, self._detections, self._tiles)


def case_probabilities(
    folds: Sequence[FoldFindings], targets: Sequence[ClassificationTarget]
) -> dict[str, NDArray[np.float32]]:
    """Target name to probabilities [classes], from the mean of the folds' logits."""
    return {
        target.name: probabilities(
            torch.stack([fold.logits[target.name] for fold in folds]).mean(0), multilabel=target.multilabel
        )[0].numpy(force=True)
        for target in targets
    }


def case_boxes(folds: Sequence[FoldFindings], detection: DetectionTask, merging: BoxMerging) -> PredictedBoxes:
    """Labels [N], boxes [N, 2 * dim] in the preprocessed array and scores [N], by falling score, of all folds."""
    views = [found for fold in folds for found in fold.detections]
    counts = torch.tensor([len(found.scores) for found in views])
    candidates = Candidates(
        torch.cat([found.boxes for found in views]),
        torch.cat([found.scores for found in views]),
        torch.cat([found.labels for found in views]),
        torch.arange(len(views)).repeat_interleave(counts),
        torch.stack([tile for fold in folds for tile in fold.tiles]),
    )
    plan = detection.plan
    if merging == "cluster":
        merged = cluster(candidates, plan.nms_threshold, plan.score_threshold)
    else:
        merged = suppress(candidates, plan.nms_threshold)
    return merged.labels.numpy(), merged.boxes.double().numpy(), merged.scores.double().numpy()


def mirror(boxes: Tensor, size: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Boxes [N, 2 * dim] of a patch of ``size`` in the patch flipped along ``axes``; its own inverse."""
    boxes = boxes.clone()
    for axis in axes:
        ends = [axis + len(size), axis]
        boxes[:, [axis, axis + len(size)]] = size[axis] - boxes[:, ends]
    return boxes


def clip_to_image(found: Detections, shape: Sequence[int]) -> Detections:
    """Cut boxes off at the image's edges; those that lie in padding alone are dropped."""
    edges = found.boxes.new_tensor([*shape, *shape])
    boxes = found.boxes.clamp(min=0).minimum(edges)
    inside = (boxes[:, len(shape) :] > boxes[:, : len(shape)]).all(1)
    return Detections(boxes[inside], found.scores[inside], found.labels[inside])
