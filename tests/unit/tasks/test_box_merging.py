"""Boxes of several views become one set."""

from __future__ import annotations

import math

import pytest
import torch
from monai.data.box_utils import batched_nms, box_iou
from torch import Tensor

from nnunet_kd.tasks.box_merging import (
    Candidates,
    centre_factor,
    cluster,
    non_maximum_suppression,
    suppress,
    visible_share,
)

TILE = [0.0, 0.0, 20.0, 20.0]
BOX = [8.0, 8.0, 12.0, 12.0]  # in the middle of the tile


def candidates(
    boxes: list[list[float]], scores: list[float], views: list[int], tiles: list[list[float]], labels: list[int]
) -> Candidates:
    width = len(tiles[0])
    return Candidates(
        torch.tensor(boxes).reshape(-1, width),
        torch.tensor(scores),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(views, dtype=torch.int64),
        torch.tensor(tiles),
    )


def random_candidates(count: int, dimension: int) -> Candidates:
    """Boxes of two classes around few places, in views of four overlapping tiles."""
    random = torch.Generator().manual_seed(0)
    places = torch.rand(8, dimension, generator=random) * 30
    lower = places[torch.randint(8, (count,), generator=random)] + torch.rand(count, dimension, generator=random) * 4
    tiles = (torch.arange(4.0) * 8)[:, None].repeat(3, dimension)
    return Candidates(
        torch.cat((lower, lower + 4 + 4 * torch.rand(count, dimension, generator=random)), 1),
        torch.rand(count, generator=random),
        torch.randint(2, (count,), generator=random),
        torch.randint(12, (count,), generator=random),
        torch.cat((tiles, tiles + 20), 1),
    )


@pytest.mark.parametrize("dimension", [2, 3])
def test_random_boxes_cluster_as_the_formula_says(dimension: int) -> None:
    """Each box in turn, in falling score, opens a cluster or has joined one."""
    given = random_candidates(150, dimension)
    overlaps = box_iou(given.boxes, given.boxes)
    centre = centre_factor(given.boxes, given.tiles[given.views])
    shares = visible_share(given.boxes, given.tiles)
    free, expected = set(range(150)), []
    for best in given.scores.argsort(descending=True).tolist():
        if best not in free:
            continue
        same = [index for index in sorted(free) if given.labels[index] == given.labels[best]]
        members = [index for index in same if index == best or overlaps[best, index] > 0.3]
        free -= set(members)
        volumes = (given.boxes[members, dimension:] - given.boxes[members, :dimension]).prod(1)
        weights = [float(overlaps[best, i] * volumes[row] * centre[i]) for row, i in enumerate(members)]
        missing = max(0.0, float(shares[best].sum()) - len({int(given.views[index]) for index in members}))
        weighted = [float(given.scores[index]) * weight for index, weight in zip(members, weights, strict=True)]
        score = sum(weighted) / (sum(weights) + missing * sum(weights) / len(weights))
        box = sum(given.boxes[index] * weight for index, weight in zip(members, weighted, strict=True)) / sum(weighted)
        expected.append((score, box, int(given.labels[best])))
    expected.sort(key=lambda row: -row[0])
    found = cluster(given)
    assert 16 < len(expected) < 100
    torch.testing.assert_close(found.scores, torch.tensor([row[0] for row in expected]))
    torch.testing.assert_close(found.boxes, torch.stack([row[1] for row in expected]))
    assert found.labels.tolist() == [row[2] for row in expected]


@pytest.mark.parametrize("limit", [None, 5])
def test_suppression_in_groups_equals_monais(limit: int | None) -> None:
    given = random_candidates(200, 3)
    kept = non_maximum_suppression(given.boxes, given.scores, given.labels, 0.2, limit)
    if limit is None:
        assert kept.tolist() == batched_nms(given.boxes, given.scores, given.labels, 0.2).tolist()
    for label in (0, 1):
        own = (given.labels == label).nonzero().flatten()
        expected = own[batched_nms(given.boxes[own], given.scores[own], given.labels[own], 0.2, limit or -1)]
        assert kept[given.labels[kept] == label].tolist() == expected.tolist()


def test_agreeing_views_change_nothing() -> None:
    """Four views (say, two folds mirrored) that say the same: the score of a single fold, whatever their number."""
    for number in (1, 4):
        found = cluster(candidates([BOX] * number, [0.8] * number, list(range(number)), [TILE] * number, [0] * number))
        torch.testing.assert_close(found.boxes, torch.tensor([BOX]))
        torch.testing.assert_close(found.scores, torch.tensor([0.8]))


