"""A layer of the chunked-memory model: attention within reach of a chunk, a bank beside it, fused head by head (2507.00453)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.bank import Bank
from models.chunk_attention import by_device
from models.fusion import Fusion
from models.stream import Span
from models.turn import Turn
from rotary import Rotary


class LayerState(NamedTuple):
    """What a layer keeps between calls, c tokens a chunk. Keys are kept turned, by their place in the chunk under way.

    Attributes:
        carried_keys, carried_values: (b, h, p, d) of the chunk before, in places −c … −1; p is 0 or c.
        keys, values: (b, h, i, d) of the chunk so far, in places 0 … i − 1.
        bank: the bank's own state, or None.
    """

    carried_keys: Tensor
    carried_values: Tensor
    keys: Tensor
    values: Tensor
    bank: Any


class MemoryBlock(nn.Module):
    """x ← x + W · fused(full, chunked, memory), x ← x + feed-forward(norm(x)).

    Args:
        width, heads: of the tokens and of the attention.
        chunk: c, tokens of a chunk.
        carry: keep the keys and values of the chunk before.
        near: whether there is a chunked path.
        rotary: of both paths, or None.
        bank: the memory, or None.
        fusion: makes the weights of the paths from width, heads and their number.
        feed: the feed-forward part.
        attend: see `models.chunk_attention`.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        chunk: int,
        carry: bool,
        near: bool,
        rotary: Rotary | None,
        bank: Bank | None,
        fusion: Callable[[int, int, int], Fusion],
        feed: nn.Module,
        attend: Callable[..., Tensor] = by_device,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.chunk, self.carry, self.attend = heads, width // heads, chunk, carry, attend
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.turn = Turn(rotary, length=(2 if carry else 1) * chunk)
        self.bank: Any = bank
        self.fusion = fusion(width, heads, 1 + near + (bank is not None))
        self.out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = feed

    def initial(self, rows: int, device: torch.device | str | None = None) -> LayerState:
        """The state before the first token."""
        dtype = self.qkv.weight.dtype
        none = torch.zeros(rows, self.heads, 0, self.head_dim, device=device, dtype=dtype)
        carried = torch.zeros(rows, self.heads, self.chunk, self.head_dim, device=device, dtype=dtype)
        carried = carried if self.carry else none
        return LayerState(carried, carried, none, none, None if self.bank is None else self.bank.initial(rows, device))

    def forward(
        self, x: Tensor, state: LayerState, span: Span, phases: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, LayerState]:
        """(b, k, t, c) → the same, and the state after it; `phases` are those of the span, where they are known."""
        normed = self.norm(x)
        queries, keys, values = (
            self.qkv(normed).unflatten(-1, (3, self.heads, self.head_dim)).movedim(-3, 0).transpose(-2, -3)
        )  # (b, k, h, t, d)
        weights = self.fusion(normed)  # (b|1, k|1, t|1, h|1, p)

        turned, keys = self.turn(queries.flatten(0, 1), keys.flatten(0, 1), span.position, span.position, phases)
        keys, values = _after(state.keys, keys.unflatten(0, x.shape[:2])), _after(state.values, values)
        behind = (
            self.turn.moved(keys, -self.chunk) if self.carry and span.commits else keys
        )  # where the next chunk sees them
        all_keys = self._reachable(state.carried_keys, behind, keys)
        all_values = self._reachable(state.carried_values, values, values)
        over = weights.expand(*x.shape[:2], *weights.shape[2:]).flatten(0, 1).transpose(1, 2)  # (n, h|1, t|1, p)
        scale = self.turn.logit_gain * self.head_dim**-0.5
        mixed = self.attend(turned, all_keys, all_values, span.seen, span.near, over, scale)
        mixed = mixed.unflatten(0, x.shape[:2]).transpose(-2, -3)  # (b, k, t, h, d)

        bank = state.bank
        if self.bank is not None:
            read, bank = self.bank(normed, bank, span)
            mixed = mixed + (read * weights[..., -1:]).to(mixed.dtype)
        x = x + self.out(mixed.flatten(-2))
        return x + self.feed(self.feed_norm(x)), self._following(state, behind, values, bank, span)

    def _reachable(self, carried: Tensor, behind: Tensor, own: Tensor) -> list[Tensor]:
        """What k chunks (b, k, h, s, d) can see, in parts (n, h, s, d): the chunk before each, and each so far."""
        if not self.carry:
            return [own.flatten(0, 1)]
        before = carried[:, None] if own.shape[1] == 1 else torch.cat((carried[:, None], behind[:, :-1]), 1)
        return [before.flatten(0, 1), own.flatten(0, 1)]

    def _following(self, state: LayerState, keys: Tensor, values: Tensor, bank: Any, span: Span) -> LayerState:
        if not span.commits:
            return LayerState(state.carried_keys, state.carried_values, keys[:, -1], values[:, -1], bank)
        carried = state.carried_keys, state.carried_values
        if self.carry:
            carried = keys[:, -1].clone(), values[:, -1].clone()  # a view would keep the whole span in memory
        return LayerState(*carried, state.keys[..., :0, :], state.values[..., :0, :], bank)


def _after(begun: Tensor, new: Tensor) -> Tensor:
    """The tokens (b, h, i, d) of a chunk so far and new ones (b, 1, h, t, d), or whole chunks (b, k, h, t, d) alone."""
    return torch.cat((begun[:, None], new), -2) if begun.shape[-2] else new
