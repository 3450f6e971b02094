"""Queries and keys turned by where they stand: the one place where a language model meets `rotary`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rotary import Rotary, rotate, unit


class Turn(nn.Module):
    """Rotates queries and keys that have positions of their own; without a rotary it passes them on.

    Args:
        rotary: frequencies and scaling; None for no positions (NoPE).
        length: what a scaling that follows the length is told, where it is known beforehand; None to read it off the keys.
    """

    def __init__(self, rotary: Rotary | None, length: int | None = None) -> None:
        super().__init__()
        self.rotary, self._length = rotary, length

    @property
    def logit_gain(self) -> float:
        """What the softmax scale must be multiplied by."""
        return 1.0 if self.rotary is None else self.rotary.logit_gain

    def phases(self, query_position: Tensor, key_position: Tensor) -> tuple[Tensor, Tensor] | None:
        """Phases of queries at positions (t, 1) and keys at (s, 1), for layers that share this rotary; None without one."""
        if self.rotary is None:
            return None
        length: Tensor | int | None = self._length
        if self.rotary.scaling.dynamic and length is None:
            length = key_position.amax() + 1
        query = unit(self.rotary(query_position, length))
        return query, query if key_position is query_position else unit(self.rotary(key_position, length))

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        query_position: Tensor,
        key_position: Tensor,
        phases: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries (*b, h, t, d) at positions (t, 1), keys (*b, h, s, d) at (s, 1), → both, turned.

        `phases` are those of the positions, where they are known.
        """
        phases = self.phases(query_position, key_position) if phases is None else phases
        return (queries, keys) if phases is None else (rotate(queries, phases[0]), rotate(keys, phases[1]))

    def moved(self, keys: Tensor, by: int) -> Tensor:
        """Turned keys (*b, h, s, d), turned on to where they stand when they are `by` tokens further on."""
        if self.rotary is None:
            return keys
        return rotate(keys, unit(self.rotary(torch.full((1, 1), by, device=keys.device), self._length)))
