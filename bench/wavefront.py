"""The chunked model along the diagonals of layer × chunk, where nothing waits for anything: each is one batched call.

Layer l of chunk j needs layer l − 1 of chunk j and layer l of chunk j − 1, so all (l, j) of one sum l + j can run together:
N + k − 1 calls for N layers and k chunks instead of N · k, with the weights of the layers stacked (cf. arXiv 2506.05229).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_map

from models.memory_block import LayerState
from models.memory_lm import MemoryLM
from models.stream import Span, advance, begin

OF_CHUNK = (
    "seen",
    "near",
    "recalls",
    "pooled",
    "restarts",
    "continues",
)  # tensors of a span that differ between chunks


def stacked(model: MemoryLM) -> dict[str, Tensor]:
    """Weights and buffers of all layers, (N, …) each, the weights as leaves that take gradients."""
    weights, buffers = stack_module_state(list(model.blocks))
    return {**weights, **buffers}


def wavefront(model: MemoryLM, layers: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """What the model answers at the start of a stream.

    Args:
        model: whose embedding, norm, head and first block's structure are used.
        layers: as `stacked` gives them.
        tokens: (b, k · c) int64, k whole chunks.

    Returns:
        Logits (b, k · c, vocabulary).
    """
    starts = torch.zeros_like(tokens, dtype=torch.bool) if model.bos is None else tokens == model.bos
    stream, spans = begin(len(tokens), model.chunk, model.carry, tokens.device), []
    for piece in starts.split(model.chunk, 1):
        span, stream = advance(stream, piece, model.chunk, window=model.window, blocks=model.in_blocks)
        spans.append(span)
    hidden = [
        x[:, None] for x in model.embed(tokens).split(model.chunk, 1)
    ]  # (b, 1, c, width), after the layers so far
    blocks: list[Any] = list(model.blocks)
    states: list[LayerState] = [block.initial(len(tokens), tokens.device) for block in blocks]
    if blocks[0].bank is None:
        states = [state._replace(bank=()) for state in states]  # vmap takes a tree without leaves, but no None

    def layer(weights: dict[str, Tensor], x: Tensor, state: LayerState, of_chunk: dict[str, Any]) -> Any:
        return functional_call(blocks[0], weights, (x, state, spans[0]._replace(**of_chunk)))

    for diagonal in range(len(states) + len(spans) - 1):
        first, end = max(0, diagonal - len(spans) + 1), min(len(states), diagonal + 1)
        chunks = [diagonal - index for index in range(first, end)]
        x, following = vmap(layer)(
            {name: weight[first:end] for name, weight in layers.items()},
            torch.stack([hidden[chunk] for chunk in chunks]),
            _stack(states[first:end]),
            _stack([_tensors(spans[chunk]) for chunk in chunks]),
        )
        states[first:end] = [tree_map(lambda leaf, at=at: leaf[at], following) for at in range(end - first)]
        for chunk, out in zip(chunks, x, strict=True):
            hidden[chunk] = out
    return model.head(model.norm(torch.cat(hidden, 2)[:, 0]))


def _tensors(span: Span) -> dict[str, Any]:
    return {name: getattr(span, name) for name in OF_CHUNK if getattr(span, name) is not None}


def _stack(trees: list[Any]) -> Any:
    return tree_map(lambda *parts: torch.stack(parts), *trees)
