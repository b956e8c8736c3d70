"""The factor on a term's weight over the training (our design)."""

from __future__ import annotations

import math

from nnunet_kd.errors import SettingsError

SCHEDULES = ("constant", "linear", "cosine", "gaussian")


def schedule_weight(
    kind: str, progress: float, *, warmup: float = 0.1, start: float = 0.0, final: float = 1.0
) -> float:
    """Return a factor in [0, 1].

    Args:
        kind: "constant" is 1 throughout. "linear" and "cosine" (half a period) rise from 0 at ``start`` to 1 at
            ``warmup``. "gaussian" is exp(-5 (1 - x)^2) between the two, from 0.007 right after ``start`` (Laine and
            Aila, ICLR 2017, arXiv 1610.02242).
        progress: Fraction of the training that is done, in [0, 1].
        warmup: Fraction of the training at which the ramp ends.
        start: Fraction of the training at which the ramp begins.
        final: What the factor falls to by half a cosine period between the ramp (or the beginning, if it is
            constant) and the training's end; 1 stays.

    Raises:
        SettingsError: If the kind is unknown.
    """
    if kind not in SCHEDULES:
        raise SettingsError(f"Unknown schedule '{kind}'; allowed are: {', '.join(SCHEDULES)}.")
    ramp_end = 0.0 if kind == "constant" else warmup
    if progress >= ramp_end:
        fall = (progress - ramp_end) / (1 - ramp_end) if ramp_end < 1 else 0.0
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * fall))
    if progress <= start:
        return 0.0
    ramp = (progress - start) / (warmup - start)
    if kind == "linear":
        return ramp
    return math.exp(-5 * (1 - ramp) ** 2) if kind == "gaussian" else 0.5 * (1 - math.cos(math.pi * ramp))
