"""Detection: matching, loss and decoding of boxes on the levels of a :class:`DetectionPlan`.

Boxes are [N, 2 * dim] in array order, ``[y0, x0, y1, x1]`` or ``[z0, y0, x0, z1, y1, x1]``, in voxel-edge coordinates
of the patch, end exclusive. That is what MONAI calls the standard mode; MONAI names the axes x, y, z in the order of
the tensor, which is our array order.

Anchors are in the order levels, then positions, then shapes; so anchor // num_anchors is a position among those of all
levels, and anchor % num_anchors a shape.

Matching, sampling and suppression take a batch at once, with few steps that wait for the device. MONAI's take an image
at a time and compare every box with every anchor, which can cost more than a training step of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from monai.apps.detection.utils.box_coder import BoxCoder
from monai.data.box_utils import clip_boxes_to_image
from monai.losses.giou_loss import BoxGIoULoss
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from nnunet_kd.tasks.box_merging import Detections, non_maximum_suppression, paired_iou
from nnunet_kd.tasks.detection_head import BoxMaps, DetectionHead
from nnunet_kd.tasks.detection_plan import DetectionPlan, DetectionPlanError, plan_detection

__all__ = [
    "BoxMaps",
    "DetectionHead",
    "DetectionPlan",
    "DetectionPlanError",
    "DetectionTask",
    "Detections",
    "Proposals",
    "level_anchors",
    "plan_detection",
]

CANDIDATES_PER_LEVEL = 300  # kept before suppression


class Proposals(NamedTuple):
    """The best class logits of each level of V views, not yet compared with any threshold; on the maps' device."""

    logits: Tensor
    """[V, M] float32."""
    labels: Tensor
    """[V, M] int64, index into the plan's classes."""
    anchors: Tensor
    """[V, M, 2 * dim] float32."""
    codes: Tensor
    """[V, M, 2 * dim] float32, of the anchors."""


