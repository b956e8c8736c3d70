"""Levels and anchors from a dataset's boxes."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from nnunet_kd.tasks.detection_plan import (
    LEAST_OVERLAP,
    DetectionPlan,
    DetectionPlanError,
    anchor_shapes,
    displaced_overlap,
    neighbour_overlaps,
    plan_detection,
)

STRIDES = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]


def plan(sizes: Sequence[Sequence[float]], **options: int) -> DetectionPlan:
    return plan_detection(np.array(sizes, dtype=float), STRIDES, (128, 128), ["lesion"], **options)


def test_displaced_overlap_counts_voxels() -> None:
    box, moved = np.zeros((2, 40, 40), dtype=bool)
    box[10:16, 10:20] = True
    moved[12:18, 14:24] = True  # half of the stride (4, 8)
    expected = (box & moved).sum() / (box | moved).sum()
    assert displaced_overlap(np.array([[6.0, 10.0]]), (4, 8))[0] == pytest.approx(expected)
    assert displaced_overlap(np.array([[1.0, 10.0]]), (4, 8))[0] == 0


def test_full_resolution_only_for_small_boxes() -> None:
    random = np.random.default_rng(0)
    assert plan(random.uniform(30, 60, (50, 2)).tolist()).strides[0] == (16, 16)
    assert plan(random.uniform(8, 60, (50, 2)).tolist()).strides[0] == (4, 4)
    assert plan([[2, 2]] * 50).strides == ((1, 1),)


def test_every_planned_box_overlaps_the_anchors_of_its_level_wherever_it_lies() -> None:
    sizes = np.exp(np.random.default_rng(1).uniform(np.log(7), np.log(90), (200, 2)))
    made = plan_detection(sizes, STRIDES, (128, 128), ["a", "b"])
    best = np.max([displaced_overlap(sizes, stride) for stride in made.strides], axis=0)
    assert np.mean(best >= LEAST_OVERLAP) >= 0.95
    assert list(made.strides) == sorted(made.strides)
    assert {len(level) for level in made.anchors} == {3}


def test_anisotropic_strides_follow_the_axis_that_needs_them() -> None:
    strides = [(1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8)]
    made = plan_detection(np.full((20, 3), [3.0, 12.0, 12.0]), strides, (16, 64, 64), ["nodule"])
    # half a stride of 2 off costs a third of 3 slices; at (2, 4, 4) IoU is 0.3
    assert made.strides == ((1, 2, 2),)


def test_level_limit_keeps_the_finest_levels() -> None:
    sizes = [[size, size] for size in (2, 5, 10, 20, 40) for _ in range(10)]
    assert plan(sizes, max_levels=2).strides == ((1, 1), (2, 2))


def test_anchor_shapes_are_the_clusters_of_the_boxes() -> None:
    random = np.random.default_rng(0)
    centres = np.array([[4.0, 4.0], [4.0, 16.0], [20.0, 20.0]])
    sizes = np.concatenate([centre * np.exp(random.normal(0, 0.02, (40, 2))) for centre in centres])
    shapes = anchor_shapes(sizes, 3)
    np.testing.assert_allclose(shapes, centres, rtol=0.03)
    np.testing.assert_allclose(anchor_shapes(sizes[::-1], 3), shapes, rtol=0.01)


def test_one_box_still_gives_as_many_different_anchors() -> None:
    (shapes,) = plan([[8, 10]], num_anchors=3).anchors
    assert len(set(shapes)) == 3
    assert (8.0, 10.0) in shapes


def test_boxes_are_cropped_to_the_patch() -> None:
    assert plan([[500, 500]]).anchors[0][0][0] <= 128


def test_plan_survives_json() -> None:
    made = plan([[8, 10], [20, 30], [90, 40]])
    assert DetectionPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("sizes", "message"), [([], "No box"), ([[3.0, 0.0]], "Box 0"), ([[1.0, 1.0], [np.nan, 2.0]], "Box 1")]
)
def test_unusable_boxes_are_named(sizes: list[list[float]], message: str) -> None:
    with pytest.raises(DetectionPlanError, match=message):
        plan(sizes)


def test_unreadable_plans_are_named() -> None:
    made = plan([[8, 10]]).to_dict()
    with pytest.raises(DetectionPlanError, match="'colour'"):
        DetectionPlan.from_dict({**made, "colour": 1})
    with pytest.raises(DetectionPlanError, match="'anchors'"):
        DetectionPlan.from_dict({key: value for key, value in made.items() if key != "anchors"})
    with pytest.raises(DetectionPlanError, match="levels"):
        DetectionPlan.from_dict({**made, "anchors": []})


def test_overlaps_with_neighbours_of_the_class() -> None:
    boxes = np.array([[0, 0, 4, 4], [2, 0, 6, 4], [0, 0, 4, 4], [20, 20, 22, 22]], dtype=float)
    labels = np.array([0, 0, 1, 0])
    # 2 x 4 of 16 + 16 - 8 pixels; the third is the first one's twin, but of another class
    np.testing.assert_allclose(neighbour_overlaps(boxes, labels), [8 / 24, 8 / 24, 0, 0])
    assert neighbour_overlaps(np.zeros((0, 6)), np.zeros(0, dtype=np.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("overlaps", "expected"),
    [
        (None, 0.1),
        ([], 0.1),
        ([0.0] * 99 + [0.9], 0.1),  # one copy among a hundred boxes
        ([0.0] * 60 + [0.25] * 40, 0.25),
        ([0.7] * 50, 0.5),
    ],
)
def test_boxes_that_overlap_more_than_objects_do_become_one(overlaps: list[float] | None, expected: float) -> None:
    own = None if overlaps is None else np.array(overlaps)
    made = plan_detection(np.full((100, 2), 8.0), STRIDES, (128, 128), ["lesion"], overlaps=own)
    assert made.nms_threshold == pytest.approx(expected, abs=0.011)
    assert DetectionPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
