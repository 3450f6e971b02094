"""Which keys one token of an agent reads, and how much: softmax weights that the fused kernels of a model never show."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from models.agent_cache import MapContext
from models.agent_layers import AgentBlock
from models.agent_tokens import AgentTokens, MapTokens
from models.agents import AgentModel
from models.pairwise_attention import PairwiseAttention, pair_features
from models.pose_attention import Keys, RotaryAttention, Visible, split_heads, visible, within
from rotary import rotate


class Asked(NamedTuple):
    """What an attention was called with; see `RotaryAttention.forward`."""

    x: Tensor
    place: Tensor | None
    keys: Keys
    seen: Visible | None


class Read(NamedTuple):
    """What a query reads: weights (h, n), zero where it may not look, and the values (h, n, d) they weigh."""

    weights: Tensor
    values: Tensor


class AgentAttention(NamedTuple):
    """Weights of one query in l layers of h heads, each a softmax of its own, zero for what it doesn't see.

    Attributes:
        past: (l, h, s) over the agent's own tokens.
        map: (l, h, m) over the map pieces.
        agents: (l, h, a) over the agents at the same step, itself included.
    """

    past: Tensor
    map: Tensor
    agents: Tensor


class Call(NamedTuple):
    """Arguments of a module's call by name, and what came out."""

    arguments: dict[str, Any]
    output: Tensor


@contextmanager
def calls_of(modules: Sequence[nn.Module]) -> Iterator[list[Call]]:
    """Within, every call of these modules is appended to the list when it ends."""
    calls: list[Call] = []

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        arguments = inspect.signature(module.forward).bind(*given, **named)
        arguments.apply_defaults()
        calls.append(Call(arguments.arguments, output))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _row(tensor: Tensor, lead: torch.Size, own: int, index: int) -> Tensor:
    """Element `index` of the leading axes `lead`, that a tensor with `own` further axes has or is broadcast to."""
    return tensor.expand(*lead, *tensor.shape[tensor.ndim - own :]).flatten(0, len(lead) - 1)[index]


def read(attention: nn.Module, asked: Asked, query: int) -> Read:
    """What one query of a call reads.

    Args:
        attention: a `RotaryAttention` or a `PairwiseAttention`.
        asked: the call.
        query: counts the queries of all leading axes together, in their order.

    Raises:
        TypeError: another attention.
    """
    lead, count = asked.x.shape[:-2], asked.x.shape[-2]
    which, at = divmod(query, count)
    x = _row(asked.x, lead, 2, which)[at, None]
    key, value = (_row(tensor, lead, 3, which) for tensor in asked.keys[:2])  # (h, n, d)
    place = asked.place
    if isinstance(attention, RotaryAttention):
        asking = split_heads(attention.query(x), attention.heads)  # (h, 1, d)
        if place is not None:
            asking = rotate(asking, _row(place, lead, 3, which)[:, at, None])
    elif isinstance(attention, PairwiseAttention) and place is not None and asked.keys.place is not None:
        asking = split_heads(attention.query(x), attention.heads)
        there = _row(asked.keys.place, lead, 2, which)
        features = pair_features(_row(place, lead, 2, which)[at, None], there)[0].to(x.dtype)
        pair = split_heads(attention.pair(features), 2 * attention.heads)  # (2h, n, d)
        key, value = key + pair[: attention.heads], value + pair[attention.heads :]
    else:
        raise TypeError(f"read: {type(attention).__name__} is neither RotaryAttention nor PairwiseAttention with poses")
    logits = (asking @ key.mT)[:, 0] * key.shape[-1] ** -0.5
    if asked.seen is None:
        return Read(logits.softmax(-1), value)
    bias, some = (_row(tensor, lead, 2, which) for tensor in asked.seen)
    bias, some = (tensor[at if tensor.shape[0] > 1 else 0] for tensor in (bias, some))
    logits = logits.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else logits + bias
    return Read(torch.where(some, logits.softmax(-1), 0.0), value)


@torch.no_grad()
def agent_attention(
    model: AgentModel, tokens: AgentTokens, map: MapTokens, *, agent: int, step: int = -1, scene: int = 0
) -> AgentAttention:
    """Run the model and see what one token of one agent attends to.

    Args:
        model: of any `pos`.
        tokens, map: of b scenes each, as `AgentModel.forward` takes them.
        agent, step, scene: whose token.

    Raises:
        ValueError: there is no such token, or it isn't valid.
    """
    scenes, agents, steps = tokens.valid.shape
    for name, value, size in (("scene", scene, scenes), ("agent", agent, agents), ("step", step, steps)):
        if not -size <= value < size:
            raise ValueError(f"agent_attention: {name}={value}, there are {size}")
    if map.valid.shape[0] != scenes:
        raise ValueError(f"agent_attention: {scenes} scenes of agents and {map.valid.shape[0]} maps")
    if not tokens.valid[scene, agent, step]:
        raise ValueError(f"agent_attention: scene {scene}, agent {agent}, step {step} isn't valid")
    scene, agent, step = scene % scenes, agent % agents, step % steps
    blocks = cast("list[AgentBlock]", list(model.blocks))
    pasts = [cast("nn.Module", block.past.attention) for block in blocks]
    others = [cast("nn.Module", block.others.attention) for block in blocks]
    context = model.encode_map(map)
    with calls_of(pasts) as in_time, calls_of([block.past for block in blocks]) as moved, calls_of(others) as beside:
        model(tokens, context)
    timewise = (scene * agents + agent) * steps + step
    stepwise = (scene * steps + step) * agents + agent
    of_past = [read(each, Asked(**call.arguments), timewise) for each, call in zip(pasts, in_time, strict=True)]
    of_others = [read(each, Asked(**call.arguments), stepwise) for each, call in zip(others, beside, strict=True)]
    # The model may attend to the map in any order of queries and pieces, so this is asked again, for one token.
    near = MapContext(*(part[scene, None] for part in context))
    pose = tokens.pose[scene, agent, step].view(1, 1, -1)
    hidden = [call.output.flatten(0, -2)[timewise].view(1, 1, -1) for call in moved]
    of_map = [read_map(model, block, x, pose, near) for block, x in zip(blocks, hidden, strict=True)]
    past, pieces, beside_it = (torch.stack([each.weights for each in of]) for of in (of_past, of_map, of_others))
    return AgentAttention(past, pieces[..., : map.valid.shape[1]], beside_it)  # an empty map is given a hidden piece


def read_map(model: AgentModel, block: AgentBlock, x: Tensor, pose: Tensor, context: MapContext) -> Read:
    """What a token (1, 1, c) at a pose (1, 1, 3) reads of the map of one scene in a block."""
    place, of_map = (None if model.phases is None else model.phases(each) for each in (pose, context.pose))
    mask = context.valid[:, None]
    if model.map_agent_radius is not None:
        mask = mask & within(pose, context.pose, model.map_agent_radius)
    asked = Asked(block.map.norm(x), place, block.map.keys_of(context.hidden, of_map), visible(mask))
    return read(cast("nn.Module", block.map.attention), asked, 0)
