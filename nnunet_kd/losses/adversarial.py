"""Losses of translations between domains: real or not, and the penalty R1.

Source: Oh and Ye, ECCV 2022 (arXiv 2104.05892), after StarGAN v2 (arXiv 1912.01865).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def real_loss(logits: Tensor) -> Tensor:
    """Mean binary cross entropy of logits [B] that should say "real": log(1 + exp(-x))."""
    return F.binary_cross_entropy_with_logits(logits.float(), torch.ones_like(logits, dtype=torch.float32))


def fake_loss(logits: Tensor) -> Tensor:
    """Mean binary cross entropy of logits [B] that should say "not real": log(1 + exp(x))."""
    return F.binary_cross_entropy_with_logits(logits.float(), torch.zeros_like(logits, dtype=torch.float32))


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """1/2 |d logit / d image|^2, summed over an image [C, *S], mean over the batch.

    Args:
        logits: [B], computed from ``images`` in float32 (in half precision the second derivative overflows).
        images: Real ones, [B, C, *S], that require a gradient.

    Source: Mescheder et al., ICML 2018 (arXiv 1801.04406), equation 9 with gamma = 1.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return 0.5 * gradient.float().square().flatten(1).sum(1).mean()
