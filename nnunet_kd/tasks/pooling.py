"""Pooling that adds up: pooling a whole map equals combining the pooled parts of any partition of it.

So a case's value from all its tiles is what one pass over all their positions would have given. A pooled value comes
with the logarithm of its weight; logarithms, because attention's weights span many orders of magnitude. Our design.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from nnunet_kd.errors import SettingsError


class Pooling(nn.Module, ABC):
    """Pools [B, C, *S] to a value [B, C] and its log weight [B], at least in float32."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value [B, C] and the log weight [B] of all positions of ``features`` [B, C, *S]."""
        precise = features.to(torch.promote_types(features.dtype, torch.float32))
        return self.pool(precise.flatten(2), self.scores(features))

    def scores(self, features: Tensor) -> Tensor:
        """Log weight of each position, [B, positions]."""
        return torch.zeros_like(features[:, 0].flatten(1), dtype=torch.promote_types(features.dtype, torch.float32))

    def combine(self, values: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Combine T parts: values [T, B, C] and log weights [T, B] to the value [B, C] and log weight [B] of all."""
        # a part is to the whole what a position is to a part
        return self.pool(values.permute(1, 2, 0), log_weights.T)

    @abstractmethod
    def pool(self, values: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Pool ``values`` [B, C, N] that weigh exp(``scores`` [B, N])."""


class MeanPooling(Pooling):
    """Value: the mean of the features over positions. Weight: the number of positions."""

    def pool(self, values: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean."""
        return torch.einsum("bcn,bn->bc", values, scores.softmax(1)), scores.logsumexp(1)


class AttentionPooling(MeanPooling):
    """Value: the mean of the features, weighted by the softmax of a score per position. Weight: sum of exp(score).

    The score is a 1x1 convolution without bias (softmax would not see one), zero at first, which is mean pooling.

    Source: attention-based multiple-instance pooling, Ilse et al., ICML 2018, with a linear score.
    """

    def __init__(self, channels: int, dimension: int) -> None:
        super().__init__()
        self.score = {2: nn.Conv2d, 3: nn.Conv3d}[dimension](channels, 1, kernel_size=1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as mean pooling."""
        nn.init.zeros_(self.score.weight)

    def scores(self, features: Tensor) -> Tensor:
        """The convolution's answer at each position."""
        score: Tensor = self.score(features)
        return score.flatten(1).to(torch.promote_types(features.dtype, torch.float32))


class LogSumExpPooling(Pooling):
    """Value: (1/r) log mean exp(r f), between the mean (r to 0) and the maximum (r to infinity). Weight: positions.

    Args:
        sharpness: r > 0. The features of nnU-Net's encoders have about unit variance, for which 2 lies midway.

    Source: Pinheiro & Collobert, CVPR 2015, eq. 6.
    """

    def __init__(self, sharpness: float = 2.0) -> None:
        super().__init__()
        self.sharpness = sharpness

    def pool(self, values: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean of exp(r f), in the log domain."""
        log_weight = scores.logsumexp(1)
        total = (self.sharpness * values + scores[:, None]).logsumexp(2)
        return (total - log_weight[:, None]) / self.sharpness, log_weight


def build_pooling(kind: str, channels: int, dimension: int) -> Pooling:
    """Return the pooling called "mean", "lse" (log-sum-exp) or "attention" for maps of ``channels`` channels.

    Raises:
        SettingsError: For another name.
    """
    if kind == "attention":
        return AttentionPooling(channels, dimension)
    if kind == "lse":
        return LogSumExpPooling()
    if kind == "mean":
        return MeanPooling()
    raise SettingsError(f"Unknown pooling '{kind}' of the classification head; allowed are: mean, lse, attention.")
