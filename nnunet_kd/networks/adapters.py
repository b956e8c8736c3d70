"""Projectors from the student's feature width to the teacher's (training only, never in ``network_weights``)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import interpolate


class Projector(nn.Module):
    """A trainable 1x1(x1) convolution, after which both features are brought to the coarser grid.

    Shapes: student [B, student_channels, *s], teacher [B, teacher_channels, *t] ->
    both [B, teacher_channels, *coarser of s and t].

    Source: FitNets (Romero et al., ICLR 2015) use a convolutional regressor; coarser grid: our design.
    """

    def __init__(self, dimension: int, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[dimension]
        self.convolution = convolution(student_channels, teacher_channels, kernel_size=1)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Project ``student`` and bring both to one grid."""
        student, teacher = to_common_grid(student, teacher)
        return self.convolution(student), teacher


def to_common_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Bring features [B, C, *s] and [B, D, *t] to the coarser of both grids."""
    shape = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return resize(student, shape), resize(teacher.to(student.dtype), shape)


def resize(feature: Tensor, shape: list[int]) -> Tensor:
    """Average ``feature`` [B, C, *s] down to ``shape``; returns it unchanged if it has that shape."""
    if list(feature.shape[2:]) == shape:
        return feature
    return interpolate(feature, shape, mode="area")
