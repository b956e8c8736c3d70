"""The moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class MovingAverage:
    """Weights w' <- d w' + (1 - d) w after every step, d = min(1 - 1 / (t + 1), decay); buffers are copied.

    Step t counts from 0, so that the first steps copy the network and the average is never that of untrained weights.

    Args:
        followed: The network that trains.
        decay: In [0, 1).

    Source: Tarvainen and Valpola, NeurIPS 2017 (arXiv 1703.01780); the warm-up is that of their code.
    """

    def __init__(self, followed: nn.Module, decay: float) -> None:
        self.followed = followed
        self.network: Any = copy.deepcopy(followed).eval().requires_grad_(False)
        self.decay = decay
        self.step = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network."""
        decay = min(1 - 1 / (self.step + 1), self.decay)
        followed = [weight.detach() for weight in self.followed.parameters()]
        torch._foreach_lerp_(list(self.network.parameters()), followed, 1 - decay)
        for mine, other in zip(self.network.buffers(), self.followed.buffers(), strict=True):
            mine.copy_(other)
        self.step += 1

    def state(self) -> dict[str, Any]:
        """Its weights and how many steps it has followed."""
        return {"step": self.step, "weights": self.network.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.step = state["step"]
        self.network.load_state_dict(state["weights"])
