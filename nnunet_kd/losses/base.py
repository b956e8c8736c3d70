"""What all distillation losses share: one signature, one shape check, one precision, checked options (our design)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from nnunet_kd.errors import SettingsError
from nnunet_kd.losses.voxels import resize_nearest

Nonlinearity = Literal["softmax", "sigmoid"]


class DistillationLoss(nn.Module, ABC):
    """A scalar that is smallest where the student agrees with the teacher.

    Shapes: B batch, C channels, S two or three spatial axes.

    Numerics: autocast is off inside; float16 and bfloat16 are computed and returned as float32, float64 as float64.
    An empty ``valid`` gives 0 with a gradient of zeros. Nothing waits for the device.
    """

    def forward(
        self, student: Tensor, teacher: Tensor, *, target: Tensor | None = None, valid: Tensor | None = None
    ) -> Tensor:
        """Return the loss over the valid voxels.

        Args:
            student: [B, C, *S], receives the gradient.
            teacher: [B, C, *S], detached here.
            target: [B, 1, *S] integer labels from 0, or [B, R, *S] with a 0/1 map for each of R regions. Values at
                voxels that are not valid do not matter.
            valid: [B, 1, *S], True or 1 where a voxel counts. None means all.

        Raises:
            ValueError: If the shapes do not fit; both are printed.
        """
        if student.shape != teacher.shape or student.ndim not in (4, 5):
            msg = (
                f"{type(self).__name__} compares two tensors [batch, channels, 2 or 3 spatial axes] of one shape, but "
                f"the student has {tuple(student.shape)} and the teacher {tuple(teacher.shape)}; "
                "bring both to the same channels and grid first."
            )
            raise ValueError(msg)
        # Elsewhere (mps) nnU-Net does not use autocast, and torch may refuse even to switch it off.
        has_autocast = student.device.type in ("cuda", "cpu")
        with torch.autocast(student.device.type, enabled=False) if has_autocast else nullcontext():
            precision = torch.promote_types(student.dtype, torch.float32)
            target, valid = self.fit_masks(student, target, valid)
            return self.compute(student.to(precision), teacher.detach().to(precision), target, valid)

    @abstractmethod
    def fit_masks(
        self, student: Tensor, target: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return ``target`` and a boolean ``valid`` on the grid of ``student``, or None for what is not given."""

    @abstractmethod
    def compute(self, student: Tensor, teacher: Tensor, target: Tensor | None, valid: Tensor | None) -> Tensor:
        """Return the loss. Both tensors have one floating type, ``valid`` is boolean; all are on one grid."""


class LogitsLoss(DistillationLoss):
    """A loss between logits of the same label space; ``target`` and ``valid`` are on the grid of the logits.

    Args:
        nonlinearity: "softmax" for labels, of which a voxel has one, or "sigmoid" for regions, which may overlap. With
            "softmax", ``target`` holds the channel's number of each voxel; with "sigmoid", one map per channel.
        temperature: Divides both logits (> 0).
    """

    def __init__(self, *, nonlinearity: Nonlinearity = "softmax", temperature: float = 4.0) -> None:
        super().__init__()
        self.nonlinearity = require_choice("nonlinearity", nonlinearity, ("softmax", "sigmoid"))
        self.temperature = require_number("temperature", temperature, above=0.0)

    def fit_masks(
        self, student: Tensor, target: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Check that the masks have the grid of the logits."""
        one_channel = (student.shape[0], 1, *student.shape[2:])
        if valid is not None and valid.shape != one_channel:
            msg = f"valid has shape {tuple(valid.shape)}, but these logits need {one_channel}."
            raise ValueError(msg)
        expected = one_channel if self.nonlinearity == "softmax" else tuple(student.shape)
        if target is not None and target.shape != expected:
            msg = f"target has shape {tuple(target.shape)}, but {self.nonlinearity} logits need {expected}."
            raise ValueError(msg)
        return target, None if valid is None else valid.bool()


class FeatureLoss(DistillationLoss):
    """A loss between features of one width and grid; ``target`` and ``valid`` may have any resolution."""

    def fit_masks(
        self, student: Tensor, target: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Take the masks' nearest voxels to the grid of the features."""
        batch_size, grid = student.shape[0], student.shape[2:]
        for name, mask in (("target", target), ("valid", valid)):
            if mask is not None and (mask.ndim != student.ndim or mask.shape[0] != batch_size):
                msg = f"{name} has shape {tuple(mask.shape)}, which does not fit features {tuple(student.shape)}."
                raise ValueError(msg)
        if valid is not None and valid.shape[1] != 1:
            msg = f"valid has shape {tuple(valid.shape)}, but it needs one channel."
            raise ValueError(msg)
        target = None if target is None else resize_nearest(target, grid)
        return target, None if valid is None else resize_nearest(valid, grid).bool()


def require_number(name: str, value: float, *, above: float = -math.inf, at_least: float = -math.inf) -> float:
    """Return ``value`` if it is a finite number in range, else raise a :class:`SettingsError` naming the option."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SettingsError(f"Option '{name}' of the loss is {value!r}; it must be a finite number.")
    if value <= above:
        raise SettingsError(f"Option '{name}' of the loss is {value}; it must be greater than {above:g}.")
    if value < at_least:
        raise SettingsError(f"Option '{name}' of the loss is {value}; it must be at least {at_least:g}.")
    return value


def require_integer(name: str, value: int, *, at_least: int) -> int:
    """Return ``value`` if it is a whole number in range, else raise a :class:`SettingsError` naming the option."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingsError(f"Option '{name}' of the loss is {value!r}; it must be a whole number.")
    require_number(name, value, at_least=at_least)
    return value


def require_choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return ``value`` if it is allowed, else raise a :class:`SettingsError` naming the option and what is allowed."""
    if value not in allowed:
        raise SettingsError(f"Option '{name}' of the loss is {value!r}; allowed are: {', '.join(allowed)}.")
    return value


def require_flag(name: str, value: bool) -> bool:
    """Return ``value`` if it is true or false, else raise a :class:`SettingsError` naming the option."""
    if not isinstance(value, bool):
        raise SettingsError(f"Option '{name}' of the loss is {value!r}; it must be true or false.")
    return value
