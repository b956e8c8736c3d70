"""Progressive imbalance-aware CutMix: boxes around rare classes are pasted between patches, rarest first.

Established (arXiv 2602.07819): class-conditional CutMix of labelled and unlabelled images whose curriculum goes from
the tail classes to all alike. The formulas are our specification. Everything stays on the device of the patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunet_kd.settings import DinoMix

COUNT_MOMENTUM = 0.99  # of the class frequencies, about the last 100 steps
SMALLEST_SHARE = 1e-6  # of the most frequent class: a class that was never seen is this rare
NOT_THERE = -1e9  # logarithm of a probability that is as good as 0
SURE = 20.0  # logit of a known label: its probability is 1 in float32


class Pair(NamedTuple):
    """Where the box of a mix comes from and where it goes, "labeled" or "unlabeled"."""

    donor: str
    recipient: str


PAIRS = (Pair("labeled", "unlabeled"), Pair("unlabeled", "labeled"), Pair("labeled", "labeled"))


class ClassFrequencies:
    """Moving average of the voxels per patch of each foreground class, in labels and in confident pseudo labels."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None  # [2 (labelled, unlabelled), classes]
        self.updates = 0

    def update(self, labeled: Tensor, unlabeled: Tensor) -> None:
        """Add the voxels of a batch, [samples, classes] each."""
        mean = torch.stack((labeled.float().mean(0), unlabeled.float().mean(0)))
        self.updates += 1
        # the first updates are plain means, so that the start has no weight of its own
        share = max(1 - COUNT_MOMENTUM, 1 / self.updates)
        self.counts = mean if self.counts is None else self.counts.lerp(mean, share)

    @property
    def total(self) -> Tensor:
        """Voxels per patch of each class, labelled and unlabelled together: [classes]."""
        assert self.counts is not None
        return self.counts.sum(0)

    def state(self) -> dict[str, object]:
        """For the checkpoint."""
        return {"counts": self.counts, "updates": self.updates}

    def load_state(self, state: dict[str, object], device: torch.device) -> None:
        """Restore :meth:`state`."""
        counts, updates = state["counts"], state["updates"]
        assert isinstance(updates, int)
        self.counts = counts.to(device) if isinstance(counts, Tensor) else None
        self.updates = updates


def class_probabilities(counts: Tensor, progress: float, settings: DinoMix) -> Tensor:
    """Probability of each foreground class to be pasted: (1 - a) q + a u, which goes from the tail q to uniform u.

    q ~ log(1 + n_max / n) or (n_max / n)^1/2; a = min(1, progress / end)^power, or fixed at 0 ("tail") or 1
    ("uniform").

    Args:
        counts: Voxels n of each class, [classes].
        progress: Of the training, in [0, 1].
        settings: Curriculum and measure of imbalance.
    """
    largest = counts.max().clamp(min=torch.finfo(counts.dtype).tiny)
    rarity = largest / torch.maximum(counts, largest * SMALLEST_SHARE)
    weights = (1 + rarity).log() if settings.imbalance == "log" else rarity.sqrt()
    curriculum: dict[str, float] = {
        "tail": 0.0,
        "uniform": 1.0,
        "progressive": min(1.0, progress / settings.curriculum_end) ** settings.curriculum_power,
    }
    uniform = curriculum[settings.curriculum]
    return (1 - uniform) * weights / weights.sum() + uniform / len(counts)


def known_logits(target: Tensor, num_channels: int, regions: bool, ignore: int | None) -> Tensor:
    """Logits of known labels: 20 for the true channel and 0 else, or 20 and -20 for regions; 0 where they are ignored.

    Args:
        target: nnU-Net's of full resolution: [B, 1, *S] labels, or [B, regions (+ ignore), *S].
        num_channels: Of the logits.
        regions: Whether the channels are regions.
        ignore: The ignore label; None without.

    Returns:
        [B, num_channels, *S] float32.
    """
    if regions:
        logits = SURE * (2 * target[:, :num_channels].float() - 1)
        return logits if ignore is None else logits * (1 - target[:, -1:].float())
    channels = torch.arange(num_channels, device=target.device).view(1, -1, *[1] * (target.ndim - 2))
    return (target == channels).float() * SURE


def class_members(logits: Tensor, confidence: float, regions: bool) -> Tensor:
    """Which voxels belong to which foreground class with a probability above ``confidence``: bool [B, classes, *S]."""
    return logits.sigmoid() > confidence if regions else logits.softmax(1)[:, 1:] > confidence


