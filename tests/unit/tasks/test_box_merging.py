"""Boxes of several views become one set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nnunet_kd.tasks.box_merging import Candidates, centre_factor, cluster, suppress, visible_share

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
