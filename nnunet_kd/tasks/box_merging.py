"""One set of boxes from overlapping tiles, mirrored views and folds.

A view is one forward pass: one tile, mirrored or not, of one fold. All boxes are [N, 2 * dim] in array order, in
voxel edges of one whole image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from monai.data.box_utils import batched_nms, box_area, box_iou
from torch import Tensor

from nnunet_kd.tasks.detection import Detections

CENTRE_WIDTH = 0.8  # standard deviation of the centre factor, in half tiles; as in the Medical Detection Toolkit


class Candidates(NamedTuple):
    """Boxes of all views of one image."""

    boxes: Tensor
    """[N, 2 * dim], in the whole image."""
    scores: Tensor
    """[N] in [0, 1]."""
    labels: Tensor
    """[N] int64."""
    views: Tensor
    """[N] int64, the row in ``tiles`` of the view that found the box."""
    tiles: Tensor
    """[V, 2 * dim], what each view saw of the image; a tile has one row for each mirroring and fold."""


def suppress(candidates: Candidates, iou_threshold: float = 0.3) -> Detections:
    """Non-maximum suppression: of boxes of one class with a greater IoU, only one is kept, with its own score.

    Boxes in the middle of their tile go first (score times :func:`centre_factor`), because boxes at its border are
    often cut. A score is the greatest of some views, so it grows with their number: take
    :func:`cluster` where ensembles of different size are compared.
    """
    rank = candidates.scores * centre_factor(candidates.boxes, candidates.tiles[candidates.views])
    kept = batched_nms(candidates.boxes, rank, candidates.labels, iou_threshold)
    return _sorted(candidates.boxes[kept], candidates.scores[kept], candidates.labels[kept])


def cluster(candidates: Candidates, iou_threshold: float = 0.3, score_threshold: float = 0.0) -> Detections:
    """Weighted box clustering: boxes of one class that overlap the best one of them become one box.

    With score s, corners c, and weight w = (IoU with the best box) x (area) x (centre factor) of each box of a cluster:
    score = sum(s w) / (sum(w) + missing mean(w)) and corners = sum(c s w) / sum(s w), where missing is the number of
    views that could have seen the box but found none. So a score is a mean over views, whatever their number, and is
    comparable between one fold and an ensemble of several.

    Args:
        candidates: Of all views.
        iou_threshold: Boxes join the cluster of a better one from this IoU on.
        score_threshold: Clusters below it are left out.

    Source: Jaeger et al., Retina U-Net, ML4H 2019 (arXiv:1811.08661), section 2.3, and its Medical Detection Toolkit.
    The number of views is counted for the best box of the cluster, by the share of it that each tile shows.
    """
    centre = centre_factor(candidates.boxes, candidates.tiles[candidates.views])
    boxes, scores, labels = [], [], []
    for label in candidates.labels.unique().tolist():
        remaining = torch.where((candidates.labels == label) & (candidates.scores > 0))[0]
        remaining = remaining[candidates.scores[remaining].argsort(descending=True, stable=True)]
        while len(remaining):
            best = remaining[:1]
            overlap = box_iou(candidates.boxes[best], candidates.boxes[remaining])[0]
            joins = overlap >= iou_threshold
            joins[0] = True
            members, overlap, remaining = remaining[joins], overlap[joins], remaining[~joins]
            weight = overlap * box_area(candidates.boxes[members]) * centre[members]
            weighted = candidates.scores[members] * weight
            expected = visible_share(candidates.boxes[best], candidates.tiles).sum()
            missing = (expected - len(candidates.views[members].unique())).clamp(min=0)
            scores.append(weighted.sum() / (weight.sum() + missing * weight.mean()))
            boxes.append((candidates.boxes[members] * weighted[:, None]).sum(0) / weighted.sum())
            labels.append(label)
    if not boxes:
        return Detections(candidates.boxes[:0], candidates.scores[:0], candidates.labels[:0])
    merged = _sorted(torch.stack(boxes), torch.stack(scores), torch.tensor(labels))
    kept = merged.scores >= score_threshold
    return Detections(merged.boxes[kept], merged.scores[kept], merged.labels[kept])


def centre_factor(boxes: Tensor, tiles: Tensor) -> Tensor:
    """How central each box [N, 2 * dim] lies in its tile [N, 2 * dim]: 1 in the middle, [N].

    The mean over axes of a Gaussian of the distance between the centres, with ``CENTRE_WIDTH`` half tiles as standard
    deviation.
    """
    dimension = boxes.shape[1] // 2
    distance = (boxes[:, :dimension] + boxes[:, dimension:] - tiles[:, :dimension] - tiles[:, dimension:]) / 2
    half_tile = (tiles[:, dimension:] - tiles[:, :dimension]) / 2
    return (-0.5 * (distance / (CENTRE_WIDTH * half_tile)) ** 2).exp().mean(1)


def visible_share(boxes: Tensor, tiles: Tensor) -> Tensor:
    """Share in [0, 1] of the volume of each box [N, 2 * dim] that lies in each tile [V, 2 * dim], [N, V]."""
    dimension = boxes.shape[1] // 2
    first = torch.maximum(boxes[:, None, :dimension], tiles[None, :, :dimension])
    last = torch.minimum(boxes[:, None, dimension:], tiles[None, :, dimension:])
    volume = (boxes[:, dimension:] - boxes[:, :dimension]).prod(1)
    return (last - first).clamp(min=0).prod(2) / volume[:, None]


def _sorted(boxes: Tensor, scores: Tensor, labels: Tensor) -> Detections:
    order = scores.argsort(descending=True, stable=True)
    return Detections(boxes[order], scores[order], labels[order])