class Mixed(NamedTuple):
    """Mixed patches.

    ``image``: [M, C, *S]. ``logits``: [M, channels, *S]. ``target``: [M, t, *S]. ``inside``: the boxes, [M, 1, *S].
    ``classes``: bool [M, classes], the class that each box lies around; none where no donor has any.
    """

    image: Tensor
    logits: Tensor
    target: Tensor
    inside: Tensor
    classes: Tensor


def mix(
    image: Tensor,
    logits: Tensor,
    target: Tensor,
    members: Tensor,
    num_labeled: int,
    probabilities: Tensor,
    count: int,
    sides: Sequence[float],
) -> Mixed:
    """Make ``count`` mixed patches: each a patch with a box of another one, around a voxel of a drawn class.

    Of each mix the pair (labelled -> unlabelled, unlabelled -> labelled, labelled -> other labelled) is drawn, then the
    class among those that a donor has, the donor among those that have it, one of its voxels, and the box, which is
    moved into the patch where it would stick out. Where no donor has any class, the box lies anywhere.

    Args:
        image: [B, C, *S], the labelled samples first.
        logits: [B, channels, *S].
        target: [B, t, *S].
        members: bool [B, classes, *S], see :func:`class_members`.
        num_labeled: Number of labelled samples.
        probabilities: [classes] of being drawn.
        count: M.
        sides: Smallest and largest side of a box, as fractions of the patch's.
    """
    has_class = members.flatten(2).any(2)
    mixes = []
    for _ in range(count):
        donors, recipient = _draw_pair(len(image), num_labeled)
        chosen = _draw_donor(has_class[donors], probabilities, recipient - donors.start)
        donor = chosen.donor + donors.start
        own = members.flatten(0, 1).index_select(0, donor * members.shape[1] + chosen.label)[0]
        inside = _draw_box(own, sides)
        pairs = ((part.index_select(0, donor), part[recipient : recipient + 1]) for part in (image, logits, target))
        mixes.append((*(torch.where(inside, new, old) for new, old in pairs), inside, chosen.classes))
    return Mixed(*(torch.cat(parts) for parts in zip(*mixes, strict=True)))


def _draw_pair(batch_size: int, num_labeled: int) -> tuple[slice, int]:
    """Samples that may give a box, and the one that gets it and may be among them; drawn on the host."""
    ranges = {"labeled": slice(0, num_labeled), "unlabeled": slice(num_labeled, batch_size)}
    possible = [pair for pair in PAIRS if pair.donor != pair.recipient or num_labeled > 1]
    pair = possible[int(torch.randint(len(possible), ()))]
    recipients = ranges[pair.recipient]
    return ranges[pair.donor], int(torch.randint(recipients.start, recipients.stop, ()))


class _Chosen(NamedTuple):
    """Indices [1]; as tensors they can be used without waiting for the device. ``classes``: bool [1, classes]."""

    donor: Tensor
    label: Tensor
    classes: Tensor


def _draw_donor(has_class: Tensor, probabilities: Tensor, recipient: int) -> _Chosen:
    """Class, then donor; ``has_class`` is bool [donors, classes], and ``recipient`` is none of them."""
    indices = torch.arange(len(has_class), device=has_class.device)
    others = indices != recipient
    has_class = has_class & others[:, None]
    # argmax of log p + Gumbel noise is a draw from p, also of the part of it that is there
    noise = -(-torch.rand_like(probabilities).log()).log()
    available = has_class.any(0)
    label = (probabilities.log() + noise + torch.where(available, 0.0, NOT_THERE)).argmax(0, keepdim=True)
    has_label = has_class.index_select(1, label)[:, 0]
    donor = (torch.rand(len(has_class), device=has_class.device) + has_label + others).argmax(0, keepdim=True)
    classes = (torch.arange(len(probabilities), device=label.device) == label) & available
    return _Chosen(donor, label, classes[None])


def _draw_box(members: Tensor, sides: Sequence[float]) -> Tensor:
    """Bool [1, 1, *S]: a box around one of the voxels of ``members`` [*S], or around any voxel if there is none."""
    shape, device = members.shape, members.device
    centre = (torch.rand(members.numel(), device=device) + members.flatten()).argmax()
    inside = torch.ones((1,) * members.ndim, dtype=torch.bool, device=device)
    for axis in reversed(range(members.ndim)):
        size = shape[axis]
        place, centre = centre % size, centre.div(size, rounding_mode="floor")
        fraction = sides[0] + (sides[1] - sides[0]) * torch.rand((), device=device)
        length = (fraction * size).round().long().clamp(min=1)
        start = torch.minimum((place - length.div(2, rounding_mode="floor")).clamp(min=0), size - length)
        line = torch.arange(size, device=device)
        on_axis = (line >= start) & (line < start + length)
        inside = inside & on_axis.view([-1 if other == axis else 1 for other in range(members.ndim)])
    return inside[None, None]
