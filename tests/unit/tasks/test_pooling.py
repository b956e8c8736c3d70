"""Pooling a map at once, and by hand, and in parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_kd.errors import SettingsError
from nnunet_kd.tasks.pooling import Pooling, build_pooling

KINDS = ("mean", "lse", "attention")
BATCH, CHANNELS = 2, 3


def make_pooling(kind: str, dimension: int = 2) -> Pooling:
    pooling = build_pooling(kind, CHANNELS, dimension).double()
    for weight in pooling.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    return pooling


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dimension", [2, 3])
def test_value_and_weight_equal_numpy_by_hand(kind: str, dimension: int) -> None:
    pooling = make_pooling(kind, dimension)
    features = torch.randn(BATCH, CHANNELS, 4, 3, 5)[..., : 5 if dimension == 3 else 1].double()
    features = features if dimension == 3 else features[..., 0]
    value, log_weight = pooling(features)
    flat = features.flatten(2).numpy()
    if kind == "lse":
        expected, weight = np.log(np.exp(2.0 * flat).mean(2)) / 2.0, np.full(BATCH, flat.shape[2])
    else:
        score = np.zeros_like(flat[:, 0])
        if kind == "attention":
            score = np.einsum("c,bcn->bn", next(pooling.parameters()).detach().numpy().ravel(), flat)
        weight = np.exp(score).sum(1)
        expected = (np.exp(score)[:, None] * flat).sum(2) / weight[:, None]
    np.testing.assert_allclose(value.detach().numpy(), expected)
    np.testing.assert_allclose(log_weight.detach().numpy(), np.log(weight))


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    parts=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_any_partition_combines_to_the_whole_in_any_nesting(
    kind: str, parts: list[list[int]], scale: float, seed: int
) -> None:
    pooling = make_pooling(kind)
    pieces = [[scale * torch.randn(BATCH, CHANNELS, 1, width).double() for width in part] for part in parts]
    whole = pooling(torch.cat([piece for part in pieces for piece in part], 3))
    inner = [
        pooling.combine(*(torch.stack(statistic) for statistic in zip(*map(pooling, part), strict=True)))
        for part in pieces
    ]
    outer = pooling.combine(*(torch.stack(statistic) for statistic in zip(*inner, strict=True)))
    for combined, expected in zip(outer, whole, strict=True):
        torch.testing.assert_close(combined, expected)


def test_half_precision_is_pooled_in_float32_and_does_not_overflow() -> None:
    features = torch.full((1, CHANNELS, 4, 4), 300.0, dtype=torch.float16)
    for kind in ("mean", "lse"):
        value, log_weight = build_pooling(kind, CHANNELS, 2)(features)
        assert value.dtype == log_weight.dtype == torch.float32
        torch.testing.assert_close(value, torch.full_like(value, 300.0))


def test_untrained_attention_is_mean_pooling_and_can_learn() -> None:
    features = torch.randn(BATCH, CHANNELS, 4, 4)
    attention = build_pooling("attention", CHANNELS, 2)
    value, _ = attention(features)
    torch.testing.assert_close(value, features.mean((2, 3)))
    value.square().sum().backward()
    assert next(attention.parameters()).grad.abs().min() > 0


def test_unknown_pooling_names_the_allowed_ones() -> None:
    with pytest.raises(SettingsError, match=r"'max'.*mean, lse, attention"):
        build_pooling("max", CHANNELS, 2)
