"""A logits loss at every deep supervision level, taught by the teacher's logits at full resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


def deep_supervision_loss(
    loss: nn.Module,
    students: Sequence[Tensor],
    teacher: Tensor,
    weights: Sequence[float],
    *,
    targets: Sequence[Tensor] | None = None,
    valids: Sequence[Tensor] | None = None,
) -> Tensor:
    """Return the weighted sum of ``loss`` over the levels.

    At a coarser level the teacher's logits are averaged over the voxels that a coarse voxel covers (adaptive average
    pooling, in float32), so that one forward pass of the teacher serves all levels and its topology does not matter.
    Levels of weight 0 are skipped.

    Args:
        loss: A loss of ``LOSSES["logits"]``.
        students: Per level, [B, C, *s].
        teacher: Logits [B, C, *S] at full resolution.
        weights: Per level; nnU-Net's sum to 1.
        targets: Per level, as ``loss`` takes them.
        valids: Per level, [B, 1, *s].

    Raises:
        ValueError: If the sequences differ in length.

    Source: deep supervision as in nnU-Net; averaging the teacher: our design.
    """
    num_levels = len(students)
    for name, sequence in (("weights", weights), ("targets", targets), ("valids", valids)):
        if sequence is not None and len(sequence) != num_levels:
            raise ValueError(f"There are {num_levels} levels of student logits, but {len(sequence)} {name}.")
    total = teacher.new_zeros((), dtype=torch.promote_types(teacher.dtype, torch.float32))
    for level, (student, weight) in enumerate(zip(students, weights, strict=True)):
        if weight == 0:
            continue
        target = None if targets is None else targets[level]
        valid = None if valids is None else valids[level]
        total = total + weight * loss(student, _average(teacher, student.shape[2:]), target=target, valid=valid)
    return total


@torch.no_grad()
def _average(logits: Tensor, grid: Sequence[int]) -> Tensor:
    if logits.shape[2:] == tuple(grid):
        return logits
    return interpolate(logits.to(torch.promote_types(logits.dtype, torch.float32)), tuple(grid), mode="area")
