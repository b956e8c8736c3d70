"""Overlapping boxes become one: within one view, and over overlapping tiles, mirrored views and folds.

A view is one forward pass: one tile, mirrored or not, of one fold. All boxes are [N, 2 * dim] in array order, in
voxel edges of one whole image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CENTRE_WIDTH = 0.8  # standard deviation of the centre factor, in half tiles; as in the Medical Detection Toolkit
CLUSTERS_AT_ONCE = 256  # compared with all tiles in one step, to bound the memory


class Detections(NamedTuple):
    """Boxes of one image, falling score."""

    boxes: Tensor
    """[N, 2 * dim] float32, array order, voxel edges."""
    scores: Tensor
    """[N] float32 in [0, 1]."""
    labels: Tensor
    """[N] int64, index into the plan's classes."""


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
    kept = non_maximum_suppression(candidates.boxes, rank, candidates.labels, iou_threshold)
    return _sorted(candidates.boxes[kept], candidates.scores[kept], candidates.labels[kept])


def cluster(candidates: Candidates, iou_threshold: float = 0.3, score_threshold: float = 0.0) -> Detections:
    """Weighted box clustering: boxes of one class that overlap the best one of them become one box.

    With score s, corners c, and weight w = (IoU with the best box) x (area) x (centre factor) of each box of a cluster:
    score = sum(s w) / (sum(w) + missing mean(w)) and corners = sum(c s w) / sum(s w), where missing is the number of
    views that could have seen the box but found none. So a score is a mean over views, whatever their number, and is
    comparable between one fold and an ensemble of several.

    Args:
        candidates: Of all views.
        iou_threshold: Boxes join the cluster of a better one above this IoU.
        score_threshold: Clusters below it are left out.

    Source: Jaeger et al., Retina U-Net, ML4H 2019 (arXiv:1811.08661), section 2.3, and its Medical Detection Toolkit.
    The number of views is counted for the best box of the cluster, by the share of it that each tile shows.
    """
    order = _by_group_and_score(candidates.labels, candidates.scores)
    order = order[candidates.scores[order] > 0]
    boxes, scores, labels, views = (part[order] for part in candidates[:4])
    best, overlap = greedy_clusters(boxes, labels, iou_threshold)
    best, members = best.unique(return_inverse=True)
    weight = overlap * _volume(boxes) * centre_factor(boxes, candidates.tiles[views])

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(len(best), *values.shape[1:]).index_add_(0, members, values)

    num_views = len(candidates.tiles)
    found_in = (members * num_views + views).unique() // num_views
    missing = _expected_views(boxes[best], candidates.tiles) - found_in.bincount(minlength=len(best))
    mean_weight = total(weight) / members.bincount(minlength=len(best))
    score = total(scores * weight) / (total(weight) + missing.clamp(min=0) * mean_weight)
    corners = total(boxes * (scores * weight)[:, None]) / total(scores * weight)[:, None]
    merged = _sorted(corners, score, labels[best])
    kept = merged.scores >= score_threshold
    return Detections(merged.boxes[kept], merged.scores[kept], merged.labels[kept])


def non_maximum_suppression(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, limit: int | None = None
) -> Tensor:
    """Indices [K] of the boxes that remain, by falling score, of boxes [N, 2 * dim] in independent groups.

    Args:
        boxes: Of all groups.
        scores: [N], the better box suppresses the other one.
        groups: [N] int64, for example one number for each class of each image.
        iou_threshold: Of two boxes of a group with a greater IoU, only the better one remains.
        limit: At most so many boxes remain in each group.
    """
    order = _by_group_and_score(groups, scores)
    best, _ = greedy_clusters(boxes[order], groups[order], iou_threshold, limit)
    kept = order[best == torch.arange(len(best), device=best.device)]
    return kept[scores[kept].argsort(descending=True, stable=True)]


def greedy_clusters(
    boxes: Tensor, groups: Tensor, iou_threshold: float, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Let the best box of each group take all that overlap it, then the best of the rest, until none is left.

    All groups advance at once, so the number of steps is that of the group with the most clusters.

    Args:
        boxes: [N, 2 * dim], groups one after the other, the best box of each first.
        groups: [N] int64, rising.
        iou_threshold: Boxes with a greater IoU join.
        limit: At most so many clusters per group; boxes beyond them belong to none.

    Returns:
        Index [N] of the best box of each box's cluster, its own for the best one, -1 for none; and the IoU [N] with it.
    """
    best = torch.full_like(groups, -1)
    overlap = boxes.new_zeros(len(boxes))
    remaining = torch.arange(len(boxes), device=boxes.device)
    steps = 0
    while len(remaining) and steps != limit:
        own = groups[remaining]
        leads = torch.ones_like(own, dtype=torch.bool)
        leads[1:] = own[1:] != own[:-1]
        leader = remaining[leads][leads.cumsum(0) - 1]
        iou = paired_iou(boxes[remaining], boxes[leader])
        joins = (iou > iou_threshold) | leads
        best[remaining[joins]] = leader[joins]
        overlap[remaining[joins]] = iou[joins]
        remaining = remaining[~joins]
        steps += 1
    return best, overlap


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU in [0, 1] of boxes [*N, 2 * dim] with their counterparts [*N, 2 * dim], [*N]; computed as MONAI does."""
    dimension = first.shape[-1] // 2
    lower = torch.maximum(first[..., :dimension], second[..., :dimension])
    upper = torch.minimum(first[..., dimension:], second[..., dimension:])
    shared = (upper - lower).clamp(min=0).prod(-1)
    return shared / (_volume(first) + _volume(second) - shared + torch.finfo(shared.dtype).eps)


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
    return (last - first).clamp(min=0).prod(2) / _volume(boxes)[:, None]


def _expected_views(boxes: Tensor, tiles: Tensor) -> Tensor:
    """Number of views [N] that see each box, parts of a box counted as parts of a view."""
    different, copies = tiles.unique(dim=0, return_counts=True)
    shares = [visible_share(part, different) * copies for part in boxes.split(CLUSTERS_AT_ONCE)]
    return torch.cat([share.sum(1) for share in shares])


def _volume(boxes: Tensor) -> Tensor:
    dimension = boxes.shape[-1] // 2
    return (boxes[..., dimension:] - boxes[..., :dimension]).prod(-1)


def _by_group_and_score(groups: Tensor, scores: Tensor) -> Tensor:
    """The order of rising group and, in a group, falling score."""
    order = scores.argsort(descending=True, stable=True)
    return order[groups[order].argsort(stable=True)]


def _sorted(boxes: Tensor, scores: Tensor, labels: Tensor) -> Detections:
    order = scores.argsort(descending=True, stable=True)
    return Detections(boxes[order], scores[order], labels[order])
