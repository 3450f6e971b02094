"""What attention heads do with their frequencies: functions of captured queries and keys (b, h, n, d) before rotation.

After arXiv 2410.06205, with the decay bound of arXiv 2104.09864. Pair i is the channels (2i, 2i + 1); pairs that don't rotate
count too, with the highest indices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotary.rotate import rotate, unit


def _pairs(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))  # (…, r, 2)


def _normalised(rows: Tensor) -> Tensor:
    return rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def frequency_norms(x: Tensor) -> Tensor:
    """Mean norm of each pair of channels, rows summing to 1: (b, h, n, d) → (h, d/2).

    ‖q_i‖‖k_i‖ bounds what pair i can add to a logit.
    """
    return _normalised(_pairs(x).norm(dim=-1).mean((0, 2)))


def frequency_contributions(
    queries: Tensor, keys: Tensor, query_phase: Tensor, key_phase: Tensor, seen: Tensor
) -> Tensor:
    """Mean over what is seen of |what pair i adds to q·k|: (h, d/2), zeros if nothing is.

    Args:
        queries: (b, h, t, d) before rotation.
        keys: (b, h, s, d) before rotation.
        query_phase: (h|1, t, r) of `Rotary`, 2r ≤ d.
        key_phase: (h|1, s, r).
        seen: (t, s) bool, which keys a query may look at.
    """
    turned, turned_keys = (
        _pairs(rotate(x, unit(phase))) for x, phase in ((queries, query_phase), (keys, key_phase))
    )  # (b, h, t, r, 2)
    count = (len(queries) * seen.sum()).clamp(min=1)
    means = []
    for q, k in zip(turned.unbind(-2), turned_keys.unbind(-2), strict=True):  # a pair at a time: (b, h, t, s) is large
        means.append((q @ k.mT).abs().masked_fill(~seen, 0.0).sum((0, 2, 3)) / count)
    return torch.stack(means, dim=-1)


def frequency_share(queries: Tensor, keys: Tensor, query_phase: Tensor, key_phase: Tensor, seen: Tensor) -> Tensor:
    """`frequency_contributions` with rows summing to 1: the part of a head's logits that each pair makes, (h, d/2)."""
    return _normalised(frequency_contributions(queries, keys, query_phase, key_phase, seen))


def frequency_centroid(share: Tensor) -> Tensor:
    """Σ_i i · share_i / r: (…, r) → (…) from 0, the highest frequency alone, to nearly 1, the lowest."""
    index = torch.arange(share.shape[-1], dtype=share.dtype, device=share.device)
    return (share * index).sum(-1) / share.shape[-1]


def positional_score(attention: Tensor, distances: int) -> Tensor:
    """Mean attention to the key 0, 1, … tokens back: (b, h, n, n) → (h, distances).

    A diagonal head has most of it at 0, a previous-token head at 1.

    Raises:
        ValueError: there are fewer than `distances` tokens.
    """
    if not 0 < distances <= attention.shape[-1]:
        raise ValueError(f"positional_score: distances={distances}, the attention has {attention.shape[-1]} tokens")
    means = [attention.diagonal(-back, dim1=-2, dim2=-1).mean((0, 2)) for back in range(distances)]
    return torch.stack(means, dim=-1)


def bound_ratio(queries: Tensor, keys: Tensor) -> Tensor:
    """Mean of q_n·k_n / (‖q_n‖‖k_n‖), which no rotation changes: two (b, h, n, d) → (h,); near 1 in a diagonal head."""
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (queries, keys))
    return torch.cosine_similarity(q, k, dim=-1).mean((0, 2))


def decay_bound(frequencies: Tensor, distances: Tensor) -> Tensor:
    """Mean over j = 1 … r of |Σ_{i<j} e^{i m θ_i}|: (r,) and (m,) → (m,) float64 (arXiv 2104.09864 §3.4.3).

    Times the largest step between neighbouring pairs' q_i k_i* and r it bounds a logit. The bound falls with distance, not
    the logits themselves.
    """
    angle = distances.double()[:, None] * frequencies.double()
    return torch.polar(torch.ones_like(angle), angle).cumsum(-1).abs().mean(-1)
