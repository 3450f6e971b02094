"""DRoPE-NTP: a transformer that predicts the next motion of every agent from tokens of agents and map.

Next-motion prediction after SMART (arXiv 2405.15677), with all relation embeddings replaced by poses that turn queries and
keys (DRoPE, arXiv 2503.15029); how poses enter is an argument, so that both designs stand behind one interface.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from models.agent_cache import AgentCache, MapContext
from models.agent_layers import AgentBlock, AttentionLayer, Surroundings
from models.agent_tokens import SUBSTEPS, AgentTokens, MapTokens
from models.motion_head import CLASSES, ClassLinear, MotionHead
from models.near_blocks import blocks_within
from models.pose_attention import PoseAttention, Visible, visible, within

_METRES, _SPEED, _PIECE = 5.0, 10.0, 5.0  # bring a motion, its speed and a map piece to the order of one


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))


class AgentEmbedding(nn.Module):
    """A token from what an agent did, in its own frame, and what it is: no pose enters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.motion, self.size = _mlp(4 * SUBSTEPS + 1, width), _mlp(3, width)
        self.kind = nn.Embedding(len(CLASSES), width)

    def forward(self, tokens: AgentTokens) -> Tensor:
        """(b, a, s, c)."""
        x, y, turn = tokens.motion.unbind(-1)
        parts = (x / _METRES, y / _METRES, turn.cos(), turn.sin(), tokens.speed[..., None] / _SPEED)
        moved = self.motion(torch.cat(parts, dim=-1).to(self.kind.weight.dtype))
        agent = self.size(tokens.size.log1p().to(self.kind.weight.dtype)) + self.kind(tokens.type)
        return moved + agent[:, :, None]


class MapEncoder(nn.Module):
    """Tokens of map pieces in their own frames, and self-attention among neighbours."""

    def __init__(self, width: int, types: int, lights: int, layers: list[AttentionLayer]) -> None:
        super().__init__()
        self.piece, self.kind, self.light = _mlp(4, width), nn.Embedding(types, width), nn.Embedding(lights, width)
        self.blocks = nn.ModuleList(layers)

    def embed(self, tokens: MapTokens) -> Tensor:
        """(b, m, c)."""
        shape = self.piece((tokens.points.flatten(-2) / _PIECE).to(self.kind.weight.dtype))
        return shape + self.kind(tokens.type) + self.light(tokens.light)


class PoseFeatures(nn.Module):
    """Poses as features of a token, the scene-centric way: sines and cosines of x and y at wavelengths from 4 to 800 m."""

    def __init__(self, width: int, wavelengths: int = 6) -> None:
        super().__init__()
        self.waves = wavelengths
        self.project = nn.Linear(4 * wavelengths + 2, width)

    def forward(self, pose: Tensor) -> Tensor:
        """(…, 3) → (…, c)."""
        steps = torch.arange(self.waves, device=pose.device, dtype=pose.dtype) / (self.waves - 1)
        phase = pose[..., :2, None] * (2 * math.pi / (4 * 200**steps))  # (…, 2, w)
        turn = pose[..., 2:]
        features = torch.cat((phase.cos().flatten(-2), phase.sin().flatten(-2), turn.cos(), turn.sin()), dim=-1)
        return self.project(features.to(self.project.weight.dtype))


