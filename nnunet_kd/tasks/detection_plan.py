"""What the detection head of a dataset looks like, planned from its boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from monai.data.box_utils import box_iou
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from nnunet_kd.errors import NnUNetKDError

# An anchor of a box's own shape, half a stride off along every axis, overlaps it at least so much (IoU) on the level
# that the box is planned for. Then ATSS finds it good candidates wherever it lies.
LEAST_OVERLAP = 1 / 3
SMALLEST, LARGEST = 0.05, 0.95  # quantiles of the boxes that levels are made for
NMS_THRESHOLDS = 0.1, 0.5  # boxes of touching objects overlap a little; a copy of a box must not survive
NEIGHBOURS = 0.99  # quantile of the boxes' greatest IoU with a neighbour


class DetectionPlanError(NnUNetKDError):
    """The boxes of a dataset cannot be planned for, or a plan cannot be read."""


@dataclass(frozen=True)
class DetectionPlan:
    """Levels, anchors and thresholds of a detection head. Axes are in array order, lengths in preprocessed voxels.

    Attributes:
        strides: Stride of each decoder level, finest first.
        anchors: Anchor shapes of each level, [level][anchor][axis]; as many on each level.
        classes: Names of the classes, in the order of the outputs.
        score_threshold: Boxes with a lower score are not reported.
        nms_threshold: Boxes of one class with a greater IoU are taken for one object, in a patch and over patches.
        detections_per_image: At most so many boxes are reported per patch.
    """

    strides: tuple[tuple[int, ...], ...]
    anchors: tuple[tuple[tuple[float, ...], ...], ...]
    classes: tuple[str, ...]
    score_threshold: float = 0.05
    nms_threshold: float = 0.3
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        shapes = {(len(level), *map(len, level)) for level in self.anchors}
        if not self.classes or len(self.strides) != len(self.anchors) or len(shapes) != 1 or shapes == {(0,)}:
            raise DetectionPlanError(
                f"A detection plan needs classes ({len(self.classes)} given) and equally many anchors on each of its "
                f"{len(self.strides)} levels, not {self.anchors}. Plan the dataset again."
            )

    @property
    def dimension(self) -> int:
        """Number of spatial axes."""
        return len(self.strides[0])

    @property
    def num_anchors(self) -> int:
        """Anchors per position, the same on each level."""
        return len(self.anchors[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types for the plans file."""
        plan = asdict(self)
        return {
            **plan,
            "strides": [list(stride) for stride in self.strides],
            "anchors": [[list(shape) for shape in level] for level in self.anchors],
            "classes": list(self.classes),
        }

    @classmethod
    def from_dict(cls, plan: Mapping[str, Any]) -> DetectionPlan:
        """Read what :meth:`to_dict` wrote.

        Raises:
            DetectionPlanError: A key is unknown or missing.
        """
        allowed = [field.name for field in fields(cls)]
        if unknown := sorted(set(plan) - set(allowed)):
            raise DetectionPlanError(f"A detection plan has no key '{unknown[0]}'; it has: {', '.join(allowed)}.")
        if missing := [name for name in allowed[:3] if name not in plan]:
            raise DetectionPlanError(f"The detection plan lacks the key '{missing[0]}'. Plan the dataset again.")
        return cls(
            **{
                **plan,
                "strides": tuple(tuple(stride) for stride in plan["strides"]),
                "anchors": tuple(tuple(tuple(shape) for shape in level) for level in plan["anchors"]),
                "classes": tuple(plan["classes"]),
            }
        )


