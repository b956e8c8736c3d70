"""What every teacher returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class TeacherOutput:
    """Targets for one batch, without gradient.

    ``logits``: [B, C, *S] on the student's grid in the label space in which the two are compared, or None.
    ``features``: level name to [B, C, *s].
    """

    logits: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)
