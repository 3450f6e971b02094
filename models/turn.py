"""Queries and keys turned by where they stand: the one place where a language model meets `rotary`."""

from __future__ import annotations

from torch import Tensor, nn

from rotary import Rotary, rotate, unit


class Turn(nn.Module):
    """Rotates queries and keys that have positions of their own; without a rotary it passes them on.

    Args:
        rotary: frequencies and scaling; None for no positions (NoPE).
    """

    def __init__(self, rotary: Rotary | None) -> None:
        super().__init__()
        self.rotary = rotary

    @property
    def logit_gain(self) -> float:
        """What the softmax scale must be multiplied by."""
        return 1.0 if self.rotary is None else self.rotary.logit_gain

    def phases(self, query_position: Tensor, key_position: Tensor) -> tuple[Tensor, Tensor] | None:
        """Phases of queries at positions (t, 1) and keys at (s, 1), for layers that share this rotary; None without one."""
        if self.rotary is None:
            return None
        length = key_position.amax() + 1 if self.rotary.scaling.dynamic else None
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
