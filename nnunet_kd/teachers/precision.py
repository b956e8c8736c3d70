"""Whether a teacher computes in bfloat16 on this CPU: only if that is faster and says the same (our design)."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from nnunet_kd.teachers.output import TeacherOutput

NUM_TIMINGS = 3  # the fastest counts, because machines are noisy
MAX_DISAGREEMENT = 0.01  # share of voxels whose most likely class may differ from float32
MAX_ERROR = 0.02  # where there is no segmentation: norm of the difference to float32, relative to the norm


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_bf16(teach: Callable[[bool], TeacherOutput], regions: bool) -> tuple[bool, str]:
    """Try both precisions on one batch.

    Args:
        teach: Teaches the batch, in bfloat16 if told so.
        regions: Whether the logits are of regions (sigmoid).

    Returns:
        Whether to use bfloat16, and a sentence that says why.
    """
    seconds, outputs = [], []
    for use in (False, True):
        teach(use)  # warm up: the first call packs weights
        times = []
        for _ in range(NUM_TIMINGS):
            start = time.perf_counter()
            output = teach(use)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
        outputs.append(output)
    first, second = outputs
    if first.logits is not None and second.logits is not None:
        decisions = [logits > 0 if regions else logits.argmax(1) for logits in (first.logits, second.logits)]
        difference, allowed = (decisions[0] != decisions[1]).float().mean().item(), MAX_DISAGREEMENT
        where = f"on {difference:.2%} of voxels"
    else:
        pairs = zip(_tensors(first), _tensors(second), strict=True)
        difference, allowed = max(_relative_error(own, other) for own, other in pairs), MAX_ERROR
        where = f"by {difference:.2%} of its outputs' norm"
    use_bf16 = difference <= allowed and seconds[1] < seconds[0]
    return use_bf16, (
        f"{'bfloat16' if use_bf16 else 'float32'} on this CPU (bfloat16 differs {where}, {seconds[1]:.3f} s against "
        f"{seconds[0]:.3f} s per batch)"
    )


def _tensors(output: TeacherOutput) -> list[Tensor]:
    boxes = () if output.boxes is None else (part for parts in output.boxes for part in parts)
    return [*output.features.values(), *output.classification.values(), *boxes]


def _relative_error(exact: Tensor, other: Tensor) -> float:
    return float((other.float() - exact.float()).norm() / exact.float().norm().clamp(min=1e-12))
