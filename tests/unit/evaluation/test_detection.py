"""Detection metrics in 2D and 3D: against a brute force with exact fractions, MONAI's COCOMetric, values by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.data.box_utils import box_iou

from nnunet_kd.data.side_files import CaseBoxes
from nnunet_kd.evaluation.classification import resample_groups
from nnunet_kd.evaluation.detection import (
    COCO_IOUS,
    FALSE_POSITIVE_RATES,
    PredictedBoxes,
    evaluate_detection,
)

CLASSES = ("cyst", "stone")
References = dict[str, CaseBoxes]
Predictions = dict[str, PredictedBoxes]


def references(**cases: list[tuple[int, list[float]]]) -> References:
    """Case to a list of (label, box)."""
    return {
        case: CaseBoxes(
            np.array([label for label, _ in own], dtype=np.int64),
            np.array([box for _, box in own] or np.zeros((0, 4)), dtype=np.float64),
        )
        for case, own in cases.items()
    }


def predictions(**cases: list[tuple[int, list[float], float]]) -> Predictions:
    """Case to a list of (label, box, score)."""
    return {
        case: (
            np.array([label for label, _, _ in own], dtype=np.int64),
            np.array([box for _, box, _ in own] or np.zeros((0, 4)), dtype=np.float64),
            np.array([score for _, _, score in own], dtype=np.float64),
        )
        for case, own in cases.items()
    }


def random_images(seed: int, dimension: int, num_images: int = 12) -> tuple[References, Predictions]:
    """Integer boxes on a small grid, so that many overlap, and scores in steps of 0.1, so that many are tied."""
    random = np.random.default_rng(seed)

    def boxes(number: int) -> np.ndarray:
        lower = random.integers(0, 12, (number, dimension))
        return np.concatenate([lower, lower + random.integers(2, 9, (number, dimension))], axis=1).astype(float)

    reference, predicted = {}, {}
    for image in range(num_images):
        own = boxes(int(random.integers(0, 4)))
        labels = random.integers(0, 2, len(own))
        reference[f"image{image}"] = CaseBoxes(labels, own)
        near = own + random.integers(-1, 2, own.shape) * np.repeat([0, 1], dimension)
        found = np.concatenate([near, own[:1], boxes(4)])
        found_labels = np.concatenate([labels, labels[:1], random.integers(0, 2, 4)])
        predicted[f"image{image}"] = (found_labels, found, random.integers(1, 11, len(found)) / 10)
    return reference, predicted


# --- brute force ------------------------------------------------------------------------------------------------------
def exact_iou(first: list[float], second: list[float]) -> Fraction:
    dimension = len(first) // 2

    def volume(lower: list[float], upper: list[float]) -> int:
        return math.prod(max(0, int(end) - int(start)) for start, end in zip(lower, upper, strict=True))

    lower = [max(pair) for pair in zip(first[:dimension], second[:dimension], strict=True)]
    upper = [min(pair) for pair in zip(first[dimension:], second[dimension:], strict=True)]
    shared = volume(lower, upper)
    both = sum(volume(box[:dimension], box[dimension:]) for box in (first, second))
    return Fraction(shared, both - shared)


def pooled(
    reference: References, predicted: Predictions, label: int, threshold: Fraction
) -> tuple[list[tuple[float, bool]], int]:
    """(score, is hit) of every detection by falling score, and the number of reference boxes."""
    detections, num_boxes = [], 0
    for case, truth in reference.items():
        free = [box.tolist() for own, box in zip(truth.labels, truth.boxes, strict=True) if own == label]
        num_boxes += len(free)
        own = [entry for entry in zip(*predicted[case], strict=True) if entry[0] == label]
        for _, box, score in sorted(own, key=lambda entry: -entry[2]):
            overlaps = [exact_iou(box.tolist(), other) for other in free]
            # of equal overlaps the last box, as in COCO's own loop
            best = max(range(len(free)), key=lambda index: (overlaps[index], index), default=None)
            hit = best is not None and overlaps[best] >= threshold
            if hit:
                free.pop(best)
            detections.append((float(score), hit))
    return sorted(detections, key=lambda entry: -entry[0]), num_boxes


def brute_average_precision(detections: list[tuple[float, bool]], num_boxes: int) -> float:
    points, hits = [], 0
    for count, (_, hit) in enumerate(detections, start=1):
        hits += hit
        points.append((Fraction(hits, num_boxes), hits / count))
    best = [
        max((precision for recall, precision in points if recall >= Fraction(level, 100)), default=0.0)
        for level in range(101)
    ]
    return sum(best) / 101


def brute_froc(detections: list[tuple[float, bool]], num_boxes: int, num_images: int) -> list[float]:
    sensitivities = []
    for rate in FALSE_POSITIVE_RATES:
        best = Fraction(0)
        for threshold in {score for score, _ in detections}:
            kept = [hit for score, hit in detections if score >= threshold]
            if Fraction(kept.count(False), num_images) <= Fraction(rate):
                best = max(best, Fraction(kept.count(True), num_boxes))
        sensitivities.append(float(best))
    return sensitivities


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_brute_force(seed: int, dimension: int) -> None:
    reference, predicted = random_images(seed, dimension)
    scores = evaluate_detection(reference, predicted, CLASSES, num_resamples=0)
    for label, own in enumerate(scores.classes):
        by_iou = {
            iou: brute_average_precision(*pooled(reference, predicted, label, Fraction(round(100 * iou), 100)))
            for iou in (0.1, *COCO_IOUS)
        }
        assert own.scores.ap_10 == pytest.approx(by_iou[0.1])
        assert own.scores.ap_50.value == pytest.approx(by_iou[0.5])
        assert own.scores.ap_50_95 == pytest.approx(np.mean([by_iou[iou] for iou in COCO_IOUS]))
        froc = brute_froc(*pooled(reference, predicted, label, Fraction(1, 10)), len(reference))
        assert own.scores.froc == pytest.approx(froc)
        assert own.scores.froc_mean.value == pytest.approx(np.mean(froc))
    assert scores.mean.ap_50_95 == pytest.approx(np.mean([own.scores.ap_50_95 for own in scores.classes]))
    assert scores.mean.froc == pytest.approx(np.mean([own.scores.froc for own in scores.classes], axis=0))


@pytest.mark.parametrize("dimension", [2, 3])
def test_coco_metric_of_monai(dimension: int) -> None:
    """With 16 boxes, whose recalls are exact in float32; MONAI leaves an IoU at the threshold to float32 too."""
    random = np.random.default_rng(dimension)
    reference, predicted = {}, {}
    for image in range(8):
        lower = random.random((2, dimension)) * 50 + np.array([[0], [60]])
        boxes = np.concatenate([lower, lower + 5 + random.random((2, dimension)) * 20], axis=1)
        reference[str(image)] = CaseBoxes(np.zeros(2, dtype=np.int64), boxes)
        found = np.concatenate([boxes + random.normal(0, 1.5, boxes.shape), boxes + 30])
        predicted[str(image)] = (np.zeros(4, dtype=np.int64), found, random.random(4))
    metric = COCOMetric(["cyst"], iou_list=[0.1, 0.5], iou_range=[0.5, 0.95, 0.05], max_detection=[100], verbose=False)
    matched = matching_batch(
        box_iou,
        metric.iou_thresholds,
        *([own[part] for own in predicted.values()] for part in (1, 0, 2)),
        [own.boxes for own in reference.values()],
        [own.labels for own in reference.values()],
    )
    expected, _ = metric(matched)
    scores = evaluate_detection(reference, predicted, ["cyst"], num_resamples=0).mean
    assert scores.ap_10 == pytest.approx(expected["AP_IoU_0.10_MaxDet_100"], abs=1e-6)
    assert scores.ap_50.value == pytest.approx(expected["AP_IoU_0.50_MaxDet_100"], abs=1e-6)
    assert scores.ap_50_95 == pytest.approx(expected["mAP_IoU_0.50_0.95_0.05_MaxDet_100"], abs=1e-6)
    assert 0.1 < scores.ap_50_95 < 0.9


def test_values_by_hand() -> None:
    """Four images, two of them without boxes: from the score 0.9 down a hit, a false positive, a copy, a hit."""
    box, other = [0, 0, 10, 10], [50, 50, 60, 60]
    reference = references(a=[(0, box)], b=[(0, box)], c=[], d=[])
    predicted = predictions(a=[(0, box, 0.9), (0, box, 0.6)], b=[(0, [0, 0, 10, 5], 0.5)], c=[(0, other, 0.8)], d=[])
    scores = evaluate_detection(reference, predicted, ["cyst"], num_resamples=0)
    assert (scores.num_images, scores.num_images_without_boxes) == (4, 2)
    (own,) = scores.classes
    # precision 1 up to recall 0.5 (levels 0 to 0.5), then 2 hits of 4 detections
    assert own.scores.ap_50.value == pytest.approx((51 * 1 + 50 * 0.5) / 101)
    # the hit of half overlap counts at 0.5 only, the other one at all ten thresholds
    assert own.scores.ap_50_95 == pytest.approx((own.scores.ap_50.value + 9 * 51 / 101) / 10)
    # false positives per image: 1/4 with the score 0.8, 1/2 with 0.6
    assert own.scores.froc == (0.5, 0.5, 1, 1, 1, 1, 1)
    assert own.froc_thresholds == (0.9, 0.8, 0, 0, 0, 0, 0)  # all may be kept from the third on
    assert own.curve.tolist() == [[0, 0.25, 0.5, 0.5], [0.5, 0.5, 0.5, 1]]


def test_no_score_threshold_keeps_the_false_positives_below_the_rate() -> None:
    reference = references(a=[(0, [0, 0, 4, 4])])
    predicted = predictions(a=[(0, [8, 8, 9, 9], 0.9), (0, [0, 0, 4, 4], 0.9)])
    (own,) = evaluate_detection(reference, predicted, ["cyst"], num_resamples=0).classes
    assert own.scores.froc == (0, 0, 0, 1, 1, 1, 1)
    assert own.froc_thresholds == pytest.approx((math.nan,) * 3 + (0,) * 4, nan_ok=True)


@pytest.mark.parametrize("overlap", [1, 5, 13, 14, 18, 19])
def test_overlap_equal_to_a_threshold_is_a_hit(overlap: int) -> None:
    """The IoU is overlap / 20; most of these are not exact in float32."""
    reference = references(a=[(0, [0, 0, 1, 20])])
    predicted = predictions(a=[(0, [0, 0, 1, overlap], 0.5)])
    scores = evaluate_detection(reference, predicted, ["cyst"], num_resamples=0).mean
    assert scores.ap_50_95 == pytest.approx(max(0, overlap - 9) / 10)
    assert scores.ap_10 == (overlap >= 2)


def test_class_without_boxes_has_no_value() -> None:
    reference = references(a=[(1, [0, 0, 4, 4])], b=[])
    predicted = predictions(a=[(1, [0, 0, 4, 4], 0.9)], b=[(0, [0, 0, 4, 4], 0.9)])
    scores = evaluate_detection(reference, predicted, CLASSES)
    assert math.isnan(scores.classes[0].scores.ap_50.value)
    assert all(math.isnan(value) for value in scores.classes[0].scores.froc)
    assert scores.classes[0].num_detections == 1
    assert (scores.mean.ap_50.value, scores.mean.froc_mean.value) == (1, 1)
    # samples without the image that has a box do not count
    assert (scores.mean.ap_50.low, scores.mean.ap_50.high) == (1, 1)


def test_nothing_found_is_zero_and_nothing_to_find_is_no_value() -> None:
    empty = predictions(a=[], b=[])
    nothing_found = evaluate_detection(references(a=[(0, [0, 0, 0, 4, 4, 4])], b=[]), empty, ["cyst"]).mean
    assert (nothing_found.ap_10, nothing_found.ap_50.value, nothing_found.froc_mean.value) == (0, 0, 0)
    nothing_there = evaluate_detection(references(a=[], b=[]), empty, ["cyst"]).mean
    assert math.isnan(nothing_there.ap_10)
    assert math.isnan(nothing_there.froc_mean.value)


def test_intervals_are_those_of_repeated_images() -> None:
    """Every bootstrap sample written out as a set of images with copies."""
    reference, predicted = random_images(9, dimension=2)
    groups = {case: int(case[5:]) // 2 for case in reference}
    scores = evaluate_detection(reference, predicted, CLASSES, groups=groups, num_resamples=30, seed=4)
    samples = []
    for weights in np.concatenate(list(resample_groups(list(groups.values()), 30, seed=4))):
        copies = [(case, copy) for case, weight in zip(reference, weights, strict=True) for copy in range(int(weight))]
        sample = evaluate_detection(
            {f"{case}/{copy}": reference[case] for case, copy in copies},
            {f"{case}/{copy}": predicted[case] for case, copy in copies},
            CLASSES,
            num_resamples=0,
        )
        values = [own.scores.froc_mean.value for own in sample.classes]
        samples.append((np.mean(values), values[1]))  # the mean is NaN where a class has no boxes in this sample
    assert np.isnan(samples).any()
    expected = np.nanquantile(samples, [0.025, 0.975], axis=0)
    for index, interval in enumerate((scores.mean.froc_mean, scores.classes[1].scores.froc_mean)):
        assert (interval.low, interval.high) == pytest.approx(expected[:, index])
    assert scores.num_groups == 6


def test_copies_of_an_image_in_one_group_add_no_evidence() -> None:
    random = np.random.default_rng(0)
    reference, predicted = random_images(3, dimension=3)
    # different scores, because the order of equal ones decides the average precision
    predicted = {case: (labels, boxes, random.random(len(labels))) for case, (labels, boxes, _) in predicted.items()}
    names = [f"{case}/{copy}" for case in reference for copy in range(2)]
    once = evaluate_detection(reference, predicted, CLASSES, num_resamples=50)
    twice = evaluate_detection(
        {name: reference[name.split("/")[0]] for name in names},
        {name: predicted[name.split("/")[0]] for name in names},
        CLASSES,
        groups={name: name.split("/")[0] for name in names},
        num_resamples=50,
    )
    for name in ("ap_50", "froc_mean"):
        assert vars(getattr(twice.mean, name)) == pytest.approx(vars(getattr(once.mean, name)))
    assert twice.mean.ap_50.low < twice.mean.ap_50.high


def test_both_sides_must_have_the_same_images() -> None:
    with pytest.raises(ValueError, match="only one of them has b"):
        evaluate_detection(references(a=[], b=[]), predictions(a=[]), ["cyst"])
