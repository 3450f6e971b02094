"""What a rollout of the agent model needn't compute twice: keys of the map, and of each agent's last few tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.pose_attention import Keys


class MapContext(NamedTuple):
    """An encoded map: hidden (b, m, c), pose (b, m, 3), valid (b, m) bool."""

    hidden: Tensor
    pose: Tensor
    valid: Tensor


class AgentCache:
    """Keys of `AgentModel`'s layers. The map's are made once; the past's lie in a ring of as many slots as a token can see,
    so none is ever moved or computed again. `AgentModel.forward` fills it.

    Args:
        slots: tokens of an agent that a query can see, itself included.

    Attributes:
        length: tokens of an agent that were shown so far.
        context: the encoded map.
        map_keys: one a block.
        valid: (B, a, slots) bool, which slots hold valid tokens.
    """

    def __init__(self, slots: int) -> None:
        self.slots, self.length = slots, 0
        self.context: MapContext | None = None
        self.map_keys: list[Keys] = []
        self.valid: Tensor | None = None
        self._past: dict[int, Keys] = {}

    def mark(self, valid: Tensor) -> Tensor:
        """Note the validity (B, a, s) of the tokens that come; returns that of all slots."""
        if self.valid is None:
            self.valid = torch.zeros_like(valid[..., :1]).repeat(1, 1, self.slots)
        self._write(self.valid, valid, -1)
        return self.valid

    def remember(self, layer: int) -> Callable[[Keys], Keys]:
        """What block `layer` hands its temporal keys to: they are stored, and all that is visible comes back."""

        def store(keys: Keys) -> Keys:
            if layer not in self._past:
                self._past[layer] = Keys(*(None if t is None else self._ring(t) for t in keys))  # type: ignore[arg-type]
            past = self._past[layer]
            for ring, new in zip(past, keys, strict=True):
                if ring is not None and new is not None:
                    self._write(ring, new.detach(), -2)
            return past if self.length else keys  # the first tokens see each other by a causal mask

        return store

    def repeat(self, times: int) -> AgentCache:
        """A cache in which every scene stands `times` times in a row, of which all share the map's keys."""
        other = AgentCache(self.slots)
        other.length, other.context, other.map_keys = self.length, self.context, self.map_keys
        other.valid = None if self.valid is None else self.valid.repeat_interleave(times, 0)
        for layer, keys in self._past.items():
            other._past[layer] = Keys(*(None if t is None else t.repeat_interleave(times, 0) for t in keys))  # type: ignore[arg-type]
        return other

    def _ring(self, like: Tensor) -> Tensor:
        return like.new_zeros((*like.shape[:-2], self.slots, like.shape[-1]))

    def _write(self, ring: Tensor, new: Tensor, axis: int) -> None:
        count = new.shape[axis]
        kept = min(count, self.slots)
        slots = (torch.arange(count - kept, count, device=ring.device) + self.length) % self.slots
        ring.index_copy_(axis, slots, new.narrow(axis, count - kept, kept))
