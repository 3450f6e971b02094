"""Linear attention with rotary positions (arXiv 2104.09864 §3.3): constant state for any length.

Features are turned after the feature map and in the numerator alone, so that the denominator stays positive; weights may be
negative then and need not sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import elu

from rotary.rotate import rotate, unit


class LinearState(NamedTuple):
    """Sums over the tokens that were read; float32, or float64 where the keys are."""

    numerator: Tensor  # (*b, h, d, v) Σ (R_n φ(k_n)) v_nᵀ
    denominator: Tensor  # (*b, h, d) Σ φ(k_n)


def positive(x: Tensor) -> Tensor:
    """elu(x) + 1: the feature map."""
    return elu(x) + 1


def _features(
    queries: Tensor, keys: Tensor, feature: Callable[[Tensor], Tensor], phase: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    turn = unit(phase)
    q, k = (feature(x.to(torch.promote_types(x.dtype, torch.float32))) for x in (queries, keys))
    return q, k, rotate(q, turn), rotate(k, turn)


def linear_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    phase: Tensor,
    *,
    causal: bool = True,
    feature: Callable[[Tensor], Tensor] = positive,
) -> Tensor:
    """The definition, all tokens at once, by n² weights.

    Args:
        queries: (*b, h, n, d).
        keys: (*b, h, n, d).
        values: (*b, h, n, v).
        phase: (*#b, #h, n, r) of `Rotary`.
        causal: a token sees none that follow it.
        feature: positive feature map, channel by channel.

    Returns:
        (*b, h, n, v) in the dtype of the values.
    """
    q, k, turned, turned_keys = _features(queries, keys, feature, phase)
    weights, totals = turned @ turned_keys.mT, q @ k.mT  # (*b, h, n, n)
    if causal:
        weights, totals = weights.tril(), totals.tril()
    return (weights @ values.to(weights.dtype) / totals.sum(-1, keepdim=True)).to(values.dtype)


def recurrent_linear_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    phase: Tensor,
    state: LinearState | None = None,
    *,
    feature: Callable[[Tensor], Tensor] = positive,
) -> tuple[Tensor, LinearState]:
    """Causal `linear_attention` token by token, at constant cost for each.

    Args:
        queries: (*b, h, n, d) of the next n tokens.
        keys: (*b, h, n, d).
        values: (*b, h, n, v).
        phase: (*#b, #h, n, r) at their positions, counted on from those that were read.
        state: of the tokens before; None at the start.
        feature: positive feature map, channel by channel.

    Returns:
        (*b, h, n, v) in the dtype of the values, and the state after them.
    """
    q, k, turned, turned_keys = _features(queries, keys, feature, phase)
    v = values.to(q.dtype)
    numerator, denominator = state or (
        k.new_zeros(*k.shape[:-2], k.shape[-1], v.shape[-1]),
        torch.zeros_like(k[..., 0, :]),
    )
    out = []
    for n in range(q.shape[-2]):
        numerator = numerator + turned_keys[..., n, :, None] * v[..., n, None, :]
        denominator = denominator + k[..., n, :]
        above = (turned[..., n, None, :] @ numerator).squeeze(-2)
        out.append(above / (q[..., n, :] * denominator).sum(-1, keepdim=True))
    result = torch.stack(out, dim=-2) if out else torch.zeros_like(v)
    return result.to(values.dtype), LinearState(numerator, denominator)
