"""Attention within a radius, by blocks: what lies beyond the radius of a whole block of neighbouring queries isn't computed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.pose_attention import Keys, Visible, visible, within

BLOCK = 32  # queries; of fewer than four times as many keys, nothing is worth leaving out


class Blocks(NamedTuple):
    """k blocks of n neighbouring queries, each of one of b scenes, and the w keys that may be near to a block.

    Attributes:
        order: (k, n) which of the b · q queries stand where; b · q where there is none.
        keys: (k, w) which of the b · m keys a block sees.
        real: (k, w) bool, False where there is none.
        radius: metres.
    """

    order: Tensor
    keys: Tensor
    real: Tensor
    radius: float

    def split(self, x: Tensor) -> Tensor:
        """What belongs to the queries (b, q, c), by blocks: (k, n, c), zero where there is none."""
        rows = pad(x.flatten(0, 1), (0, 0, 0, 1))
        return rows.index_select(0, self.order.flatten()).unflatten(0, self.order.shape)

    def merge(self, parts: Tensor, x: Tensor) -> Tensor:
        """Puts blocks (k, n, c) back among the queries (b, q, c); those in no block stay as in `x`."""
        rows = pad(x.flatten(0, 1), (0, 0, 0, 1)).index_copy(0, self.order.flatten(), parts.flatten(0, 1))
        return rows[:-1].view(x.shape)

    def near(self, x: Tensor) -> Tensor:
        """What belongs to the keys (b, m, c), as every block sees it: (k, w, c)."""
        return x.flatten(0, 1).index_select(0, self.keys.flatten()).unflatten(0, self.keys.shape)

    def near_keys(self, keys: Keys) -> Keys:
        """Keys of b scenes, as every block sees them."""
        return _gathered(keys, self.keys)

    def near_own_keys(self, keys: Keys) -> Keys:
        """Keys that the queries themselves have, made by blocks (leading shape k), as every block sees them."""
        stands = self.order.new_zeros(int(self.order.max()) + 1)  # where no key is real, any that exists will do
        stands[self.order.flatten()] = torch.arange(self.order.numel(), device=self.order.device)
        return _gathered(keys, stands[self.keys])

    def visible(self, query: Tensor, key: Tensor, dtype: torch.dtype) -> Visible:
        """Which keys each query sees, as `pose_attention.visible` says it, by blocks: (k, n, w)."""
        mask = within(self.split(query), self.near(key), self.radius) & self.real[:, None]
        return visible(mask, dtype)


@torch.no_grad()
def blocks_within(
    query: Tensor, asks: Tensor, key: Tensor, valid: Tensor, radius: float | None, block: int = BLOCK
) -> Blocks | None:
    """Sorts queries into blocks: strips across x, cut across y. None where few keys are left out, and on other devices than
    CPUs and under torch.compile, because sizes depend on the poses, which would have to be waited for.

    Args:
        query: (b, q, ≥ 2) x, y and more, finite.
        asks: (b, q) bool, whose answers matter.
        key: (b, m, ≥ 2), finite.
        valid: (b, m) bool.
        radius: metres; None for any distance.
        block: how many queries a block has.
    """
    scenes, keys = valid.shape
    if query.device.type != "cpu" or torch.compiler.is_compiling() or radius is None or keys < 4 * block:
        return None
    if not asks.any():
        return None
    orders = [_tiled(query[scene], asks[scene], block) + scene * query.shape[1] for scene in range(scenes)]
    nothing = query.shape[0] * query.shape[1]
    order = torch.cat([pad(o, (0, -len(o) % block), value=nothing) for o in orders]).view(-1, block)
    scene = torch.cat([o.new_full((math.ceil(len(o) / block),), index) for index, o in enumerate(orders)])

    here = query[..., :2].flatten(0, 1)
    placed = torch.cat((here, here.new_zeros(1, 2)))[order]  # (k, n, 2)
    none = (order == nothing)[..., None]
    low, high = placed.masked_fill(none, torch.inf).amin(1), placed.masked_fill(none, -torch.inf).amax(1)
    x, y = key[..., :2].unbind(-1)  # (b, m)
    beside = (_beyond(t[scene], low[:, i, None], high[:, i, None]) for i, t in enumerate((x, y)))
    # More than the radius, by more than rounding: no key at the very edge may be lost.
    reach = radius + 1e-5 * (radius + float(here.abs().max()))
    near = sum(t.square() for t in beside) <= reach**2
    near &= valid[scene]
    count = near.sum(-1)
    width = max(1, int(count.max()))
    if 2 * width * order.numel() > keys * asks.numel():
        return None
    real = torch.arange(width, device=count.device) < count[:, None]
    seen = torch.zeros_like(real, dtype=torch.long)
    row, column = near.nonzero(as_tuple=True)  # row by row, as `real` is filled
    seen[real] = column + scene[row] * keys
    return Blocks(order, seen, real, radius)


def _tiled(pose: Tensor, asks: Tensor, block: int) -> Tensor:
    """Indices of the poses (n, ≥ 2) that ask: in strips across x, each a whole number of blocks, and sorted by y in each."""
    rows = asks.nonzero().flatten()
    blocks = math.ceil(len(rows) / block)
    strip = block * math.ceil(blocks / max(1, round(math.sqrt(blocks))))
    x, y = pose[rows, :2].unbind(-1)
    by_x = x.argsort()
    which = torch.empty_like(by_x)
    which[by_x] = torch.arange(len(rows), device=rows.device) // max(1, strip)
    by_y = y.argsort()
    return rows[by_y[which[by_y].argsort(stable=True)]]


def _beyond(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far outside of an interval."""
    return (low - value).clamp(min=0) + (value - high).clamp(min=0)


def _gathered(keys: Keys, index: Tensor) -> Keys:
    """Keys (b, h, m, d) and their places (b, m, c), at an index (k, w) of all b · m → (k, h, w, d) and (k, w, c)."""

    def take(x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)

    key, value = (take(x.transpose(1, 2)).transpose(1, 2) for x in (keys.key, keys.value))
    return Keys(key, value, None if keys.place is None else take(keys.place))
