"""A language model that reads for ever at constant cost: chunked attention with a carry and a gated memory (2507.00453)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from models.bank import Bank
from models.chunk_attention import by_device
from models.feed_forward import GELU
from models.fusion import Fusion
from models.initial_weights import normal
from models.memory_block import LayerState, MemoryBlock
from models.states import shapes
from models.stream import Stream, advance, begin
from rotary import Rotary


class State(NamedTuple):
    """Everything that the model keeps of what it has read; its size depends on the place within a chunk alone.

    Floats a row and layer: 2 · c · width carried, 2 · i · width of the chunk so far (i < c), and the bank's.
    """

    stream: Stream
    layers: tuple[LayerState, ...]


class MemoryLM(nn.Module):
    """Tokens → logits of the next, chunk by chunk, with a state of constant size.

    Args:
        vocabulary: number of tokens.
        bos: the token that begins a document; documents never see each other, nor through the memory. None: one document.
        width, layers, heads: of the network.
        chunk: c tokens.
        window: tokens that the chunked path sees; None for no chunked path.
        blocks: the chunked path sees blocks of `window` tokens of the chunk, instead of the last `window` tokens.
        carry: the full path sees the chunk before as well.
        rotary: makes the layer's `Rotary` from `head_dim` and `heads`, shared by all layers; None for no positions.
        bank: makes a layer's memory from `width` and `heads`; None for no memory.
        fusion: makes the weights of the paths from width, heads and number of paths.
        feed: makes the feed-forward part from width and hidden width.
        hidden: of the feed-forward part.
        tied: embedding and head share their weights.
        chunks_at_once: whole chunks that a layer takes in one call; 1 is the plain loop over chunks. Answers are the same.
        checkpoint: recompute a layer's span in the backward pass instead of keeping its activations.
        attend: see `models.chunk_attention`.

    Raises:
        ValueError: sizes that don't fit together.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        bos: int | None = None,
        width: int,
        layers: int,
        heads: int,
        chunk: int,
        window: int | None = None,
        blocks: bool = False,
        carry: bool = True,
        rotary: Callable[..., Rotary] | None,
        bank: Callable[..., Bank] | None,
        hidden: int,
        fusion: Callable[[int, int, int], Fusion] = Fusion,
        feed: Callable[[int, int], nn.Module] = GELU,
        tied: bool = False,
        chunks_at_once: int = 8,
        checkpoint: bool = False,
        attend: Callable[..., Tensor] = by_device,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"model: {heads} heads don't divide a width of {width}")
        if chunk < 1 or chunks_at_once < 1:
            raise ValueError(f"model: chunk={chunk} and chunks_at_once={chunks_at_once} must be at least 1")
        if window is not None and not 1 <= window <= chunk:
            raise ValueError(f"model: window={window} must lie in 1 … chunk={chunk}")
        if bos is not None and not 0 <= bos < vocabulary:
            raise ValueError(f"model: bos={bos} is none of the {vocabulary} tokens")
        self.vocabulary, self.bos, self.chunk, self.carry = vocabulary, bos, chunk, carry
        self.window, self.in_blocks = window, blocks
        self.chunks_at_once, self.checkpoint = chunks_at_once, checkpoint
        self.embed = nn.Embedding(vocabulary, width)
        turn = None if rotary is None else rotary(head_dim=width // heads, heads=heads)
        if turn is not None and turn.axes != 1:
            raise ValueError(f"model: text has one axis, the rotary has {turn.axes}")
        self.blocks = nn.ModuleList(
            MemoryBlock(
                width=width,
                heads=heads,
                chunk=chunk,
                carry=carry,
                near=window is not None,
                rotary=turn,
                bank=None if bank is None else bank(width=width, heads=heads),
                fusion=fusion,
                feed=feed(width, hidden),
                attend=attend,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.reset_parameters()
        self._lasting_shapes = shapes(_lasting(self.initial(1, "meta")))

    def reset_parameters(self) -> None:
        """As `models.initial_weights`, and the gates as they say themselves."""
        blocks: list[Any] = list(self.blocks)
        normal(self, self.embed.embedding_dim, [end for block in blocks for end in (block.out, block.feed.output)])
        for module in self.modules():
            getattr(module, "reset_gates", lambda: None)()

    @property
    def reach(self) -> int:
        """The largest distance between a query and a key that attention turns."""
        return (2 if self.carry else 1) * self.chunk - 1

    def rotaries(self) -> list[Rotary]:
        """The model's rotaries, each once."""
        return [module for module in self.modules() if isinstance(module, Rotary)]

    def no_weight_decay(self) -> set[str]:
        """Embeddings, learned frequencies, and what isn't a matrix though it has two axes."""
        spared = (
            "embed.weight",
            "head.weight",
            "rotary.frequencies",
            "fusion.logits",
            "null",
            "age_bias",
            "pool.query",
            "convolution",
        )
        return {name for name, _ in self.named_parameters() if name.endswith(spared)}

    def gate_parameters(self) -> set[str]:
        """Names of what chooses between paths and memories, which learns too slowly at the common rate (cf. 2404.07143)."""
        blocks: list[Any] = list(self.blocks)
        chosen = {id(block.fusion.logits) for block in blocks}
        for block in blocks:
            if block.bank is not None:
                chosen |= {id(parameter) for parameter in block.bank.gate_parameters()}
        return {name for name, parameter in self.named_parameters() if id(parameter) in chosen}

    def initial(self, rows: int, device: torch.device | str | None = None) -> State:
        """The state before the first token of `rows` streams."""
        device = self.embed.weight.device if device is None else device
        blocks: list[Any] = list(self.blocks)
        layers = tuple(block.initial(rows, device) for block in blocks)
        return State(begin(rows, self.chunk, self.carry, device), layers)

    def forward(self, tokens: Tensor, state: State | None = None, *, reads: bool = True) -> tuple[Tensor, State]:
        """Read on.

        Args:
            tokens: (b, n) int64, any n ≥ 1.
            state: what was read before; None for nothing.
            reads: False makes every memory answer with zero, to measure what it is worth.

        Returns:
            Logits of the token after each, (b, n, vocabulary), and the state after the last.

        Raises:
            ValueError: no token, a token outside the vocabulary (seen on a CPU), or a state of another model or batch.
        """
        state = self.initial(len(tokens), tokens.device) if state is None else state
        if not torch.compiler.is_compiling():
            self._check(tokens, state)
        hidden = []
        for piece in tokens.split(self._sizes(tokens.shape[1], state.stream.current.shape[1]), dim=1):
            x, state = self._span(piece, state, reads)
            hidden.append(x)
        return self.head(self.norm(torch.cat(hidden, 1))), state

    def _sizes(self, tokens: int, begun: int) -> list[int]:
        """The rest of the chunk under way, whole chunks, and what begins the next."""
        first = min(tokens, self.chunk - begun) if begun else 0
        whole, rest = divmod(tokens - first, self.chunk)
        spans = [min(self.chunks_at_once, whole - done) for done in range(0, whole, self.chunks_at_once)]
        return [size for size in (first, *(chunks * self.chunk for chunks in spans), rest) if size]

    def _span(self, tokens: Tensor, state: State, reads: bool) -> tuple[Tensor, State]:
        starts = torch.zeros_like(tokens, dtype=torch.bool) if self.bos is None else tokens == self.bos
        span, stream = advance(state.stream, starts, self.chunk, window=self.window, blocks=self.in_blocks, reads=reads)
        x = self.embed(tokens).unflatten(1, (*span.continues.shape[1:], -1))  # (b, k, t, c)
        first: Any = self.blocks[0]
        phases = first.turn.phases(span.position, span.position)  # all layers share the rotary
        layers = []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            if self.checkpoint and self.training:
                x, layer = recomputed(block, x, layer, span, phases, use_reentrant=False)
            else:
                x, layer = block(x, layer, span, phases)
            layers.append(layer)
        return x.flatten(1, 2), State(stream, tuple(layers))

    def _check(self, tokens: Tensor, state: State) -> None:
        if tokens.ndim != 2 or not tokens.numel():
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; need (rows, at least 1)")
        if not tokens.is_cuda and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            worst = int(tokens.max()) if int(tokens.max()) >= self.vocabulary else int(tokens.min())
            raise ValueError(f"token {worst} is outside the vocabulary of {self.vocabulary}")
        given, rows = shapes(_lasting(state)), len(tokens)
        wanted = [(rows, *rest) for _, *rest in self._lasting_shapes]
        begun, first = state.stream.current.shape[1], cast(MemoryBlock, self.blocks[0])
        given += sorted({tuple(part.shape) for layer in state.layers for part in (layer.keys, layer.values)})
        wanted.append((rows, first.heads, begun, first.head_dim))
        if given != wanted or begun >= self.chunk:
            differing = [pair for pair in zip(given, wanted, strict=False) if pair[0] != pair[1]]
            found, right = differing[0] if differing else (f"{len(given)} tensors", f"{len(wanted)}")
            raise ValueError(f"the state belongs to another model or batch: it has {found} where {right} is needed")


def _lasting(state: State) -> tuple[Any, ...]:
    """What is there at any place within a chunk."""
    stream = state.stream
    layers = tuple((layer.carried_keys, layer.carried_values, layer.bank) for layer in state.layers)
    return stream.document, stream.carried, stream.remembered, layers
