"""Layers of the agent model: pre-norm attention with a gated update and a feed-forward part, over time, map and agents."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.near_blocks import Blocks
from models.pose_attention import Keys, PoseAttention, Visible


class AttentionLayer(nn.Module):
    """x ← x + gated attention, x ← x + MLP(norm(x)).

    The gate chooses, channel by channel, between what attention read and a map of the token itself; where there is nothing
    to read, the token's own map is what it can take.

    Args:
        attention: makes a `PoseAttention` from `width`, `heads` and `head_dim`.
        width: channels of a token.
        heads, head_dim: of the attention.
        expansion: width of the feed-forward part over `width`.
        equal_parameters: take what the attention has beyond a plain one off the feed-forward part.
        cross: keys come from other tokens, which get a norm of their own.

    Raises:
        ValueError: the attention leaves nothing for the feed-forward part.
    """

    def __init__(
        self,
        attention: Callable[..., PoseAttention],
        *,
        width: int,
        heads: int,
        head_dim: int,
        expansion: float,
        equal_parameters: bool,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.source_norm = nn.LayerNorm(width) if cross else None
        self.attention = attention(width=width, heads=heads, head_dim=head_dim)
        self.own = nn.Linear(width, width)
        self.gate = nn.Linear(2 * width, width)
        spent = self.attention.extra_parameters if equal_parameters else 0
        hidden = round(expansion * width - spent / (2 * width + 1))
        if hidden < 1:
            raise ValueError(f"the attention's {spent} extra parameters leave no feed-forward part; raise expansion")
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def keys_of(self, source: Tensor, place: Tensor | None) -> Keys:
        """Keys of other tokens (*b, n, c) for a `cross` layer."""
        assert self.source_norm is not None
        return self.attention.keys(self.source_norm(source), place)

    def forward(
        self,
        x: Tensor,
        place: Tensor | None,
        seen: Visible | None,
        keys: Keys | None = None,
        remember: Callable[[Keys], Keys] | None = None,
    ) -> Tensor:
        """(*b, q, c) → (*b, q, c).

        Args:
            x: tokens.
            place: where they stand, as the attention wants it.
            seen: the keys each may see.
            keys: of other tokens; None for the tokens' own.
            remember: takes the tokens' own keys, returns those to attend to: a cache's.
        """
        normed = self.norm(x)
        if keys is None:
            keys = self.attention.keys(normed, place)
            keys = keys if remember is None else remember(keys)
        read = self.attention(normed, place, keys, seen)
        gate = self.gate(torch.cat((read, normed), dim=-1)).sigmoid()
        x = x + torch.lerp(read, self.own(normed), gate)
        return x + self.feed(self.feed_norm(x))


class Surroundings(NamedTuple):
    """Places and masks that all agent blocks share, in the three layouts of their attentions.

    B scenes times rollouts, of which every g = B / b share a map; a agents, s steps, m map pieces.

    Attributes:
        in_time, seen_in_time: agents' own tokens: (B, a), s queries.
        on_map, seen_on_map: all tokens of a scene as queries of its map: (b), g · a · s queries; with `blocks`, by blocks.
        blocks: the blocks of queries, and the pieces that each may see; None where all are computed.
        of_map: place of the m map pieces, (b).
        at_step, seen_at_step: agents of a step: (B, s), a queries.
    """

    in_time: Tensor | None
    seen_in_time: Visible
    on_map: Tensor | None
    seen_on_map: Visible
    blocks: Blocks | None
    of_map: Tensor | None
    at_step: Tensor | None
    seen_at_step: Visible


class AgentBlock(nn.Module):
    """Attention over an agent's past, over the map around it, and over the agents beside it at the same step.

    Args:
        attention: as in `AttentionLayer`, of map and agents.
        temporal_attention: the same, of the past.
        layer: the other arguments of `AttentionLayer`.
    """

    def __init__(
        self,
        attention: Callable[..., PoseAttention],
        temporal_attention: Callable[..., PoseAttention],
        *,
        width: int,
        heads: int,
        head_dim: int,
        expansion: float,
        equal_parameters: bool,
    ) -> None:
        super().__init__()

        def layer(kind: Callable[..., PoseAttention], cross: bool = False) -> AttentionLayer:
            return AttentionLayer(
                kind,
                width=width,
                heads=heads,
                head_dim=head_dim,
                expansion=expansion,
                equal_parameters=equal_parameters,
                cross=cross,
            )

        self.past = layer(temporal_attention)
        self.map = layer(attention, cross=True)
        self.others = layer(attention)

    def forward(
        self,
        x: Tensor,
        around: Surroundings,
        map_source: Tensor | Keys,
        remember: Callable[[Keys], Keys] | None = None,
    ) -> tuple[Tensor, Keys]:
        """One block.

        Args:
            x: (B, a, s, c) tokens of agents.
            around: places and masks.
            map_source: encoded map (b, m, c), or the keys that an earlier call made of it.
            remember: takes the tokens' temporal keys, returns those to attend to.

        Returns:
            (B, a, s, c), and the map's keys.
        """
        keys = map_source if isinstance(map_source, Keys) else self.map.keys_of(map_source, around.of_map)
        x = self.past(x, around.in_time, around.seen_in_time, remember=remember)
        shared = x.reshape(keys.key.shape[0], -1, x.shape[-1])
        if around.blocks is None:
            shared = self.map(shared, around.on_map, around.seen_on_map, keys=keys)
        else:
            near = around.blocks.near_keys(keys)
            parts = self.map(around.blocks.split(shared), around.on_map, around.seen_on_map, keys=near)
            shared = around.blocks.merge(parts, shared)
        x = shared.view(x.shape)
        beside = self.others(x.transpose(1, 2), around.at_step, around.seen_at_step)
        return beside.transpose(1, 2).contiguous(), keys
