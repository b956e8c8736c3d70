"""The factor on a term's weight over the training (our design)."""

from __future__ import annotations

import math

from nnunet_kd.errors import SettingsError

SCHEDULES = ("constant", "linear", "cosine")


def schedule_weight(kind: str, progress: float, *, warmup: float = 0.1, start: float = 0.0) -> float:
    """Return a factor in [0, 1].

    Args:
        kind: "constant" is 1 throughout. "linear" and "cosine" (half a period) rise from 0 at ``start`` to 1 at
            ``warmup`` and stay there.
        progress: Fraction of the training that is done, in [0, 1].
        warmup: Fraction of the training at which the ramp ends.
        start: Fraction of the training at which the ramp begins.

    Raises:
        SettingsError: If the kind is unknown.
    """
    if kind not in SCHEDULES:
        raise SettingsError(f"Unknown schedule '{kind}'; allowed are: {', '.join(SCHEDULES)}.")
    if kind == "constant" or progress >= warmup:
        return 1.0
    if progress <= start:
        return 0.0
    ramp = (progress - start) / (warmup - start)
    return ramp if kind == "linear" else 0.5 * (1 - math.cos(math.pi * ramp))
