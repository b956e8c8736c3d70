"""Detection: matching, loss and decoding of boxes on the levels of a :class:`DetectionPlan`.

Boxes are [N, 2 * dim] in array order, ``[y0, x0, y1, x1]`` or ``[z0, y0, x0, z1, y1, x1]``, in voxel-edge coordinates
of the patch, end exclusive. That is what MONAI calls the standard mode; MONAI names the axes x, y, z in the order of
the tensor, which is our array order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from monai.apps.detection.utils.ATSS_matcher import ATSSMatcher
from monai.apps.detection.utils.box_coder import BoxCoder
from monai.apps.detection.utils.box_selector import BoxSelector
from monai.apps.detection.utils.hard_negative_sampler import HardNegativeSampler
from monai.losses.giou_loss import BoxGIoULoss
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from nnunet_kd.tasks.detection_head import BoxMaps, DetectionHead
from nnunet_kd.tasks.detection_plan import DetectionPlan, DetectionPlanError, plan_detection

__all__ = [
    "BoxMaps",
    "DetectionHead",
    "DetectionPlan",
    "DetectionPlanError",
    "DetectionTask",
    "Detections",
    "level_anchors",
    "plan_detection",
]

CANDIDATES_PER_LEVEL = 300  # kept before suppression


class Detections(NamedTuple):
    """Boxes of one image, falling score."""

    boxes: Tensor
    """[N, 2 * dim] float32, array order, voxel edges."""
    scores: Tensor
    """[N] float32 in [0, 1]."""
    labels: Tensor
    """[N] int64, index into the plan's classes."""


