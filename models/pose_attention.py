"""Attention of agents and map whose poses turn queries and keys (DRoPE, arXiv 2503.15029), in linear memory by SDPA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rotary import Rotary, rotate, unit

_IN_CACHE = 2**17  # distances at once on a CPU: four times as fast as all in one


class Keys(NamedTuple):
    """What attention reads, made once and worth keeping: key and value (*b, h, n, d), and where they stand, if pairs ask.

    A rotated key depends on its own pose alone, so it serves every later query; then `place` is None.
    """

    key: Tensor
    value: Tensor
    place: Tensor | None


class Visible(NamedTuple):
    """Which keys a query sees: `bias` (*b, q|1, n) as SDPA takes it, bool or added to the logits; `some` (*b, q|1, 1) bool,
    whether it sees any. A query that sees none has an open `bias`, so that its softmax is finite; attention answers zero."""

    bias: Tensor
    some: Tensor


class PoseAttention(Protocol):
    """What the layers of the agent model need of an attention."""

    extra_parameters: int

    def keys(self, x: Tensor, place: Tensor | None) -> Keys: ...
    def __call__(self, x: Tensor, place: Tensor | None, keys: Keys, seen: Visible | None) -> Tensor: ...


def visible(mask: Tensor, dtype: torch.dtype | None = None) -> Visible:
    """A mask (*b, q|1, n), True where a query may see a key, prepared for attention.

    With `dtype` the bias is floating point: SDPA would otherwise make such a copy in every layer, and keep it.
    """
    some = mask.any(-1, keepdim=True)
    bias = mask | ~some
    if dtype is not None:
        bias = torch.zeros(bias.shape, dtype=dtype, device=mask.device).masked_fill_(~bias, float("-inf"))
    return Visible(bias, some)


def within(query: Tensor, key: Tensor, radius: float) -> Tensor:
    """Whether poses (*b, q, ≥2) and (*b, n, ≥2) are at most `radius` metres apart: (*b, q, n) bool."""
    query, key = query.detach(), key.detach()
    eager_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
    rows = max(1, _IN_CACHE // max(1, key.shape[-2])) if eager_cpu else max(1, query.shape[-2])
    parts = []
    for some in query.split(rows, dim=-2):
        x, y = (some[..., :, None, axis] - key[..., None, :, axis] for axis in (0, 1))
        parts.append(x.square_().add_(y.square_()) <= radius**2)
    return torch.cat(parts, dim=-2)


class PosePhases(nn.Module):
    """Poses → unit phases, one set for all layers.

    Args:
        rotary: makes the `Rotary` from `head_dim` and `heads`.
        heads, head_dim: of the attention.
        columns: which of x, y, heading, time the rotary reads; its first axes if None.

    Raises:
        ValueError: the rotary is learnable or scaled, or `columns` aren't as many as its axes.
    """

    def __init__(
        self, rotary: Callable[..., Rotary], *, heads: int, head_dim: int, columns: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.rotary = rotary(heads=heads, head_dim=head_dim)
        if isinstance(self.rotary.frequencies, nn.Parameter):
            raise ValueError("PosePhases: learnable frequencies aren't supported, layers share one set of phases")
        if self.rotary.scaling.dynamic or self.rotary.logit_gain != 1:
            raise ValueError(f"PosePhases: poses have no length to extend, so no scaling {self.rotary.scaling}")
        self.columns = list(range(self.rotary.axes)) if columns is None else list(columns)
        if len(self.columns) != self.rotary.axes:
            raise ValueError(f"PosePhases: columns {self.columns} for a rotary of {self.rotary.axes} axes")

    def forward(self, pose: Tensor) -> Tensor:
        """(*b, n, 3 | 4) x, y, heading[, time] → (*b, h|1, n, r) unit phases."""
        with torch.autocast(pose.device.type, enabled=False):
            return unit(self.rotary(pose[..., self.columns]))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(*b, n, h · d) → (*b, h, n, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _flat(x: Tensor) -> Tensor:
    """(*b, h, n, d) → (∏b, h, n, d): with more axes the CPU falls back on the softmax that keeps all pairs."""
    return x.reshape(-1, *x.shape[-3:])


class RotaryAttention(nn.Module):
    """Queries and keys turned by their poses, then SDPA: no tensor of all pairs but the caller's mask.

    Args:
        width: channels of tokens, in and out.
        heads, head_dim: heads and channels of a head; heads · head_dim needn't be the width.
    """

    extra_parameters = 0

    def __init__(self, *, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, heads * head_dim)
        # two maps: as one, the keys before they are turned would stay in memory beside the values
        self.key, self.value = nn.Linear(width, heads * head_dim), nn.Linear(width, heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)

    def keys(self, x: Tensor, place: Tensor | None) -> Keys:
        """Tokens (*b, n, c) and their phases (*b, h|1, n, r), None for none, to keys that any query can read."""
        key, value = split_heads(self.key(x), self.heads), split_heads(self.value(x), self.heads)
        return Keys(key if place is None else rotate(key, place), value, None)

    def forward(self, x: Tensor, place: Tensor | None, keys: Keys, seen: Visible | None = None) -> Tensor:
        """Attend.

        Args:
            x: (*b, q, c) tokens that ask.
            place: their phases (*b, h|1, q, r), None for none.
            keys: of the same leading shape *b.
            seen: what each query may see; None for all keys.

        Returns:
            (*b, q, c), zero where a query sees nothing.
        """
        query = split_heads(self.query(x), self.heads)
        if place is not None:
            query = rotate(query, place)
        lead = query.shape[:-3]
        bias = None if seen is None else _flat(seen.bias.unsqueeze(-3).expand(*lead, -1, -1, -1))
        attended = scaled_dot_product_attention(_flat(query), _flat(keys.key), _flat(keys.value), bias)
        attended = attended.transpose(-3, -2).flatten(-2)  # (∏b, q, h · d)
        out = self.out(attended).view(*lead, *attended.shape[-2:-1], -1)
        return out if seen is None else torch.where(seen.some, out, 0.0)
