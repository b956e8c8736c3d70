"""Anchors, matching, loss and decoding in 2D and 3D."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
from monai.apps.detection.utils.ATSS_matcher import ATSSMatcher
from monai.apps.detection.utils.box_selector import BoxSelector
from monai.data.box_utils import box_iou
from torch import Tensor

from nnunet_kd.tasks.detection import (
    CANDIDATES_PER_LEVEL,
    BoxMaps,
    DetectionHead,
    DetectionPlan,
    DetectionTask,
    flatten_map,
    level_anchors,
)

CLASSES = ("a", "b")
# another stride and length along each axis, so that a swap of axes is seen
PLANS = {
    2: DetectionPlan(((2, 4), (4, 8)), (((6, 9), (10, 7)), ((12, 18), (20, 14))), CLASSES),
    3: DetectionPlan(((1, 2, 4), (2, 4, 8)), (((3, 6, 9), (4, 10, 7)), ((6, 12, 18), (8, 20, 14))), CLASSES),
}
SHAPES = {2: (24, 32), 3: (12, 24, 32)}
dimensions = pytest.mark.parametrize("dimension", [2, 3])


def empty_maps(dimension: int, batch: int = 1, logit: float = -20.0) -> BoxMaps:
    plan = PLANS[dimension]
    grids = [[size // step for size, step in zip(SHAPES[dimension], stride, strict=True)] for stride in plan.strides]
    return BoxMaps(
        tuple(torch.full((batch, plan.num_anchors * len(plan.classes), *grid), logit) for grid in grids),
        tuple(torch.zeros(batch, plan.num_anchors * 2 * dimension, *grid) for grid in grids),
    )


def random_maps(dimension: int, batch: int, random: torch.Generator) -> BoxMaps:
    maps = empty_maps(dimension, batch)
    for level in (*maps.class_logits, *maps.box_regression):
        level.normal_(generator=random)
    return maps


def random_boxes(dimension: int, count: int, random: torch.Generator) -> Tensor:
    size = 2 + 10 * torch.rand(count, dimension, generator=random)
    lower = torch.rand(count, dimension, generator=random) * (torch.tensor(SHAPES[dimension]) - size).clamp(min=0)
    return torch.cat((lower, lower + size), 1)


def brute_force_iou(first: Tensor, second: Tensor) -> float:
    """IoU of two boxes with whole-numbered corners, by counting voxels."""
    dimension = len(first) // 2
    cells = [
        set(itertools.product(*(range(int(box[axis]), int(box[axis + dimension])) for axis in range(dimension))))
        for box in (first, second)
    ]
    return len(cells[0] & cells[1]) / len(cells[0] | cells[1])


def test_anchors_equal_monais_where_monai_neither_rounds_nor_shifts() -> None:
    shapes = [(8.0, 4.0, 6.0), (10.0, 12.0, 2.0)]
    expected = AnchorGeneratorWithAnchorShape((1,), shapes)(torch.zeros(1, 1, 8, 16, 12), [torch.zeros(1, 1, 4, 4, 6)])[
        0
    ]
    torch.testing.assert_close(level_anchors((4, 4, 6), (2, 4, 2), shapes), expected)


def test_anchors_lie_around_the_middle_of_their_voxel_also_for_odd_strides() -> None:
    anchors = level_anchors((3, 2), (1, 3), [(1.0, 3.0)])
    torch.testing.assert_close(anchors[0], torch.tensor([0.0, 0.0, 1.0, 3.0]))
    torch.testing.assert_close(anchors[-1], torch.tensor([2.0, 3.0, 3.0, 6.0]))


@dimensions
def test_a_box_at_an_anchor_decodes_to_itself(dimension: int) -> None:
    task, maps = DetectionTask(PLANS[dimension]), empty_maps(dimension)
    level, anchor, label = 1, 1, 1
    shape, stride = PLANS[dimension].anchors[level][anchor], PLANS[dimension].strides[level]
    position = [grid // 2 for grid in maps.class_logits[level].shape[2:]]
    maps.class_logits[level][(0, anchor * len(CLASSES) + label, *position)] = 5.0
    centre = [(index + 0.5) * step for index, step in zip(position, stride, strict=True)]
    expected = [c - s / 2 for c, s in zip(centre, shape, strict=True)]
    expected += [c + s / 2 for c, s in zip(centre, shape, strict=True)]
    assert min(expected) >= 0
    (found,) = task.decode(maps, SHAPES[dimension])
    torch.testing.assert_close(found.boxes, torch.tensor([expected]))
    torch.testing.assert_close(found.scores, torch.tensor([5.0]).sigmoid())
    assert found.labels.tolist() == [label]


@dimensions
def test_encoded_boxes_decode_back_through_the_maps(dimension: int) -> None:
    """Writes the codes of a box at its matched anchors into the maps, in the order in which the maps are flattened."""
    task, maps = DetectionTask(PLANS[dimension]), empty_maps(dimension)
    box = torch.tensor([[3.0, 5.0, 11.0, 19.0]] if dimension == 2 else [[2.0, 3.0, 5.0, 7.0, 11.0, 19.0]])
    anchors = task.anchors(maps)
    (match,) = task.matches(maps, [box])
    codes, logits = torch.zeros(len(anchors), 2 * dimension), torch.full((len(anchors), 2), -20.0)
    matched = match >= 0
    codes[matched] = task.coder.encode_single(box.expand(int(matched.sum()), -1), anchors[matched])
    logits[matched, 0] = 3.0
    for maps_of, flat in ((maps.class_logits, logits), (maps.box_regression, codes)):
        for level, values in zip(maps_of, flat.split(task.level_sizes(maps)), strict=True):
            grid = level.shape[2:]
            level.copy_(values.reshape(*grid, -1).movedim(-1, 0)[None])
            assert torch.equal(flatten_map(level, PLANS[dimension].num_anchors)[0], values)
    (found,) = task.decode(maps, SHAPES[dimension])
    torch.testing.assert_close(found.boxes, box)
    assert task.loss(maps, [box], [torch.tensor([0])])["box_regression"].item() == pytest.approx(0, abs=1e-5)


@dimensions
def test_matching_equals_atss_with_iou_counted_in_voxels(dimension: int) -> None:
    """ATSS of one box on one level: of the nearest anchors, those with IoU of at least mean + standard deviation."""
    shapes = {2: ((8.0, 8.0), (8.0, 16.0)), 3: ((4.0, 8.0, 8.0), (4.0, 8.0, 16.0))}[dimension]
    stride, box = {2: ((4, 4), [5, 9, 15, 20]), 3: ((2, 4, 4), [4, 5, 9, 9, 15, 20])}[dimension]
    grid, num_candidates = (6, 8, 8)[-dimension:], {2: 9, 3: 8}[dimension]
    task = DetectionTask(DetectionPlan((stride,), (shapes,), CLASSES), num_candidates=num_candidates)
    maps = BoxMaps((torch.zeros(1, 4, *grid),), (torch.zeros(1, 4 * dimension, *grid),))
    anchors = task.anchors(maps)
    centre = [(box[axis] + box[axis + dimension]) / 2 for axis in range(dimension)]
    distances = [
        math.dist([(a[axis] + a[axis + dimension]) / 2 for axis in range(dimension)], centre) for a in anchors.tolist()
    ]
    nearest = sorted(range(len(anchors)), key=distances.__getitem__)
    cut = num_candidates * len(shapes)
    assert distances[nearest[cut - 1]] < distances[nearest[cut]]  # no tie that could be broken either way
    overlaps = {index: brute_force_iou(anchors[index], torch.tensor(box)) for index in nearest[:cut]}
    threshold = statistics.mean(overlaps.values()) + statistics.stdev(overlaps.values())
    expected = {index for index, overlap in overlaps.items() if overlap >= threshold}
    (match,) = task.matches(maps, [torch.tensor([box], dtype=torch.float32)])
    assert len(expected) > 1
    assert set((match == 0).nonzero().flatten().tolist()) == expected
    assert (match[match != 0] == -1).all()


@dimensions
def test_matching_of_a_batch_equals_monais_matcher_image_by_image(dimension: int) -> None:
    random = torch.Generator().manual_seed(0)
    task, maps = DetectionTask(PLANS[dimension]), empty_maps(dimension, batch=4)
    boxes = [random_boxes(dimension, count, random) for count in (3, 0, 12, 1)]
    anchors = task.anchors(maps)
    positions = [level.shape[2:].numel() for level in maps.class_logits]
    given_by_atss = 0
    for own, match in zip(boxes, task.matches(maps, boxes), strict=True):
        if len(own) == 0:
            assert (match == -1).all()
            continue
        matcher = ATSSMatcher(9, center_in_gt=False)
        _, expected = matcher.compute_matches(own, anchors, positions, PLANS[dimension].num_anchors)
        missing = sorted(set(range(len(own))) - set(expected.tolist()))
        given_by_atss += len(own) - len(missing)
        for index in missing:
            expected[box_iou(own[index : index + 1], anchors)[0].where(expected < 0, -1.0).argmax()] = index
        assert torch.equal(match, expected)
    assert given_by_atss > 10


@dimensions
def test_given_matches_give_the_same_loss(dimension: int) -> None:
    random = torch.Generator().manual_seed(0)
    task, maps = DetectionTask(PLANS[dimension]), random_maps(dimension, 3, random)
    boxes = [random_boxes(dimension, count, random) for count in (2, 0, 5)]
    labels = [torch.ones(len(own), dtype=torch.int64) for own in boxes]
    torch.manual_seed(0)
    expected = task.loss(maps, boxes, labels)
    torch.manual_seed(0)
    assert task.loss(maps, boxes, labels, task.matches(maps, boxes)) == expected
    # the box loss is that of all matched anchors, decoded one image at a time
    _, codes = task.flatten(maps)
    losses = [
        task.box_loss.__class__(reduction="none")(
            task.coder.decode_single(code[match >= 0], task.anchors(maps)[match >= 0]), own[match[match >= 0]]
        )
        for code, match, own in zip(codes, task.matches(maps, boxes), boxes, strict=True)
        if len(own)
    ]
    torch.testing.assert_close(expected["box_regression"], torch.cat(losses).mean())


@pytest.mark.parametrize(("num_boxes", "positives", "negatives"), [(0, 0, 4), (1, 1, 4), (30, 6, 12)])
def test_positives_and_hard_negatives_of_each_image_are_drawn_in_proportion(
    num_boxes: int, positives: int, negatives: int
) -> None:
    random = torch.Generator().manual_seed(0)
    task = DetectionTask(PLANS[2], samples_per_image=18, min_negatives=4, pool_size=3.0)
    maps, other = random_maps(2, 2, random), random_boxes(2, 3, random)
    for level in maps.class_logits:
        level.requires_grad_()
    boxes = random_boxes(2, num_boxes, random)
    match, _ = task.matches(maps, [boxes, other])
    if num_boxes == 1:  # one anchor, so that fewer positives than allowed are there
        first = (match == 0).nonzero()[0]
        match = torch.full_like(match, -1).index_fill(0, first, 0)
    labels = [torch.zeros(len(own), dtype=torch.int64) for own in (boxes, other)]
    matches = [match, task.matches(maps, [boxes, other])[1]]
    loss = task.loss(maps, [boxes, other], labels, matches)["classification"]
    gradient = BoxMaps(tuple(torch.autograd.grad(loss, maps.class_logits)), maps.box_regression)
    drawn = task.flatten(gradient)[0][0].abs().sum(1) > 0
    assert int((drawn & (match >= 0)).sum()) == positives
    assert int((drawn & (match < 0)).sum()) == negatives
    hardness = task.flatten(maps)[0][0].amax(1)[match < 0]
    assert hardness[drawn[match < 0]].min() >= hardness.topk(3 * negatives).values[-1]


@dimensions
def test_decoding_equals_monais_selector(dimension: int) -> None:
    random = torch.Generator().manual_seed(0)
    maps, plan = random_maps(dimension, 3, random), PLANS[dimension]
    task = DetectionTask(plan)
    selector = BoxSelector(
        score_thresh=plan.score_threshold,
        topk_candidates_per_level=CANDIDATES_PER_LEVEL,
        nms_thresh=plan.nms_threshold,
        detections_per_img=plan.detections_per_image,
    )
    sizes = task.level_sizes(maps)
    logits, codes = task.flatten(maps)
    counts = []
    for image, found in enumerate(task.decode(maps, SHAPES[dimension])):
        boxes = task.coder.decode_single(codes[image], task.anchors(maps)).split(sizes)
        expected = selector.select_boxes_per_image(list(boxes), list(logits[image].split(sizes)), SHAPES[dimension])
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other)
        counts.append(len(found.labels))
    assert min(counts) > 10


def test_anchors_made_for_inference_can_be_trained_with() -> None:
    plan = DetectionPlan(((2, 4),), (((6.5, 9.5),),), CLASSES)  # no other test has made its anchors
    task = DetectionTask(plan)
    maps = BoxMaps((torch.zeros(1, 2, 12, 8),), (torch.zeros(1, 4, 12, 8, requires_grad=True),))
    with torch.inference_mode():
        task.decode(maps, (24, 32))
    loss = task.loss(maps, [torch.tensor([[4.0, 6.0, 12.0, 14.0]])], [torch.tensor([1])])["box_regression"]
    loss.backward()
    assert maps.box_regression[0].grad.any()


@dimensions
def test_every_box_has_an_anchor_also_tiny_and_overlapping_ones(dimension: int) -> None:
    task, maps = DetectionTask(PLANS[dimension]), empty_maps(dimension)
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(12, dimension, generator=random) * 8
    boxes = torch.cat((corner, corner + 0.5 + torch.rand(12, dimension, generator=random) * 4), 1)
    (match,) = task.matches(maps, [boxes])
    assert set(match[match >= 0].tolist()) == set(range(12))


@dimensions
def test_batches_without_boxes_are_negatives_with_a_gradient_everywhere(dimension: int) -> None:
    task, maps = DetectionTask(PLANS[dimension]), empty_maps(dimension, batch=2, logit=0.0)
    for level in (*maps.class_logits, *maps.box_regression):
        level.requires_grad_()
    none = [torch.zeros(0, 2 * dimension)] * 2
    losses = task.loss(maps, none, [torch.zeros(0, dtype=torch.int64)] * 2)
    # all chosen anchors say 1/2 for both classes, and should say 0
    assert losses["classification"].item() == pytest.approx(2 * torch.tensor(2.0).log().item())
    assert losses["box_regression"].item() == 0
    sum(losses.values()).backward()
    assert all(level.grad is not None and level.grad.isfinite().all() for level in maps.box_regression)
    assert any(level.grad.any() for level in maps.class_logits)


def test_class_loss_teaches_the_class_of_the_matched_box() -> None:
    task, maps = DetectionTask(PLANS[2]), empty_maps(2, batch=2, logit=0.0)
    for level in maps.class_logits:
        level.requires_grad_()
    box = torch.tensor([[4.0, 6.0, 12.0, 14.0]])
    (match,) = task.matches(maps, [box])
    losses = task.loss(maps, [box, box[:0]], [torch.tensor([1]), torch.tensor([], dtype=torch.int64)])
    gradient, _ = task.flatten(
        BoxMaps(tuple(torch.autograd.grad(losses["classification"], maps.class_logits)), maps.box_regression)
    )
    assert (gradient[0, match >= 0, 1] < 0).all()  # descent raises the true class
    assert (gradient[0, match >= 0, 0] > 0).all()
    assert (gradient[1] >= 0).all()
    assert gradient[1].any()


def test_overflow_reaches_the_gradient_scaler_instead_of_ending_training() -> None:
    task, maps = DetectionTask(PLANS[2]), empty_maps(2)
    maps.box_regression[0].fill_(float("nan"))
    maps.class_logits[0].fill_(float("nan"))
    losses = task.loss(maps, [torch.tensor([[4.0, 6.0, 12.0, 14.0]])], [torch.tensor([0])])
    assert losses["classification"].isnan()


def test_threshold_suppression_and_limit_of_the_plan() -> None:
    plan = DetectionPlan(((4, 4),), (((8.0, 8.0),),), CLASSES, 0.3, 0.5, 2)
    task = DetectionTask(plan)
    logits = torch.full((1, 2, 6, 6), -20.0)
    for position, label, score in (((0, 0), 0, 0.2), ((1, 1), 0, 0.9), ((1, 1), 1, 0.6), ((4, 4), 0, 0.5)):
        logits[(0, label, *position)] = torch.tensor(score).logit()
    maps = BoxMaps((logits,), (torch.zeros(1, 4, 6, 6),))
    (found,) = task.decode(maps, (24, 24))
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.6]))  # two classes at one place; 0.5 is the third
    assert found.labels.tolist() == [0, 1]


@dimensions
def test_a_tiny_head_learns_to_find_a_box(dimension: int) -> None:
    torch.manual_seed(0)
    plan, shape = PLANS[dimension], SHAPES[dimension]
    boxes = [torch.tensor([[5.0, 6.0, 12.0, 15.0]]), torch.zeros(0, 4)]
    if dimension == 3:
        boxes = [torch.tensor([[3.0, 5.0, 6.0, 7.0, 12.0, 15.0]]), torch.zeros(0, 6)]
    image = torch.zeros(2, 1, *shape)
    corners = boxes[0][0].int().tolist()
    image[(0, 0, *(slice(corners[axis], corners[axis + dimension]) for axis in range(dimension)))] = 1
    pool = {2: torch.nn.functional.avg_pool2d, 3: torch.nn.functional.avg_pool3d}[dimension]
    grids = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in shape), indexing="ij")
    image = torch.cat((image, torch.stack(grids).expand(2, -1, *shape)), 1)
    features = [pool(image, stride) for stride in plan.strides]
    head = DetectionHead([image.shape[1]] * 2, dimension, len(CLASSES), plan.num_anchors)
    task = DetectionTask(plan)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(80):
        losses = task.loss(head(features), boxes, [torch.tensor([1]), torch.tensor([], dtype=torch.int64)])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    found, nothing = task.decode(head(features), shape)
    assert found.labels[0] == 1
    assert found.scores[0] > 0.5
    torch.testing.assert_close(found.boxes[0], boxes[0][0], atol=1.5, rtol=0)
    assert not (nothing.scores > 0.5).any()