class DetectionTask:
    """Owns anchors, matcher, coder and sampler of one plan; has no weights.

    Args:
        plan: Levels, anchors, thresholds.
        num_candidates: Positions per level that ATSS looks at for each box.
        samples_per_image: Anchors per image in the class loss.
        positive_fraction: Of these, at most so many are positives; negatives are drawn in proportion.
        min_negatives: At least so many hard negatives per image, also where it has no box.
        pool_size: Hard negatives are drawn among the so many times more highest scores.

    Source: RetinaNet with ATSS (Zhang et al., CVPR 2020), hard negatives, BCE and GIoU (Rezatofighi et al., CVPR 2019)
    as nnDetection (Baumgartner et al., MICCAI 2021) combines them; parts and their defaults from MONAI.
    """

    def __init__(
        self,
        plan: DetectionPlan,
        *,
        num_candidates: int = 9,
        samples_per_image: int = 64,
        positive_fraction: float = 1 / 3,
        min_negatives: int = 16,
        pool_size: float = 20.0,
    ) -> None:
        self.plan = plan
        self.matcher = ATSSMatcher(num_candidates, center_in_gt=False)
        self.coder = BoxCoder(weights=(1.0,) * (2 * plan.dimension))
        self.sampler = HardNegativeSampler(samples_per_image, positive_fraction, min_negatives, pool_size)
        self.box_loss = BoxGIoULoss(reduction="mean")
        self.selector = BoxSelector(
            score_thresh=plan.score_threshold,
            topk_candidates_per_level=CANDIDATES_PER_LEVEL,
            nms_thresh=plan.nms_threshold,
            detections_per_img=plan.detections_per_image,
        )

    def loss(self, maps: BoxMaps, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the losses of a batch; a batch without any box has a box loss of 0 with a gradient of zeros.

        Args:
            maps: Of the head, for B patches.
            boxes: B tensors [N, 2 * dim]; an image with N = 0 is all negative.
            labels: B tensors [N], index into the plan's classes.

        Returns:
            "classification": binary cross-entropy, summed over classes, mean over the sampled anchors of the batch.
            "box_regression": 1 - GIoU, in [0, 2], mean over the matched anchors of the batch.
        """
        logits, codes = self.flatten(maps)
        anchors = self.anchors(maps)
        matches = [self.match(maps, anchors, image_boxes) for image_boxes in boxes]
        sampled_logits, sampled_targets = [], []
        for image_logits, image_labels, match in zip(logits, labels, matches, strict=True):
            targets = torch.zeros_like(image_logits)
            positive = match >= 0
            targets[positive, image_labels.to(match)[match[positive]]] = 1
            chosen = self.sample(image_logits, match)
            sampled_logits.append(image_logits[chosen])
            sampled_targets.append(targets[chosen])
        classification = binary_cross_entropy_with_logits(
            torch.cat(sampled_logits), torch.cat(sampled_targets), reduction="none"
        )
        matched_codes = torch.cat([image_codes[match >= 0] for image_codes, match in zip(codes, matches, strict=True)])
        matched_anchors = torch.cat([anchors[match >= 0] for match in matches])
        matched_boxes = torch.cat(
            [image_boxes.to(anchors)[match[match >= 0]] for image_boxes, match in zip(boxes, matches, strict=True)]
        )
        if len(matched_boxes):
            # MONAI raises on NaN, but under AMP an overflow must reach the gradient scaler, which skips the step
            decoded = self.coder.decode_single(matched_codes.nan_to_num(0.0, 0.0, 0.0), matched_anchors)
            box_regression = self.box_loss(decoded, matched_boxes)
        else:
            box_regression = codes.sum() * 0
        return {"classification": classification.sum(1).mean(), "box_regression": box_regression}

    @torch.no_grad()
    def decode(self, maps: BoxMaps, image_shape: Sequence[int]) -> list[Detections]:
        """Return the boxes of each of the B patches, clipped to ``image_shape``, after suppression, on the CPU."""
        sizes = self.level_sizes(maps)
        anchors = self.anchors(maps).split(sizes)
        logits, codes = self.flatten(maps)
        return [
            self._decode_image(image_logits.split(sizes), image_codes.split(sizes), anchors, image_shape)
            for image_logits, image_codes in zip(logits, codes, strict=True)
        ]

    def _decode_image(
        self, logits: Sequence[Tensor], codes: Sequence[Tensor], anchors: Sequence[Tensor], image_shape: Sequence[int]
    ) -> Detections:
        boxes, scores = [], []
        for level_logits, level_codes, of_level in zip(logits, codes, anchors, strict=True):
            # only candidates are decoded and leave the device: suppression is a loop with small steps
            kept, _, _ = self.selector.select_top_score_idx_per_level(level_logits)
            kept = kept.unique()
            boxes.append(self.coder.decode_single(level_codes[kept], of_level[kept]).cpu())
            scores.append(level_logits[kept].cpu())
        return Detections(*self.selector.select_boxes_per_image(boxes, scores, list(image_shape)))

    def flatten(self, maps: BoxMaps) -> tuple[Tensor, Tensor]:
        """Class logits [B, N, classes] and box codes [B, N, 2 * dim] in the order of the anchors, in float32."""
        logits = [flatten_map(level, self.plan.num_anchors) for level in maps.class_logits]
        codes = [flatten_map(level, self.plan.num_anchors) for level in maps.box_regression]
        return torch.cat(logits, 1).float(), torch.cat(codes, 1).float()

    def anchors(self, maps: BoxMaps) -> Tensor:
        """All anchors [N, 2 * dim] of a patch: levels, then positions, then shapes."""
        device = maps.class_logits[0].device
        return torch.cat(
            [
                level_anchors(level.shape[2:], stride, shapes, device)
                for level, stride, shapes in zip(maps.class_logits, self.plan.strides, self.plan.anchors, strict=True)
            ]
        )

    def level_sizes(self, maps: BoxMaps) -> list[int]:
        """Number of anchors of each level."""
        return [level.shape[2:].numel() * self.plan.num_anchors for level in maps.class_logits]

    def match(self, maps: BoxMaps, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Index of the box of each anchor, or -1; [N] for ``anchors`` [N, 2 * dim] and one image's ``boxes``.

        Every box gets at least the free anchor with the greatest IoU: ATSS alone may leave it without.
        """
        boxes = boxes.to(anchors)
        if not len(boxes):
            return torch.full((len(anchors),), -1, device=anchors.device)
        positions = [level.shape[2:].numel() for level in maps.class_logits]
        overlaps, matches = self.matcher(boxes, anchors, positions, self.plan.num_anchors)
        matched = torch.bincount(matches[matches >= 0], minlength=len(boxes))
        for box in (matched == 0).nonzero().flatten().tolist():
            matches[overlaps[box].where(matches < 0, -1.0).argmax()] = box
        return matches

    def sample(self, logits: Tensor, matches: Tensor) -> Tensor:
        """Indices of the anchors of one image that take part in the class loss."""
        positives, negatives = self.sampler([matches + 1], logits.detach().amax(1))
        return (positives[0] + negatives[0]).nonzero().flatten()


def flatten_map(level: Tensor, num_anchors: int) -> Tensor:
    """[B, anchors * K, *S] to [B, positions * anchors, K]."""
    batch, channels = level.shape[:2]
    by_anchor = level.reshape(batch, num_anchors, channels // num_anchors, -1)
    return by_anchor.permute(0, 3, 1, 2).flatten(1, 2)


def level_anchors(
    grid: Sequence[int], stride: Sequence[int], shapes: Sequence[Sequence[float]], device: torch.device | str = "cpu"
) -> Tensor:
    """Anchors [positions * shapes, 2 * dim] of one level, positions in the order of the flattened map.

    MONAI's AnchorGenerator has one set of shapes for all levels, rounds them to even lengths and centres them half a
    voxel off where a stride is odd; everywhere else these are the same anchors.
    """
    centres = [(torch.arange(size, device=device) + 0.5) * step for size, step in zip(grid, stride, strict=True)]
    positions = torch.stack(torch.meshgrid(*centres, indexing="ij"), -1).reshape(-1, 1, len(grid))
    half = torch.tensor(shapes, device=device, dtype=positions.dtype) / 2
    return torch.cat((positions - half, positions + half), -1).reshape(-1, 2 * len(grid))