class AgentModel(nn.Module):
    """Map encoder, blocks of temporal, map and agent attention, and a head over the next motion of every token.

    Padding (`valid` False) may hold anything, NaN too; it changes no valid output. What comes back for invalid tokens is
    finite and means nothing.

    Args:
        head: a `models.motion_head.MotionHead` that reads `width` channels.
        attention: makes the attention of map and agents from `width`, `heads` and `head_dim`.
        temporal_attention: makes that of an agent's past; None for `attention`.
        phases: makes from `heads` and `head_dim` what turns poses (x, y, heading) into what `attention` wants for a place,
            once for all layers; None where poses don't enter.
        temporal_phases: the same for poses (x, y, heading, step of 0.5 s) in the past.
        absolute: add features of the pose itself to every token.
        width: channels of a token.
        heads, head_dim: of all attentions.
        map_layers, agent_layers: depth.
        expansion: width of the feed-forward parts over `width`.
        equal_parameters: where an attention has parameters for poses, take as many off the feed-forward part beside it.
        map_radius, map_agent_radius, agent_radius: metres that attention reaches among map pieces, from agents to the map,
            and among agents; None for any distance.
        tokens_back: how many tokens before it an agent's token sees.
        map_types, map_lights: how many codes of map pieces and of lights there are.

    Raises:
        ValueError: a size isn't positive, the head reads another width, or the frequencies don't suit the heads.
    """

    def __init__(
        self,
        head: MotionHead,
        *,
        attention: Callable[..., PoseAttention],
        temporal_attention: Callable[..., PoseAttention] | None = None,
        phases: Callable[..., nn.Module] | None = None,
        temporal_phases: Callable[..., nn.Module] | None = None,
        absolute: bool = False,
        width: int = 128,
        heads: int = 8,
        head_dim: int = 16,
        map_layers: int = 3,
        agent_layers: int = 6,
        expansion: float = 4.0,
        equal_parameters: bool = False,
        map_radius: float | None = 10.0,
        map_agent_radius: float | None = 30.0,
        agent_radius: float | None = 60.0,
        tokens_back: int = 6,
        map_types: int = 12,
        map_lights: int = 9,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "heads": heads, "head_dim": head_dim}
        for name, value in {**sizes, "agent_layers": agent_layers, "tokens_back": tokens_back}.items():
            if value < 1:
                raise ValueError(f"AgentModel: {name}={value}, expected at least 1")
        for reader in head.modules():
            if isinstance(reader, ClassLinear) and reader.maps[0].in_features != width:
                raise ValueError(f"AgentModel: width={width}, but its head reads dim={reader.maps[0].in_features}")
        self.map_radius, self.map_agent_radius, self.agent_radius = map_radius, map_agent_radius, agent_radius
        self.tokens_back = tokens_back
        shape = {"width": width, "heads": heads, "head_dim": head_dim}
        layer = {**shape, "expansion": expansion, "equal_parameters": equal_parameters}
        self.phases = None if phases is None else phases(heads=heads, head_dim=head_dim)
        self.temporal_phases = None if temporal_phases is None else temporal_phases(heads=heads, head_dim=head_dim)
        self.absolute = PoseFeatures(width) if absolute else None
        self.embedding = AgentEmbedding(width)
        encoders = [AttentionLayer(attention, **layer) for _ in range(map_layers)]  # type: ignore[arg-type]
        self.map_encoder = MapEncoder(width, map_types, map_lights, encoders)
        past = temporal_attention or attention
        self.blocks = nn.ModuleList(AgentBlock(attention, past, **layer) for _ in range(agent_layers))  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(width)
        self.apply(_initialise)
        self.head: MotionHead = head

    def no_weight_decay(self) -> set[str]:
        """Names of the embeddings; biases and norms are vectors, which no optimizer group here decays."""
        tables = (name for name, module in self.named_modules() if isinstance(module, nn.Embedding))
        return {f"{name}.weight" for name in tables}

    def cache(self) -> AgentCache:
        """An empty cache for `forward`."""
        return AgentCache(self.tokens_back + 1)

    def encode_map(self, tokens: MapTokens) -> MapContext:
        """Encode the maps of b scenes; a scene without any piece is fine."""
        if tokens.valid.shape[1] == 0:  # attention needs a key, if a hidden one
            tokens = MapTokens(*(pad(t, (0, 0) * (t.ndim - 2) + (0, 1)) for t in tokens))
        tokens = clean_map(tokens)
        x = self.map_encoder.embed(tokens)
        if self.absolute is not None:
            x = x + self.absolute(tokens.pose)
        pose, valid = tokens.pose, tokens.valid
        blocks = blocks_within(pose, valid, pose, valid, self.map_radius)
        if blocks is None:
            place, seen = _place(self.phases, pose), _seen(pose, pose, valid, self.map_radius, x.dtype)
            for block in self.map_encoder.blocks:
                x = block(x, place, seen)
            return MapContext(x, pose, valid)
        place, seen = _place(self.phases, blocks.split(pose)), blocks.visible(pose, pose, x.dtype)
        parts = blocks.split(x)
        for block in self.map_encoder.blocks:
            parts = block(parts, place, seen, remember=blocks.near_own_keys)
        return MapContext(blocks.merge(parts, x), pose, valid)

    def forward(
        self,
        tokens: AgentTokens,
        map: MapTokens | MapContext | None,
        cache: AgentCache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Predict the motion that follows each token.

        Args:
            tokens: of B scenes; with a cache that isn't empty, one step of each, that follows those shown before.
            map: of b scenes, encoded or not; None for that of a cache that isn't empty. B may be a multiple of b: B / b
                neighbours in the batch then share a map.
            cache: keeps what later steps need; no gradient flows through it.
            wanted: (B, a, s) bool, which tokens the head reads; None for all.

        Returns:
            (B, a, s, k) what the head makes of every token, or (n, k) of the n wanted ones.

        Raises:
            ValueError: B isn't a multiple of b, there is no map, or several steps come at once after a cache's first call.
        """
        known = None if cache is None else cache.context
        if map is None and known is None:
            raise ValueError("AgentModel: no map, and no cache that holds one")
        context = known or (self.encode_map(map) if isinstance(map, MapTokens) else map)
        assert context is not None
        if tokens.valid.shape[0] % context.valid.shape[0]:
            raise ValueError(f"AgentModel: {tokens.valid.shape[0]} scenes of agents for {context.valid.shape[0]} maps")
        if cache is not None and cache.length and tokens.valid.shape[2] != 1:
            raise ValueError(f"AgentModel: {tokens.valid.shape[2]} steps at once, a cache in use takes one")
        tokens = clean_agents(tokens)
        x = self.embedding(tokens)
        if self.absolute is not None:
            x = x + self.absolute(tokens.pose)
        around = self._surroundings(tokens, context, cache, x.dtype)
        map_keys = []
        for index, block in enumerate(self.blocks):
            source = cache.map_keys[index] if cache is not None and cache.map_keys else context.hidden
            x, keys = block(x, around, source, None if cache is None else cache.remember(index))
            map_keys.append(keys)
        if cache is not None:
            cache.map_keys, cache.context = map_keys, context
            cache.length += tokens.valid.shape[2]
        kind = tokens.type[..., None].expand(tokens.valid.shape)
        if wanted is not None:
            x, kind = x[wanted], kind[wanted]
        return self.head(self.norm(x), kind)

    def _surroundings(
        self, tokens: AgentTokens, context: MapContext, cache: AgentCache | None, dtype: torch.dtype
    ) -> Surroundings:
        pose, valid = tokens.pose, tokens.valid
        scenes, steps, first = context.valid.shape[0], valid.shape[2], 0 if cache is None else cache.length
        time = torch.arange(first, first + steps, device=pose.device, dtype=pose.dtype)
        timed = torch.cat((pose, time[:, None].expand(*valid.shape, 1)), dim=-1)
        marked = valid if cache is None else cache.mark(valid)
        past = marked[:, :, None]
        if not first:
            back = time[:, None] - time
            past = valid[:, :, None] & (back >= 0) & (back <= self.tokens_back)
        asking = pose.reshape(scenes, -1, 3)
        blocks = blocks_within(asking, valid.reshape(scenes, -1), context.pose, context.valid, self.map_agent_radius)
        if blocks is None:
            seen_on_map = _seen(asking, context.pose, context.valid, self.map_agent_radius, dtype)
        else:
            seen_on_map = blocks.visible(asking, context.pose, dtype)
        beside = pose.transpose(1, 2)
        at_step = valid.transpose(1, 2)[:, :, None]
        if self.agent_radius is not None:
            at_step = at_step & within(beside, beside, self.agent_radius)
        fresh = cache is None or not cache.map_keys
        return Surroundings(
            in_time=_place(self.temporal_phases, timed),
            seen_in_time=visible(past, dtype),
            on_map=_place(self.phases, asking if blocks is None else blocks.split(asking)),
            seen_on_map=seen_on_map,
            blocks=blocks,
            of_map=_place(self.phases, context.pose) if fresh else None,
            at_step=_place(self.phases, beside),
            seen_at_step=visible(at_step, dtype),
        )


def _place(phases: nn.Module | None, pose: Tensor) -> Tensor | None:
    return None if phases is None else phases(pose)


def _seen(query: Tensor, key: Tensor, valid: Tensor, radius: float | None, dtype: torch.dtype) -> Visible:
    """Which of the keys that are valid lie within the radius."""
    mask = valid[:, None]
    return visible(mask if radius is None else mask & within(query, key, radius), dtype)


def _initialise(module: nn.Module) -> None:
    """Weights of variance 1 / inputs, which suits narrow and wide models alike."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.5)


def clean_map(tokens: MapTokens) -> MapTokens:
    """Zeros in place of whatever padding holds."""
    pose, points, kind, light, valid = tokens
    return MapTokens(
        torch.where(valid[..., None], pose, 0),
        torch.where(valid[..., None, None], points, 0),
        torch.where(valid, kind, 0),
        torch.where(valid, light, 0),
        valid,
    )


def clean_agents(tokens: AgentTokens) -> AgentTokens:
    """Zeros in place of whatever padding holds; an agent that is valid at any step has a type and a size."""
    valid = tokens.valid
    present = valid.any(-1)
    return AgentTokens(
        torch.where(valid[..., None], tokens.pose, 0),
        torch.where(valid[..., None, None], tokens.motion, 0),
        torch.where(valid, tokens.speed, 0),
        valid,
        torch.where(present, tokens.type, 0),
        torch.where(present[..., None], tokens.size, 0),
    )
