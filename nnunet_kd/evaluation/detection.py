"""Metrics of detection with boxes: average precision and FROC, per class and as the mean over classes.

Definitions, the same everywhere here:

* Boxes are compared in voxels of the stored image. The intersection over union (IoU) is the same in millimetres,
  because a spacing scales every volume alike.
* Detections and reference boxes are matched per image and class, the highest score first: a detection takes the free
  reference box of highest IoU, if that is at least the threshold (COCO's rule, MONAI's implementation). So a second
  detection of the same box is a false positive. The ``MAX_DETECTIONS`` highest scores of an image and class count.
* Average precision (AP): COCO's, at 101 recall levels, at IoU 0.1, 0.5 and averaged over 0.5, 0.55, ... 0.95. It is
  that of MONAI's ``COCOMetric`` in float64, where that rounds recall to float32 and cannot weight images, which the
  bootstrap needs. AP rises with the scatter of a sample, so that its intervals lie somewhat high.
* FROC: sensitivity at ``FALSE_POSITIVE_RATES`` false positives per image, hits counted from IoU 0.1. It is the highest
  sensitivity of any score threshold with at most that many false positives, without interpolation between thresholds.
  Images without boxes count like all others. The mean over the seven rates is the score of the LUNA16 challenge
  (Setio et al., Medical Image Analysis 2017), which has another rule for hits.
* A class without a reference box has no value (NaN), and means over classes leave it out.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from monai.apps.detection.metrics.matching import matching_batch
from monai.data.box_utils import box_iou
from numpy.typing import NDArray

from nnunet_kd.evaluation.classification import group_keys, interval_of, resample_groups
from nnunet_kd.evaluation.statistics import Interval

if TYPE_CHECKING:
    from nnunet_kd.data.side_files import CaseBoxes

FROC_IOU = 0.1
COCO_IOUS = tuple(np.linspace(0.5, 0.95, 10).round(2).tolist())
IOU_THRESHOLDS = (FROC_IOU, *COCO_IOUS)
# box_iou computes in float32: an IoU that equals a threshold must not miss it by rounding
IOU_ROUNDING = 1e-6
FALSE_POSITIVE_RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
# quotients, not multiples of 0.01: a recall of 57 boxes of 100 reaches the level 0.57
RECALL_LEVELS = np.arange(101) / 100
MAX_DETECTIONS = 100
NUM_RESAMPLES = 1000

Array: TypeAlias = NDArray[np.float64]
# labels [N] (index of the class), boxes [N, 2 * dimension] in array order, scores [N] in [0, 1]
PredictedBoxes: TypeAlias = tuple[NDArray[np.int64], Array, Array]


@dataclass(frozen=True)
class BoxScores:
    """Average precision at IoU 0.1, at 0.5 and over 0.5 to 0.95; sensitivities at ``FALSE_POSITIVE_RATES``."""

    ap_10: float
    ap_50: Interval
    ap_50_95: float
    froc: tuple[float, ...]
    froc_mean: Interval

    def rows(self, name: str) -> list[dict[str, Any]]:
        """One row per metric: ``class``, ``metric``, ``value``, ``low``, ``high``."""
        values: dict[str, Interval | float] = {
            "ap@0.1": self.ap_10,
            "ap@0.5": self.ap_50,
            "ap@0.5:0.95": self.ap_50_95,
            "froc_mean": self.froc_mean,
        }
        values |= {f"sensitivity@{rate:g}": value for rate, value in zip(FALSE_POSITIVE_RATES, self.froc, strict=True)}
        return [
            {"class": name, "metric": metric, **(vars(value) if isinstance(value, Interval) else {"value": value})}
            for metric, value in values.items()
        ]


@dataclass(frozen=True)
class ClassDetectionScores:
    """The metrics of one class.

    Attributes:
        name: The class.
        num_boxes: Reference boxes.
        num_detections: Detections that count, at most ``MAX_DETECTIONS`` per image.
        scores: The metrics.
        froc_thresholds: The lowest score to keep at each of ``FALSE_POSITIVE_RATES``; 0 where all detections may be
            kept, NaN where even the highest score brings more false positives.
        curve: [2, thresholds], false positives per image and sensitivity, from the highest score to the lowest.
    """

    name: str
    num_boxes: int
    num_detections: int
    scores: BoxScores
    froc_thresholds: tuple[float, ...]
    curve: Array


@dataclass(frozen=True)
class DetectionScores:
    """All metrics of a detection task; ``mean`` is over the classes that have reference boxes."""

    num_images: int
    num_images_without_boxes: int
    num_groups: int
    classes: tuple[ClassDetectionScores, ...]
    mean: BoxScores

    def rows(self) -> list[dict[str, Any]]:
        """One row per class and metric: ``class`` (empty for the mean), ``metric``, ``value``, ``low``, ``high``."""
        rows: list[dict[str, Any]] = []
        for own in self.classes:
            rows.append({"class": own.name, "metric": "boxes", "value": own.num_boxes})
            rows.append({"class": own.name, "metric": "detections", "value": own.num_detections})
            rows += own.scores.rows(own.name)
        rows.append({"class": "", "metric": "boxes", "value": sum(own.num_boxes for own in self.classes)})
        rows.append({"class": "", "metric": "detections", "value": sum(own.num_detections for own in self.classes)})
        return rows + self.mean.rows("")


def evaluate_detection(
    reference: Mapping[str, CaseBoxes],
    predictions: Mapping[str, PredictedBoxes],
    classes: Sequence[str],
    *,
    groups: Mapping[str, Hashable] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> DetectionScores:
    """Compare detections with the reference boxes of all images.

    Args:
        reference: Every evaluated image, also those without boxes (empty arrays).
        predictions: The same images; one in which nothing was found has empty arrays.
        classes: Names of the labels.
        groups: Image to its group, for example a patient; the bootstrap draws whole groups. An image without one is a
            group of its own.
        num_resamples: Bootstrap samples for the intervals of ``ap_50`` and ``froc_mean``, 0 for none. A sample without
            boxes of a class that the images have does not count for this class and the mean.
        seed: The same seed gives the same intervals.

    Raises:
        ValueError: The two do not have the same images.
    """
    if reference.keys() != predictions.keys():
        differing = sorted(reference.keys() ^ predictions.keys())
        msg = f"reference and predictions must have the same images; only one of them has {', '.join(differing[:5])}"
        raise ValueError(msg)
    cases = list(reference)
    matched = [match_image(reference[case], predictions[case]) for case in cases]
    pools = [DetectionPool.of_class([image.get(label) for image in matched]) for label in range(len(classes))]
    own_groups = group_keys(cases, groups)
    samples = [
        [(pool.average_precision(weights, 0.5), float(np.mean(pool.sensitivities(weights)))) for pool in pools]
        for block in resample_groups(own_groups, num_resamples, seed=seed)
        for weights in block
    ]
    resampled = np.array(samples, dtype=np.float64).reshape(len(samples), len(classes), 2)
    once = np.ones(len(cases))
    num_groups = len(set(own_groups))
    scored = []
    for index, (name, pool) in enumerate(zip(classes, pools, strict=True)):
        aps = {iou: pool.average_precision(once, iou) for iou in IOU_THRESHOLDS}
        sensitivities = pool.sensitivities(once)
        scores = BoxScores(
            ap_10=aps[0.1],
            ap_50=interval_of(aps[0.5], resampled[:, index, 0], num_groups),
            ap_50_95=float(np.mean([aps[iou] for iou in COCO_IOUS])),
            froc=tuple(sensitivities.tolist()),
            froc_mean=interval_of(float(np.mean(sensitivities)), resampled[:, index, 1], num_groups),
        )
        thresholds = tuple(pool.score_thresholds().tolist())
        scored.append(
            ClassDetectionScores(name, int(pool.num_boxes.sum()), len(pool.score), scores, thresholds, pool.curve())
        )
    return DetectionScores(
        num_images=len(cases),
        num_images_without_boxes=sum(not len(reference[case].labels) for case in cases),
        num_groups=num_groups,
        classes=tuple(scored),
        mean=_mean(scored, resampled, num_groups),
    )


def _iou(first: Array, second: Array) -> NDArray[Any]:
    return np.asarray(box_iou(first, second))


def match_image(reference: CaseBoxes, predicted: PredictedBoxes) -> dict[int, dict[str, NDArray[Any]]]:
    """Per class of one image: ``dtScores`` [D], falling; ``dtMatches`` [thresholds, D]; ``gtIgnore`` [boxes]."""
    labels, boxes, scores = (np.asarray(part) for part in predicted)
    (matches,) = matching_batch(
        iou_fn=_iou,
        iou_thresholds=[threshold - IOU_ROUNDING for threshold in IOU_THRESHOLDS],
        pred_boxes=[boxes],
        pred_classes=[labels],
        pred_scores=[scores],
        gt_boxes=[reference.boxes],
        gt_classes=[reference.labels],
        max_detections=MAX_DETECTIONS,
    )
    return {int(label): result for label, result in matches.items()}


@dataclass(frozen=True)
class DetectionPool:
    """The detections of one class in all images, by falling score.

    Attributes:
        score: [D].
        image: [D], index of the image.
        hit: [thresholds, D], matched at each of ``IOU_THRESHOLDS``.
        num_boxes: [images], reference boxes.
    """

    score: Array
    image: NDArray[np.int64]
    hit: NDArray[np.bool_]
    num_boxes: NDArray[np.int64]

    @classmethod
    def of_class(cls, images: Sequence[Mapping[str, NDArray[Any]] | None]) -> DetectionPool:
        """Join the matches of all images; None is an image with neither boxes nor detections of the class."""
        present = [(index, match) for index, match in enumerate(images) if match is not None]
        score = np.concatenate([np.zeros(0), *(match["dtScores"] for _, match in present)])
        image = [np.full(len(match["dtScores"]), index) for index, match in present]
        hit = [np.zeros((len(IOU_THRESHOLDS), 0)), *(match["dtMatches"] for _, match in present)]
        order = np.argsort(-score, kind="stable")
        return cls(
            score=score[order],
            image=np.concatenate([np.zeros(0, dtype=np.int64), *image])[order],
            hit=np.concatenate(hit, axis=1).astype(bool)[:, order],
            num_boxes=np.array([0 if match is None else match["gtIgnore"].size for match in images], dtype=np.int64),
        )

    def counts(self, weights: Array, iou: float) -> tuple[Array, Array]:
        """True and false positives [D] down to each score, when image i counts ``weights[i]`` times."""
        weight, hit = weights[self.image], self.hit[IOU_THRESHOLDS.index(iou)]
        return np.cumsum(weight * hit), np.cumsum(weight * ~hit)

    def average_precision(self, weights: Array, iou: float) -> float:
        """COCO's average precision; NaN without boxes."""
        total = weights @ self.num_boxes
        if not total:
            return float("nan")
        true, false = self.counts(weights, iou)
        precision = true / np.maximum(true + false, 1)
        # the best precision at this recall or a higher one, and 0 for a recall that is never reached
        envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        return float(envelope[np.searchsorted(true / total, RECALL_LEVELS)].mean())

    def sensitivities(self, weights: Array) -> Array:
        """Sensitivity at each of ``FALSE_POSITIVE_RATES``; NaN without boxes."""
        total = weights @ self.num_boxes
        if not total:
            return np.full(len(FALSE_POSITIVE_RATES), np.nan)
        true, false = (counts[self._thresholds()] for counts in self.counts(weights, FROC_IOU))
        return np.append(0.0, true / total)[self._num_allowed(false, weights)]

    def score_thresholds(self) -> Array:
        """The lowest score to keep at each of ``FALSE_POSITIVE_RATES``; see ``froc_thresholds``."""
        once = np.ones(len(self.num_boxes))
        _, false = self.counts(once, FROC_IOU)
        ends = self._thresholds()
        lowest = np.append(np.nan, self.score[ends])
        lowest[-1] = 0.0
        return lowest[self._num_allowed(false[ends], once)]

    def curve(self) -> Array:
        """[2, thresholds]: false positives per image and sensitivity."""
        true, false = (counts[self._thresholds()] for counts in self.counts(np.ones(len(self.num_boxes)), FROC_IOU))
        total = self.num_boxes.sum()
        sensitivity = true / total if total else np.full_like(true, np.nan)
        return np.stack([false / max(1, len(self.num_boxes)), sensitivity])

    def _thresholds(self) -> NDArray[np.int64]:
        """The last detection of each score: those of equal score can only be kept together."""
        return np.flatnonzero(np.diff(self.score, append=-np.inf))

    @staticmethod
    def _num_allowed(false: Array, weights: Array) -> NDArray[np.int64]:
        """How many of the thresholds have at most as many false positives as each rate allows."""
        return np.searchsorted(false, np.array(FALSE_POSITIVE_RATES) * weights.sum(), side="right")


def _mean(classes: Sequence[ClassDetectionScores], resampled: Array, num_groups: int) -> BoxScores:
    """Mean over the classes with boxes; ``resampled`` is [samples, classes, 2]: ``ap_50`` and ``froc_mean``."""
    kept = [index for index, own in enumerate(classes) if own.num_boxes]
    if not kept:
        nothing = Interval(float("nan"), float("nan"), float("nan"))
        return BoxScores(float("nan"), nothing, float("nan"), (float("nan"),) * len(FALSE_POSITIVE_RATES), nothing)
    scores = [classes[index].scores for index in kept]
    ap_50, froc_mean = resampled[:, kept].mean(axis=1).T
    return BoxScores(
        ap_10=float(np.mean([own.ap_10 for own in scores])),
        ap_50=interval_of(float(np.mean([own.ap_50.value for own in scores])), ap_50, num_groups),
        ap_50_95=float(np.mean([own.ap_50_95 for own in scores])),
        froc=tuple(np.mean([own.froc for own in scores], axis=0).tolist()),
        froc_mean=interval_of(float(np.mean([own.froc_mean.value for own in scores])), froc_mean, num_groups),
    )