class DetectionTask:
    """Owns anchors, matching, coder and sampling of one plan; has no weights.

    Args:
        plan: Levels, anchors, thresholds.
        num_candidates: Positions per level that ATSS looks at for each box.
        samples_per_image: Anchors per image in the class loss.
        positive_fraction: Of these, at most so many are positives; negatives are drawn in proportion.
        min_negatives: At least so many hard negatives per image, also where it has no box.
        pool_size: Hard negatives are drawn among the so many times more highest scores.

    Source: RetinaNet with ATSS (Zhang et al., CVPR 2020), hard negatives, BCE and GIoU (Rezatofighi et al., CVPR 2019)
    as nnDetection (Baumgartner et al., MICCAI 2021) combines them; box coder, GIoU and defaults from MONAI.
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
        self.num_candidates = num_candidates
        self.max_positives = int(samples_per_image * positive_fraction)
        self.negatives_per_positive = 1 / positive_fraction - 1
        self.min_negatives = min_negatives
        self.pool_size = pool_size
        self.coder = BoxCoder(weights=(1.0,) * (2 * plan.dimension))
        self.box_loss = BoxGIoULoss(reduction="mean")

    # ---- anchors ----------------------------------------------------------------------------------------------------

    def flatten(self, maps: BoxMaps) -> tuple[Tensor, Tensor]:
        """Class logits [B, N, classes] and box codes [B, N, 2 * dim] in the order of the anchors, in float32."""
        logits = [flatten_map(level, self.plan.num_anchors) for level in maps.class_logits]
        codes = [flatten_map(level, self.plan.num_anchors) for level in maps.box_regression]
        return torch.cat(logits, 1).float(), torch.cat(codes, 1).float()

    def anchors(self, maps: BoxMaps) -> Tensor:
        """All anchors [N, 2 * dim] of a patch: levels, then positions, then shapes. Not to be changed in place."""
        return plan_anchors(self.plan, _grids(maps), maps.class_logits[0].device)

    def level_sizes(self, maps: BoxMaps) -> list[int]:
        """Number of anchors of each level."""
        return [level.shape[2:].numel() * self.plan.num_anchors for level in maps.class_logits]

    # ---- matching ---------------------------------------------------------------------------------------------------

    def matches(self, maps: BoxMaps, boxes: Sequence[Tensor]) -> list[Tensor]:
        """Per image [N anchors] int64: index into the image's ``boxes`` [n, 2 * dim], or -1.

        ATSS: of the anchors at the nearest positions of each level, those whose IoU with the box is at least the mean
        plus the standard deviation; an anchor of several boxes goes to the one with the greatest IoU. Every box gets at
        least the free anchor with the greatest IoU: ATSS alone may leave it without.

        Source: Zhang et al., CVPR 2020 (arXiv:1912.02424), algorithm 1, without its condition that an anchor's centre
        lies in the box, which leaves small boxes without anchors.
        """
        anchors = self.anchors(maps)
        every_box = torch.cat([of_image.to(anchors) for of_image in boxes])
        num_boxes = len(every_box)
        if not num_boxes:
            return [torch.full((len(anchors),), -1, device=anchors.device) for _ in boxes]
        image, first_box = _images_of(boxes, anchors.device)

        near = self._nearest_anchors(maps, every_box)
        overlaps = paired_iou(every_box[:, None], anchors[near])
        is_match = overlaps >= (overlaps.mean(1) + overlaps.std(1))[:, None]
        place = (image[:, None] * len(anchors) + near).flatten()  # of an anchor of an image
        overlaps = overlaps.where(is_match, -1.0).flatten()
        greatest = overlaps.new_full((len(boxes) * len(anchors),), -1.0).scatter_reduce(0, place, overlaps, "amax")
        is_match = is_match.flatten() & (overlaps == greatest[place])
        candidate = torch.arange(num_boxes, device=anchors.device).repeat_interleave(near.shape[1])
        # of equal IoU the first box; num_boxes stands for none
        owner = torch.full_like(greatest, num_boxes, dtype=torch.int64)
        owner.scatter_reduce_(0, place, candidate.where(is_match, num_boxes), "amin")
        matches = list(owner.reshape(len(boxes), -1))

        matched = owner.bincount(minlength=num_boxes + 1)[:num_boxes]
        for index in (matched == 0).nonzero().flatten().tolist():
            of_image = matches[int(image[index])]
            own = paired_iou(every_box[index], anchors)
            of_image[own.where(of_image == num_boxes, -1.0).argmax()] = index
        return [
            (of_image - first).where(of_image < num_boxes, -1)
            for of_image, first in zip(matches, first_box, strict=True)
        ]

    def _nearest_anchors(self, maps: BoxMaps, boxes: Tensor) -> Tensor:
        """The anchors [n, K] at the ``num_candidates`` positions of each level whose centres are nearest to a box's."""
        dimension = self.plan.dimension
        centres = (boxes[:, :dimension] + boxes[:, dimension:]) / 2
        nearest, first = [], 0
        for grid, stride in zip(_grids(maps), self.plan.strides, strict=True):
            squared = centres.new_zeros(len(boxes), *[1] * dimension)
            for axis, (size, step) in enumerate(zip(grid, stride, strict=True)):
                along = (torch.arange(size, device=boxes.device) + 0.5) * step
                shape = [size if other == axis else 1 for other in range(dimension)]
                squared = squared + ((centres[:, axis, None] - along) ** 2).reshape(-1, *shape)
            squared = squared.flatten(1)
            count = min(self.num_candidates, squared.shape[1])
            nearest.append(first + squared.topk(count, 1, largest=False, sorted=False).indices)
            first += squared.shape[1]
        shapes = torch.arange(self.plan.num_anchors, device=boxes.device)
        return (torch.cat(nearest, 1)[..., None] * self.plan.num_anchors + shapes).flatten(1)

    # ---- loss -------------------------------------------------------------------------------------------------------

    def loss(
        self,
        maps: BoxMaps,
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        matches: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of a batch; a batch without any box has a box loss of 0 with a gradient of zeros.

        Args:
            maps: Of the head, for B patches.
            boxes: B tensors [N, 2 * dim]; an image with N = 0 is all negative.
            labels: B tensors [N], index into the plan's classes.
            matches: What :meth:`matches` returns for ``maps`` and ``boxes``; None computes it here.

        Returns:
            "classification": binary cross-entropy, summed over classes, mean over the sampled anchors of the batch.
            "box_regression": 1 - GIoU, in [0, 2], mean over the matched anchors of the batch.
        """
        anchors = self.anchors(maps)
        match = torch.stack(list(self.matches(maps, boxes) if matches is None else matches))
        image, anchor = (match >= 0).nonzero(as_tuple=True)
        box = match[image, anchor] + _images_of(boxes, match.device)[1][image]
        logits = _by_shape(maps.class_logits, self.plan.num_anchors)
        codes = _by_shape(maps.box_regression, self.plan.num_anchors)

        drawn = self._draw_positives(image, len(match))
        negative_image, negative_anchor = self._draw_negatives(logits, match)
        positive_logits = _at(logits, image[drawn], anchor[drawn]).float()
        negative_logits = _at(logits, negative_image, negative_anchor).float()
        targets = torch.zeros_like(positive_logits)
        targets.scatter_(1, torch.cat([of_image.to(match) for of_image in labels])[box[drawn], None], 1)
        classification = binary_cross_entropy_with_logits(
            torch.cat((positive_logits, negative_logits)),
            torch.cat((targets, torch.zeros_like(negative_logits))),
            reduction="none",
        )
        if len(box):
            # MONAI raises on NaN, but under AMP an overflow must reach the gradient scaler, which skips the step
            matched = _at(codes, image, anchor).float()
            decoded = self.coder.decode_single(matched.nan_to_num(0.0, 0.0, 0.0), anchors[anchor])
            box_regression = self.box_loss(decoded, torch.cat([of_image.to(anchors) for of_image in boxes])[box])
            box_regression = box_regression + matched.sum() * 0
        else:
            box_regression = codes.float().sum() * 0
        return {"classification": classification.sum(1).mean(), "box_regression": box_regression}

    @torch.no_grad()
    def _draw_positives(self, image: Tensor, num_images: int) -> Tensor:
        """Rows of at most ``max_positives`` random matched anchors of each image; ``image`` [P] is that of each."""
        order = torch.rand(len(image), device=image.device).argsort()
        order = order[image[order].argsort(stable=True)]
        counts = image.bincount(minlength=num_images)
        rank = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[image]
        return order[rank < self.max_positives]

    @torch.no_grad()
    def _draw_negatives(self, logits: Tensor, match: Tensor) -> tuple[Tensor, Tensor]:
        """Images and anchors of hard negatives: random ones of each image's highest scores at unmatched anchors.

        Args:
            logits: [B, shapes, classes, positions].
            match: [B, N].
        """
        is_matched = match >= 0
        num_positives = is_matched.sum(1)
        wanted = (num_positives.clamp(1, self.max_positives) * self.negatives_per_positive).floor()
        wanted = wanted.clamp(min=self.min_negatives).minimum(match.shape[1] - num_positives)
        hardness = logits.amax(2).float().transpose(1, 2).flatten(1).masked_fill(is_matched, -torch.inf)
        most = max(self.min_negatives, int(self.max_positives * self.negatives_per_positive))
        pool = hardness.topk(min(int(most * self.pool_size), hardness.shape[1]), 1).indices
        in_pool = torch.arange(pool.shape[1], device=pool.device) < (wanted * self.pool_size)[:, None]
        in_pool &= ~is_matched.gather(1, pool)
        # the smallest of random numbers, those outside of the pool last
        key = torch.rand(pool.shape, device=pool.device).masked_fill(~in_pool, 2.0)
        drawn = key.argsort(1)[:, :most]
        is_drawn = torch.arange(drawn.shape[1], device=pool.device) < wanted[:, None]
        image, rank = is_drawn.nonzero(as_tuple=True)
        return image, pool[image, drawn[image, rank]]

    # ---- decoding ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def propose(self, maps: BoxMaps) -> Proposals:
        """The ``CANDIDATES_PER_LEVEL`` best logits of each level of the V views; nothing waits for the device."""
        num_anchors, levels = self.plan.num_anchors, []
        anchors = self.anchors(maps).split(self.level_sizes(maps))
        for class_logits, box_regression, of_level in zip(*maps, anchors, strict=True):
            positions = class_logits.shape[2:].numel()
            flat = class_logits.flatten(1)  # shapes, classes, positions
            logits, index = flat.topk(min(CANDIDATES_PER_LEVEL, flat.shape[1]), 1)
            position, channel = index % positions, index // positions
            shape = channel // len(self.plan.classes)
            image = torch.arange(len(flat), device=flat.device)[:, None]
            codes = box_regression.flatten(2).unflatten(1, (num_anchors, -1))[image, shape, :, position]
            proposals = Proposals(
                logits.float(),
                channel % len(self.plan.classes),
                of_level[position * num_anchors + shape],
                codes.float(),
            )
            levels.append(proposals)
        return Proposals(*(torch.cat(parts, 1) for parts in zip(*levels, strict=True)))

    @torch.no_grad()
    def suppress(self, proposals: Proposals, image_shape: Sequence[int]) -> tuple[Detections, Tensor]:
        """Return the boxes of all V views, clipped to ``image_shape``, after suppression in each view, on the CPU.

        Returns:
            The boxes of all views, those of the first one first, by falling score within a view; and the view of each.
        """
        logits, labels, anchors, codes = (part.cpu() for part in proposals)
        scores = logits.sigmoid()
        views, rank = (scores > self.plan.score_threshold).nonzero(as_tuple=True)
        decoded = self.coder.decode_single(codes[views, rank], anchors[views, rank])
        clipped: tuple[Any, Any] = clip_boxes_to_image(decoded, list(image_shape))
        boxes, inside = clipped
        views, rank = views[inside], rank[inside]
        scores, labels = scores[views, rank], labels[views, rank]
        limit = self.plan.detections_per_image
        groups = views * len(self.plan.classes) + labels
        kept = non_maximum_suppression(boxes, scores, groups, self.plan.nms_threshold, limit)
        kept = kept[views[kept].argsort(stable=True)]
        counts = views[kept].bincount(minlength=len(logits))
        rank = torch.arange(len(kept)) - (counts.cumsum(0) - counts)[views[kept]]
        kept = kept[rank < limit]
        return Detections(boxes[kept], scores[kept], labels[kept]), views[kept]

    def decode(self, maps: BoxMaps, image_shape: Sequence[int]) -> list[Detections]:
        """Return the boxes of each of the B patches, clipped to ``image_shape``, after suppression, on the CPU."""
        found, images = self.suppress(self.propose(maps), image_shape)
        counts = images.bincount(minlength=len(maps.class_logits[0])).tolist()
        return [Detections(*parts) for parts in zip(*(part.split(counts) for part in found), strict=True)]


def flatten_map(level: Tensor, num_anchors: int) -> Tensor:
    """[B, anchors * K, *S] to [B, positions * anchors, K]."""
    batch, channels = level.shape[:2]
    by_anchor = level.reshape(batch, num_anchors, channels // num_anchors, -1)
    return by_anchor.permute(0, 3, 1, 2).flatten(1, 2)


def _by_shape(levels: Sequence[Tensor], num_anchors: int) -> Tensor:
    """Maps [B, anchors * K, *S] of all levels as [B, anchors, K, positions]; much cheaper than to permute them."""
    return torch.cat([level.flatten(2) for level in levels], 2).unflatten(1, (num_anchors, -1))


def _at(values: Tensor, image: Tensor, anchor: Tensor) -> Tensor:
    """[M, K] of ``values`` [B, anchors, K, positions] at M anchors of images."""
    return values[image, anchor % values.shape[1], :, anchor // values.shape[1]]


def _images_of(boxes: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """The image of each box [sum of n], and the number of boxes before those of each image [B]."""
    counts = torch.tensor([len(of_image) for of_image in boxes])
    image = torch.arange(len(boxes)).repeat_interleave(counts)
    return image.to(device, non_blocking=True), (counts.cumsum(0) - counts).to(device, non_blocking=True)


def _grids(maps: BoxMaps) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(level.shape[2:]) for level in maps.class_logits)


@lru_cache(maxsize=8)
def plan_anchors(plan: DetectionPlan, grids: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """All anchors [N, 2 * dim] of a plan on levels of these grids; the same tensor for the same arguments."""
    with torch.inference_mode(False):  # what inference makes cannot be trained with
        return torch.cat(
            [
                level_anchors(grid, stride, shapes, device)
                for grid, stride, shapes in zip(grids, plan.strides, plan.anchors, strict=True)
            ]
        )


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
