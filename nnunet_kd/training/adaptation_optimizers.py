"""The optimizers of adversarial training: one per network, steps that skip what is not finite, rates by stage.

Source of betas, decay and rates: the released code of Oh and Ye, ECCV 2022 (arXiv 2104.05892).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_kd.networks.adaptive_norm import ConditionalInstanceNorm
from nnunet_kd.training.base import MAX_GRADIENT_NORM

BETAS, WEIGHT_DECAY = (0.0, 0.99), 1e-4
FALLS, FACTOR = (0.55, 0.7), 0.1  # of a stage, at which the rates are multiplied by the factor


def adam(network: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Adam for a network. Scales and shifts per code do not decay: Adam would wear down those that are not in use."""
    norms = [module for module in network.modules() if isinstance(module, ConditionalInstanceNorm)]
    per_code = {id(weight): weight for norm in norms for weight in norm.parameters()}
    others = [weight for weight in network.parameters() if id(weight) not in per_code]
    groups: list[dict[str, Any]] = [{"params": others, "weight_decay": WEIGHT_DECAY}]
    if per_code:
        groups.append({"params": list(per_code.values()), "weight_decay": 0.0})
    for group in groups:
        group["initial_lr"] = learning_rate
    return torch.optim.Adam(groups, lr=learning_rate, betas=BETAS)


class StageSchedule:
    """Learning rates fall to a tenth after 55% of each stage, and again after 70%.

    Args:
        optimizers: All of them.
        stages: First epoch of every stage, and the number of all epochs.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], stages: Sequence[int]) -> None:
        self.optimizers, self.stages = list(optimizers), list(stages)

    def step(self, epoch: int) -> None:
        """Set the rates of an epoch, as nnU-Net's scheduler does."""
        first = max(start for start in self.stages[:-1] if start <= epoch)
        after = next(start for start in self.stages if start > first)
        done = (epoch - first) / (after - first)
        factor = FACTOR ** sum(done >= fall for fall in FALLS)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor


class AdversarialSteps:
    """Backward passes and steps of some of the optimizers, each clipped by itself.

    A step with a gradient that is not finite is left out: by nnU-Net's gradient scaler where there is one, else here.
    Steps are counted per optimizer, by a hook, so that nothing has to wait for the scaler.

    Args:
        optimizers: By name.
        scaler: nnU-Net's; None without mixed precision.
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer], scaler: torch.amp.GradScaler | None) -> None:
        self.optimizers, self.scaler = optimizers, scaler
        self.num_asked = self.num_taken = 0
        for optimizer in optimizers.values():
            optimizer.register_step_post_hook(self._count)

    def __call__(self, loss: Tensor, *names: str) -> None:
        """Differentiate ``loss`` and step the named optimizers."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        chosen = [self.optimizers[name] for name in names]
        self.num_asked += len(chosen)
        if self.scaler is None:
            loss.backward()
            norms = torch.stack([_clip(optimizer) for optimizer in chosen])
            if bool(norms.isfinite().all()):
                for optimizer in chosen:
                    optimizer.step()
            return
        self.scaler.scale(loss).backward()
        for optimizer in chosen:
            self.scaler.unscale_(optimizer)
            _clip(optimizer)
            self.scaler.step(optimizer)
        self.scaler.update()

    def _count(self, *_: Any) -> None:
        self.num_taken += 1

    def start_counting(self) -> None:
        """An epoch begins."""
        self.num_asked = self.num_taken = 0


def _clip(optimizer: torch.optim.Optimizer) -> Tensor:
    """Clip all of an optimizer's gradients together; returns their norm before."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return torch.nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
