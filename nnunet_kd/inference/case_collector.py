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
from nnunet_kd.tasks.detection import Detections, DetectionTask, Proposals

BoxMerging = Literal["cluster", "suppress"]
VIEWS_AT_ONCE = 256  # after so many, proposals leave the device, to bound the memory


class Place(NamedTuple):
    """What a view showed."""

    lower: tuple[int, ...]
    """First voxel of the tile in the image, negative in padding."""
    size: tuple[int, ...]
    """Voxels of the tile."""
    flipped: tuple[int, ...]
    """Spatial axes along which the network saw it mirrored."""


class FoldFindings(NamedTuple):
    """What one fold's network says of a case."""

    logits: dict[str, Tensor]
    """[1, classes] of each classification target, the mean over views."""
    boxes: Candidates | None
    """Of all tiles and views, in the image, on the CPU; a tile may reach into padding. None without detection."""


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
        self._proposals: list[Proposals] = []
        self._places: list[Place] = []
        self._found: list[Candidates] = []

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
            self._proposals.append(self.detection.propose(outputs.detection))
            self._places.append(Place(tuple(lower), tuple(size), flipped))
            if len(self._places) == VIEWS_AT_ONCE:
                self._suppress()

    def finish(self) -> FoldFindings:
        """Combine the tiles; to be called while the network still has this fold's weights."""
        logits: dict[str, Tensor] = {}
        if self.classification is not None:
            combine, classify = self.classification.combine, self.classification.classify
            views = [classify(combine(tiles)) for tiles in self._pooled.values()]
            logits = {name: torch.stack([view[name].float() for view in views]).mean(0) for name in views[0]}
        if self._places:
            self._suppress()
        return FoldFindings(logits, joined(self._found) if self._found else None)

    def _suppress(self) -> None:
        """Make boxes in the image of what was proposed in the views so far; here the device is waited for."""
        assert self.detection is not None
        proposals = Proposals(*(torch.cat(parts) for parts in zip(*self._proposals, strict=True)))
        found, views = self.detection.suppress(proposals, self._places[0].size)
        self._found.append(in_image(found, views, self._places, self.image_shape))
        self._proposals, self._places = [], []


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
    candidates = joined([fold.boxes for fold in folds if fold.boxes is not None])
    plan = detection.plan
    if merging == "cluster":
        merged = cluster(candidates, plan.nms_threshold, plan.score_threshold)
    else:
        merged = suppress(candidates, plan.nms_threshold)
    return merged.labels.numpy(), merged.boxes.double().numpy(), merged.scores.double().numpy()


def in_image(found: Detections, views: Tensor, places: Sequence[Place], shape: Sequence[int]) -> Candidates:
    """The boxes of views in the image, cut off at its edges; those that lie in padding alone are dropped.

    Args:
        found: Boxes in the patches that the network saw.
        views: [N], the index in ``places`` of the view that found each box.
        places: Of the views.
        shape: Voxels of the image.
    """
    dimension = len(shape)
    lower = found.boxes.new_tensor([place.lower for place in places])
    size = found.boxes.new_tensor([place.size for place in places])
    mirrored = torch.tensor([[axis in place.flipped for axis in range(dimension)] for place in places])[views]
    first, last = found.boxes[:, :dimension], found.boxes[:, dimension:]
    first, last = (
        torch.where(mirrored, size[views] - last, first) + lower[views],
        torch.where(mirrored, size[views] - first, last) + lower[views],
    )
    edges = found.boxes.new_tensor(shape)
    first, last = first.clamp(min=0).minimum(edges), last.clamp(min=0).minimum(edges)
    inside = (last > first).all(1)
    boxes = torch.cat((first, last), 1)[inside]
    tiles = torch.cat((lower, lower + size), 1)
    return Candidates(boxes, found.scores[inside], found.labels[inside], views[inside], tiles)


def joined(parts: Sequence[Candidates]) -> Candidates:
    """The boxes of all parts, each of which has views of its own."""
    first = 0
    numbered = []
    for part in parts:
        numbered.append(part._replace(views=part.views + first))
        first += len(part.tiles)
    return Candidates(*(torch.cat(values) for values in zip(*numbered, strict=True)))
