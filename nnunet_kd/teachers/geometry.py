"""From the student's patch to the teacher's input and back, where that follows exactly from both plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor
from torch.nn.functional import interpolate

from nnunet_kd.errors import TeacherError

# channels under these schemes do not depend on the plans' statistics, so equal schemes mean equal intensities
INDEPENDENT_SCHEMES = (
    "ZScoreNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
    "GlobalZScoreNormalization",
)
MASKED_SCHEMES = ("ZScoreNormalization",)  # the only stock scheme that looks at the mask


@dataclass(frozen=True)
class ChannelMap:
    """One teacher channel: student channel ``index``, then ``clip(scale * x + shift, low, high)``."""

    index: int
    scale: float = 1.0
    shift: float = 0.0
    low: float = -float("inf")
    high: float = float("inf")

    @property
    def is_identity(self) -> bool:
        """Whether intensities stay as they are."""
        return self.scale == 1.0 and self.shift == 0.0 and self.low == -float("inf") and self.high == float("inf")


@dataclass(frozen=True)
class InputMap:
    """All channels, and the factor by which the teacher's grid is finer than the student's per axis."""

    channels: tuple[ChannelMap, ...]
    zoom: tuple[float, ...]

    def __call__(self, image: Tensor) -> Tensor:
        """Student's image [B, C, *S] -> teacher's input [B, C', *S']."""
        indices = [channel.index for channel in self.channels]
        mapped = image if indices == list(range(image.shape[1])) else image[:, indices]
        if not all(channel.is_identity for channel in self.channels):
            parts = [
                (mapped[:, i : i + 1] * channel.scale + channel.shift).clamp(channel.low, channel.high)
                for i, channel in enumerate(self.channels)
            ]
            mapped = torch.cat(parts, 1)
        if any(factor != 1.0 for factor in self.zoom):
            shape = [max(1, round(size * factor)) for size, factor in zip(image.shape[2:], self.zoom, strict=True)]
            mapped = interpolate(mapped, shape, mode="trilinear" if len(shape) == 3 else "bilinear")
        return mapped

    def restore(self, logits: Tensor, shape: Sequence[int]) -> Tensor:
        """Teacher's logits [B, C, *S'] -> the student's grid ``shape``."""
        if list(logits.shape[2:]) == list(shape):
            return logits
        return interpolate(logits, list(shape), mode="trilinear" if len(shape) == 3 else "bilinear")


def input_map(
    student_plans: PlansManager,
    student: ConfigurationManager,
    student_channels: Sequence[str],
    teacher_plans: PlansManager,
    teacher: ConfigurationManager,
    teacher_channels: Sequence[str],
) -> InputMap:
    """Work out the map between two plans.

    Channels are matched by name, and in order where several have one name (as those of an RGB image). Equal schemes
    that do not depend on statistics need no map; CT normalisation is affine between two sets of statistics (with the
    teacher's clipping); spacing is interpolated.

    Raises:
        TeacherError: A channel that the teacher needs is missing, the schemes differ, the axes are ordered differently,
            or one configuration is 2D and the other 3D.
    """
    if len(student.patch_size) != len(teacher.patch_size):
        raise TeacherError("A 2D and a 3D configuration cannot teach each other. Choose the same kind for both.")
    if list(student_plans.transpose_forward) != list(teacher_plans.transpose_forward):
        raise TeacherError(
            f"The teacher's plans order the axes as {teacher_plans.transpose_forward}, the student's as "
            f"{student_plans.transpose_forward}. Plan the student with the teacher's plans "
            f"(nnUNetv2_move_plans_between_datasets)."
        )
    channels = []
    for t, name in enumerate(teacher_channels):
        same = [index for index, own in enumerate(student_channels) if own == name]
        earlier = list(teacher_channels[:t]).count(name)
        if earlier >= len(same):
            often = f" {earlier + 1} times" if earlier else ""
            raise TeacherError(
                f"The teacher needs the channel '{name}'{often}, but the student's channels are "
                f"{', '.join(student_channels)}. Rename the channel in dataset.json if it is the same one."
            )
        s = same[earlier]
        channels.append(_channel_map(name, s, student_plans, student, t, teacher_plans, teacher))
    zoom = tuple(float(a) / float(b) for a, b in zip(student.spacing, teacher.spacing, strict=True))
    return InputMap(tuple(channels), tuple(1.0 if abs(factor - 1) < 1e-3 else factor for factor in zoom))


def _channel_map(
    name: str,
    s: int,
    student_plans: PlansManager,
    student: ConfigurationManager,
    t: int,
    teacher_plans: PlansManager,
    teacher: ConfigurationManager,
) -> ChannelMap:
    schemes = student.normalization_schemes[s], teacher.normalization_schemes[t]
    if schemes[0] != schemes[1]:
        raise TeacherError(
            f"Channel '{name}' is normalised by {schemes[0]} for the student and by {schemes[1]} for the teacher; no "
            f"exact map exists. Plan the student with the teacher's plans (nnUNetv2_move_plans_between_datasets)."
        )
    if bool(student.use_mask_for_norm[s]) != bool(teacher.use_mask_for_norm[t]) and schemes[0] in MASKED_SCHEMES:
        raise TeacherError(
            f"Channel '{name}' is normalised inside a mask for one of student and teacher and in the whole image for "
            f"the other (use_mask_for_norm in their plans); no exact map exists. Plan the student with the teacher's "
            f"plans (nnUNetv2_move_plans_between_datasets)."
        )
    if schemes[0] in INDEPENDENT_SCHEMES:
        return ChannelMap(s)
    if schemes[0] != "CTNormalization":
        raise NotImplementedError(
            f"Teaching across plans is not supported for {schemes[0]} (channel '{name}'). Plan the student with the "
            f"teacher's plans (nnUNetv2_move_plans_between_datasets)."
        )
    own = student_plans.foreground_intensity_properties_per_channel[str(s)]
    other = teacher_plans.foreground_intensity_properties_per_channel[str(t)]
    keys = ("mean", "std", "percentile_00_5", "percentile_99_5")
    if all(own[key] == other[key] for key in keys):
        return ChannelMap(s)
    own_std, other_std = max(own["std"], 1e-8), max(other["std"], 1e-8)
    return ChannelMap(
        s,
        scale=own_std / other_std,
        shift=(own["mean"] - other["mean"]) / other_std,
        low=(other["percentile_00_5"] - other["mean"]) / other_std,
        high=(other["percentile_99_5"] - other["mean"]) / other_std,
    )