def test_views_that_saw_nothing_count_as_zero() -> None:
    found = cluster(candidates([BOX] * 2, [0.8, 0.4], [0, 2], [TILE] * 4, [0, 0]))
    assert found.scores.tolist() == pytest.approx([(0.8 + 0.4) / 4])


def test_only_views_that_could_see_the_box_are_expected() -> None:
    elsewhere = [100.0, 100.0, 120.0, 120.0]
    half = [10.0, 0.0, 30.0, 20.0]  # sees the half of the box
    assert visible_share(torch.tensor([BOX]), torch.tensor([TILE, elsewhere, half])).tolist() == [[1.0, 0.0, 0.5]]
    found = cluster(candidates([BOX], [0.6], [0], [TILE, elsewhere, half], [0]))
    assert found.scores.tolist() == pytest.approx([0.6 / 1.5])


def test_corners_and_score_by_hand() -> None:
    shifted = [8.0, 9.0, 12.0, 13.0]
    found = cluster(candidates([BOX, shifted], [0.9, 0.6], [0, 1], [TILE] * 3, [0, 0]))
    centre = (1 + math.exp(-0.5 * (1 / 8) ** 2)) / 2
    weights = [1 * 16 * 1, (12 / 20) * 16 * centre]
    mean_weight = sum(weights) / 2
    score = (0.9 * weights[0] + 0.6 * weights[1]) / (sum(weights) + 1 * mean_weight)
    share = 0.6 * weights[1] / (0.9 * weights[0] + 0.6 * weights[1])
    assert found.scores.tolist() == pytest.approx([score])
    assert found.boxes[0].tolist() == pytest.approx([8.0, 8.0 + share, 12.0, 12.0 + share])


def test_far_boxes_and_other_classes_stay_apart_and_are_sorted() -> None:
    far = [0.0, 0.0, 4.0, 4.0]
    found = cluster(candidates([BOX, far, BOX], [0.3, 0.9, 0.6], [0, 0, 0], [TILE], [0, 0, 1]))
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.6, 0.3]))
    torch.testing.assert_close(found.boxes, torch.tensor([far, BOX, BOX]))
    assert found.labels.tolist() == [0, 1, 0]
    kept = cluster(candidates([BOX, far], [0.3, 0.9], [0, 0], [TILE], [0, 0]), score_threshold=0.5)
    assert kept.scores.tolist() == pytest.approx([0.9])


def test_suppression_prefers_the_box_in_the_middle_of_its_tile_and_keeps_its_score() -> None:
    cut = [8.0, 8.0, 12.0, 11.5]  # at the border of the second tile
    tiles = [TILE, [0.0, -8.5, 20.0, 11.5]]
    found = suppress(candidates([cut, BOX], [0.81, 0.8], [1, 0], tiles, [0, 0]))
    torch.testing.assert_close(found.boxes, torch.tensor([BOX]))
    assert found.scores.tolist() == pytest.approx([0.8])
    both = suppress(candidates([cut, BOX], [0.81, 0.8], [1, 0], tiles, [0, 1]))
    assert both.scores.tolist() == pytest.approx([0.81, 0.8])


def test_three_dimensions_and_no_boxes() -> None:
    tile, box = [0.0] * 3 + [20.0] * 3, [4.0, 8.0, 8.0, 6.0, 12.0, 12.0]
    found = cluster(candidates([box] * 2, [0.8, 0.8], [0, 1], [tile] * 2, [0, 0]))
    torch.testing.assert_close(found.boxes, torch.tensor([box]))
    torch.testing.assert_close(found.scores, torch.tensor([0.8]))
    for merge in (cluster, suppress):
        none = merge(candidates([], [], [], [tile], []))
        assert none.boxes.shape == (0, 6)
        assert none.scores.shape == none.labels.shape == (0,)


def test_centre_factor_is_the_gaussian_of_the_toolkit() -> None:
    box: Tensor = torch.tensor([[8.0, 14.0, 12.0, 18.0]])  # centres 10 (middle) and 16, in half tiles 0 and 0.6
    expected = (1 + math.exp(-0.5 * (0.6 / 0.8) ** 2)) / 2
    assert centre_factor(box, torch.tensor([TILE])).item() == pytest.approx(expected)