def plan_detection(
    box_sizes: NDArray[np.floating],
    strides: Sequence[Sequence[int]],
    patch_size: Sequence[int],
    classes: Sequence[str],
    *,
    overlaps: NDArray[np.floating] | None = None,
    num_anchors: int = 3,
    max_levels: int = 4,
) -> DetectionPlan:
    """Choose levels, anchors and thresholds for the boxes of a dataset.

    Each box belongs to the coarsest level that is fine enough for it (``LEAST_OVERLAP``), or to the finest there is.
    The finest level used is that of all but the smallest 5% of boxes, so full resolution is used only where boxes need
    it. A level's anchors are the k-means centres of its boxes' log sizes. The same boxes give the same plan.

    Boxes that overlap more than objects of the dataset do are taken for one (``overlaps``). A fixed 0.3 leaves the
    nested boxes that anchors of several sizes find of one object, whose IoU is small, most of all in 3D.

    Args:
        box_sizes: [N, dim] lengths of the training boxes in preprocessed voxels, array order.
        strides: Strides of the decoder's levels in any order (those of all encoder stages but the bottleneck).
        patch_size: Voxels per axis; longer boxes are seen cropped to it.
        classes: Names of the classes.
        overlaps: From :func:`neighbour_overlaps`, of all images; None: objects do not overlap.
        num_anchors: Anchors per position.
        max_levels: At most so many levels, the finest needed ones.

    Raises:
        DetectionPlanError: There is no box, or a length is not positive.

    Source: our design; shapes from k-means as in YOLO9000 (Redmon & Farhadi, CVPR 2017), in log size.
    """
    sizes = np.asarray(box_sizes, dtype=np.float64).reshape(-1, len(patch_size))
    if not len(sizes):
        raise DetectionPlanError(
            "No box to plan detection from: every training case is without boxes. Check the boxes file, or remove "
            "'detection' from the dataset's tasks."
        )
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        row = int(np.flatnonzero(~((sizes > 0) & np.isfinite(sizes)).all(1))[0])
        raise DetectionPlanError(f"Box {row} has the size {sizes[row].tolist()}; lengths must be positive.")
    sizes = np.minimum(sizes, patch_size)
    ordered = sorted({tuple(int(step) for step in stride) for stride in strides}, key=lambda stride: np.prod(stride))
    fits = np.stack([displaced_overlap(sizes, stride) >= LEAST_OVERLAP for stride in ordered], axis=1)
    level_of_box = np.where(fits.any(1), fits.shape[1] - 1 - fits[:, ::-1].argmax(1), 0)
    finest, coarsest = np.quantile(level_of_box, [SMALLEST, LARGEST], method="lower").astype(int)
    level_of_box = level_of_box.clip(finest, min(coarsest, finest + max_levels - 1))
    used = np.unique(level_of_box)
    return DetectionPlan(
        strides=tuple(ordered[level] for level in used),
        anchors=tuple(anchor_shapes(sizes[level_of_box == level], num_anchors) for level in used),
        classes=tuple(classes),
        nms_threshold=planned_nms_threshold(overlaps),
    )


def neighbour_overlaps(boxes: NDArray[np.floating], labels: NDArray[np.integer]) -> NDArray[np.float64]:
    """Greatest IoU [N] of each box [N, 2 * dim] of an image with another one of its class; 0 without another one."""
    overlap = np.asarray(box_iou(boxes.astype(np.float64), boxes.astype(np.float64)), dtype=np.float64)
    overlap[labels[:, None] != labels[None]] = 0
    np.fill_diagonal(overlap, 0)
    return overlap.max(1, initial=0)


def planned_nms_threshold(overlaps: NDArray[np.floating] | None) -> float:
    """The IoU that all but 1% of a dataset's boxes do not exceed with a neighbour, within ``NMS_THRESHOLDS``."""
    least, most = NMS_THRESHOLDS
    usual = 0.0 if overlaps is None or not len(overlaps) else float(np.quantile(overlaps, NEIGHBOURS))
    return round(min(max(usual, least), most), 2)


def displaced_overlap(sizes: NDArray[np.float64], stride: Sequence[int]) -> NDArray[np.float64]:
    """IoU of boxes of ``sizes`` [N, dim] with themselves moved by half of ``stride`` along every axis, [N]."""
    intersection = np.prod(1 - np.minimum(np.asarray(stride) / (2 * sizes), 1), axis=1)
    return intersection / (2 - intersection)


def anchor_shapes(sizes: NDArray[np.float64], num_anchors: int) -> tuple[tuple[float, ...], ...]:
    """``num_anchors`` shapes, smallest first, that stand for boxes of ``sizes`` [N, dim]."""
    logarithms = np.log(sizes)
    num_clusters = min(num_anchors, len(np.unique(logarithms, axis=0)))
    centres = KMeans(num_clusters, n_init=10, random_state=0).fit(logarithms).cluster_centers_
    # too few different boxes: smaller and larger copies of the mean one
    steps = [(-1) ** step * (step // 2 + 1) * np.log(2) / 2 for step in range(num_anchors - num_clusters)]
    shapes = np.exp(np.concatenate([centres, *(logarithms.mean(0, keepdims=True) + step for step in steps)]))
    shapes = shapes[np.lexsort((*shapes.T, shapes.prod(1)))]
    return tuple(tuple(float(length) for length in shape) for shape in shapes.round(2))
