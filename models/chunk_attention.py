"""Two softmaxes of different reach over the same queries and keys, mixed by weights: the full and the chunked path."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def shared_logits(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    seen: Tensor,
    near: Tensor | None,
    weights: Tensor,
    scale: float,
) -> Tensor:
    """The definition: logits once, a softmax for each path, and one sum of the values.

    Args:
        queries: (n, h, t, d).
        keys, values: (n, h, s, d), each in one or several parts that follow one another along s.
        seen: (n, 1, t, s) bool mask of the full path, at least one key in every row.
        near: (n, 1, t, s') the same of the chunked path, of the last s' keys; None for one path.
        weights: (n, h|1, t|1, p) of the paths, full first; p may exceed the number of paths here.
        scale: of the logits.

    Returns:
        (n, h, t, d).
    """
    if queries.shape[-2] >= queries.shape[-1]:  # else a row of logits is shorter than the keys are
        keys, values = (_joined(keys, -2),), (_joined(values, -2),)
    scaled = queries * scale
    logits = _joined([scaled @ part.mT for part in keys], -1)
    shares = (logits + _bias(seen)).softmax(-1) * weights[..., :1]
    if near is not None:
        within = near.shape[-1]
        local = (logits[..., -within:] + _bias(near)).softmax(-1) * weights[..., 1:2]
        shares = shares + pad(local, (logits.shape[-1] - within, 0))
    parts = shares.to(values[0].dtype).split([part.shape[-2] for part in values], -1)
    mixed = parts[0] @ values[0]
    for share, value in zip(parts[1:], values[1:], strict=True):
        mixed = mixed + share @ value
    return mixed


def fused(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    seen: Tensor,
    near: Tensor | None,
    weights: Tensor,
    scale: float,
) -> Tensor:
    """The same by two calls of scaled_dot_product_attention, so that no matrix of logits is written on a GPU."""
    key, value = _joined(keys, -2), _joined(values, -2)
    mixed = scaled_dot_product_attention(queries, key, value, attn_mask=seen, scale=scale) * weights[..., :1]
    if near is not None:
        key, value = (part[..., -near.shape[-1] :, :] for part in (key, value))
        local = scaled_dot_product_attention(queries, key, value, attn_mask=near, scale=scale)
        mixed = mixed + local * weights[..., 1:2]
    return mixed.to(value.dtype)


def by_device(
    queries: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    seen: Tensor,
    near: Tensor | None,
    weights: Tensor,
    scale: float,
) -> Tensor:
    """`fused` on a GPU; `shared_logits` on a CPU, where one matrix of logits costs less than two calls."""
    attend = fused if queries.is_cuda else shared_logits
    return attend(queries, keys, values, seen, near, weights, scale)


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), axis)


def _bias(mask: Tensor) -> Tensor:
    """0 where a key is seen and −∞ elsewhere: a sum has no gradient to mask, as filling has."""
    return torch.where(mask, 0.0, -math.inf)
