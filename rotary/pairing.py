"""The two ways to pair channels and the lossless way between them.

Interleaved, as here, in the papers, RoPE-ViT and FLUX: pair t is channels (2t, 2t + 1). Halves, as in transformers and
GPT-NeoX: (t, t + r). They differ by a permutation of the rotated channels, which the rows of W_q and W_k absorb.
"""

from __future__ import annotations

import torch
from torch import Tensor


def halves_from_interleaved(head_dim: int, rotated: int | None = None) -> Tensor:
    """Channel order (head_dim,) int64 with x_halves = x_interleaved[order]; the first `rotated` channels take part."""
    rotated = head_dim if rotated is None else rotated
    if rotated % 2 or not 0 <= rotated <= head_dim:
        raise ValueError(f"pairing: rotated={rotated} must be even and at most head_dim={head_dim}")
    turning = torch.arange(rotated).view(-1, 2).t().flatten()
    return torch.cat((turning, torch.arange(rotated, head_dim)))


def interleaved_from_halves(head_dim: int, rotated: int | None = None) -> Tensor:
    """The inverse order: x_interleaved = x_halves[order]."""
    return halves_from_interleaved(head_dim, rotated).argsort()


def to_halves(x: Tensor, rotated: int | None = None) -> Tensor:
    """Channels (…, d) from interleaved to half pairs: for cached keys, cosines repeated per channel, or activations."""
    return x[..., halves_from_interleaved(x.shape[-1], rotated).to(x.device)]


def to_interleaved(x: Tensor, rotated: int | None = None) -> Tensor:
    """Channels (…, d) from half to interleaved pairs."""
    return x[..., interleaved_from_halves(x.shape[-1], rotated).to(x.device)]


def rows_to_interleaved(projection: Tensor, head_dim: int, rotated: int | None = None) -> Tensor:
    """Rows of W_q or W_k (heads · head_dim, …), or its bias, from half to interleaved pairs."""
    return _rows(projection, head_dim, interleaved_from_halves(head_dim, rotated))


def rows_to_halves(projection: Tensor, head_dim: int, rotated: int | None = None) -> Tensor:
    """Rows of W_q or W_k (heads · head_dim, …), or its bias, from interleaved to half pairs."""
    return _rows(projection, head_dim, halves_from_interleaved(head_dim, rotated))


def _rows(projection: Tensor, head_dim: int, order: Tensor) -> Tensor:
    if projection.shape[0] % head_dim:
        raise ValueError(f"pairing: {projection.shape[0]} rows don't divide by head_dim={head_dim}")
    return projection.unflatten(0, (-1, head_dim))[:, order.to(projection.device)].flatten(0, 1)
