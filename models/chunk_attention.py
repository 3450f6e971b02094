"""Two softmaxes of different reach over the same queries and keys, mixed by weights: the full and the chunked path."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def shared_logits(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, near: Tensor | None, weights: Tensor, scale: float
) -> Tensor:
    """The definition: logits once, masked twice.

    Args:
        queries: (n, h, t, d).
        keys, values: (n, h, s, d).
        seen, near: (n, 1, t, s) bool masks of the two paths, at least one key in every row; near is None for one path.
        weights: (n, h|1, t|1, p) of the paths, full first; p may exceed the number of paths here.
        scale: of the logits.

    Returns:
        (n, h, t, d).
    """
    logits = (queries * scale) @ keys.mT
    mixed = logits.masked_fill(~seen, -math.inf).softmax(-1).to(values.dtype) @ values * weights[..., :1]
    if near is not None:
        local = logits.masked_fill(~near, -math.inf).softmax(-1).to(values.dtype) @ values
        mixed = mixed + local * weights[..., 1:2]
    return mixed.to(values.dtype)


def fused(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, near: Tensor | None, weights: Tensor, scale: float
) -> Tensor:
    """The same by two calls of scaled_dot_product_attention, so that no matrix of logits is written on a GPU."""
    mixed = scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=scale) * weights[..., :1]
    if near is not None:
        local = scaled_dot_product_attention(queries, keys, values, attn_mask=near, scale=scale)
        mixed = mixed + local * weights[..., 1:2]
    return mixed.to(values.dtype)


def by_device(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, near: Tensor | None, weights: Tensor, scale: float
) -> Tensor:
    """`fused` on a GPU; `shared_logits` on a CPU, where one matrix of logits costs less than two calls."""
    attend = fused if queries.is_cuda else shared_logits
    return attend(queries, keys, values, seen, near, weights, scale)
