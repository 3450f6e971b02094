"""A decoder-only transformer language model, the baseline of the chunked one: pre-norm blocks, rotary positions (arXiv
2104.09864), causal attention over all that was read, and a cache of keys and values that is written in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from models.feed_forward import GELU
from models.initial_weights import normal
from models.turn import Turn
from rotary import Rotary


class Grown(NamedTuple):
    """A tensor that grows along an axis, at the front of memory that is taken ahead.

    `append` writes behind the content, in place, so what it was given and what it returns share memory. Both stay valid:
    content is never overwritten, and who appends to the older one again, as in a second continuation of one prompt, is
    told by `version` that the memory behind it is taken and gets a copy.

    Attributes:
        memory: (b, …, capacity, …).
        size: how much of the capacity is content.
        version: of the memory, when this was made.
    """

    memory: Tensor
    size: int
    version: int


def append(grown: Grown, new: Tensor, axis: int) -> tuple[Grown, Tensor]:
    """Put new content behind what is there; memory doubles where it is full.

    Where a gradient is wanted, or under `torch.compile`, nothing is written in place.

    Returns:
        The grown tensor, and its whole content.
    """
    memory, size = grown.memory, grown.size
    total = size + new.shape[axis]
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (new.requires_grad or memory.requires_grad)):
        whole = torch.cat((memory.narrow(axis, 0, size).to(new.dtype), new), axis) if size else new
        return Grown(whole, total, -1), whole
    fits = total <= memory.shape[axis] and (memory.dtype, memory.device) == (new.dtype, new.device)
    if not fits or memory._version != grown.version:
        shape = list(new.shape)
        shape[axis] = max(total, 2 * size)
        with torch.inference_mode(False):  # tensors made in inference mode can't be written to outside it
            memory = torch.empty(shape, dtype=new.dtype, device=new.device)
        memory.narrow(axis, 0, size).copy_(grown.memory.narrow(axis, 0, size))
    memory.narrow(axis, size, new.shape[axis]).copy_(new)
    return Grown(memory, total, memory._version), memory.narrow(axis, 0, total)


class Cache(NamedTuple):
    """What a layer keeps: keys and values (b, h, n, d); keys are turned, unless their scaling depends on n."""

    keys: Grown
    values: Grown


class TransformerState(NamedTuple):
    """What a `TransformerLM` keeps of the n tokens that it read.

    Attributes:
        document: (b, n) int64 documents of all tokens, counted from 0; without documents it stays empty.
        read: n.
        layers: one cache a layer.
    """

    document: Grown
    read: int
    layers: tuple[Cache, ...]


class Place(NamedTuple):
    """Where new tokens stand, shared by all layers.

    Attributes:
        position: (t, 1) int64 of the t new tokens.
        past: (n, 1) int64 of all tokens, the new ones included.
        mask: (b|1, 1, t, n) bool: keys that a query sees; None where the causal mask of SDPA, or none, does.
        phases: of queries and keys, as `Turn` takes them.
    """

    position: Tensor
    past: Tensor
    mask: Tensor | None
    phases: tuple[Tensor, Tensor] | None


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed(norm(x)).

    Args:
        width: channels c.
        heads: attention heads, which divide c.
        hidden: channels inside the feed-forward layer.
        rotary: of this layer; None for no positions.
        feed: makes the feed-forward layer from width and hidden.
        norm: makes a norm from width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        rotary: Rotary | None,
        feed: Callable[[int, int], nn.Module],
        norm: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.feed_norm = norm(width), norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.turn = Turn(rotary)
        self.out = nn.Linear(width, width, bias=False)
        self.feed: Any = feed(width, hidden)
        self.scale = self.turn.logit_gain / math.sqrt(width // heads)
        # a scaling that follows the length turns all keys anew whenever that changes
        self.keeps_unturned = rotary is not None and rotary.scaling.dynamic

    def forward(self, x: Tensor, cache: Cache, place: Place) -> tuple[Tensor, Cache]:
        """(b, t, c) → (b, t, c), and the cache with the new keys and values."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (b, h, t, d)
        values, all_values = append(cache.values, v, -2)
        if self.keeps_unturned:
            keys, all_keys = append(cache.keys, k, -2)
            q, all_keys = self.turn(q, all_keys, place.position, place.past, place.phases)
        else:
            q, k = self.turn(q, k, place.position, place.position, place.phases)
            keys, all_keys = append(cache.keys, k, -2)
        first = place.mask is None and q.shape[-2] > 1
        read = scaled_dot_product_attention(q, all_keys, all_values, place.mask, is_causal=first, scale=self.scale)
        x = x + self.out(read.transpose(1, 2).flatten(-2))
        return x + self.feed(self.feed_norm(x)), Cache(keys, values)


class TransformerLM(nn.Module):
    """Tokens → logits of the next token, each token seeing all before it of its document.

    Args:
        vocabulary: number of tokens.
        bos: the token that begins a document; documents don't see each other, while positions run on. None: one text.
        width: channels.
        layers: blocks.
        heads: attention heads, which divide the width.
        hidden: channels inside a feed-forward layer.
        context: tokens of a training window.
        rotary: makes the `Rotary` of all layers from `head_dim` and `heads`; None for no positions (NoPE).
        feed: makes a feed-forward layer from width and hidden; its `output` is the Linear that joins the residual stream.
        norm: makes a norm from the width.
        tied: the head has the weights of the embedding.
        checkpoint: keep only the inputs of a block for the backward pass, and compute the rest again.

    Raises:
        ValueError: sizes that don't fit together, a rotary of several axes, or a `bos` that is no token.
    """

    streams = False  # training batches begin anew: the state grows, and would hold all text of an epoch

    def __init__(
        self,
        vocabulary: int,
        bos: int | None,
        *,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        context: int,
        rotary: Callable[..., Rotary] | None = None,
        feed: Callable[[int, int], nn.Module] = GELU,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        tied: bool = True,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"model: {heads} heads don't divide a width of {width}")
        if bos is not None and not 0 <= bos < vocabulary:
            raise ValueError(f"model: bos={bos} is none of the {vocabulary} tokens")
        turn = None if rotary is None else rotary(head_dim=width // heads, heads=heads)
        if turn is not None and turn.axes != 1:
            raise ValueError(f"model: text has one axis, the rotary has {turn.axes}")
        self.vocabulary, self.bos, self.reach = vocabulary, bos, context - 1
        self.heads, self.head_dim, self.checkpoint = heads, width // heads, checkpoint
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, hidden, turn, feed, norm) for _ in range(layers))
        self.norm = norm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `models.initial_weights`."""
        blocks: list[Any] = list(self.blocks)
        normal(
            self, self.embed.embedding_dim, [ending for block in blocks for ending in (block.out, block.feed.output)]
        )

    def no_weight_decay(self) -> set[str]:
        """Embeddings, and learned frequencies."""
        spared = ("embed.weight", "head.weight", "rotary.frequencies")
        return {name for name, _ in self.named_parameters() if name.endswith(spared)}

    def rotaries(self) -> list[Rotary]:
        """The model's rotaries, each once."""
        return [module for module in self.modules() if isinstance(module, Rotary)]

    def initial(self, rows: int, device: torch.device | str | None = None) -> TransformerState:
        """The state before the first token of `rows` streams."""
        weight = self.embed.weight
        device = weight.device if device is None else device
        none = Grown(torch.empty(rows, self.heads, 0, self.head_dim, dtype=weight.dtype, device=device), 0, -1)
        document = Grown(torch.empty(rows, 0, dtype=torch.int64, device=device), 0, -1)
        return TransformerState(document, 0, (Cache(none, none),) * len(self.blocks))

    def forward(
        self, tokens: Tensor, state: TransformerState | None = None, *, reads: bool = True
    ) -> tuple[Tensor, TransformerState]:
        """Read on.

        One call equals any split of it, unless the scaling follows the length (dynamic NTK, LongRoPE): a call then turns
        its queries and all keys, those cached too, by the length at its own end. Splits still agree as long as the
        scaling doesn't change, and past that a model of one layer agrees at the end of every call; what deeper layers
        made of earlier tokens was made at the length of then.

        Args:
            tokens: (b, t) int64, t ≥ 1.
            state: as a call before returned it; None at the start. It may be read on from more than once.
            reads: for models that have a memory to switch off; here nothing is.

        Returns:
            Logits (b, t, vocabulary) of the token after each, and the next state.

        Raises:
            ValueError: no token, a token outside the vocabulary (seen on a CPU), or a state of another model or batch.
        """
        state = self.initial(len(tokens), tokens.device) if state is None else state
        if not torch.compiler.is_compiling():
            self._check(tokens, state)
        document, place = self._place(tokens, state)
        x, layers = self.embed(tokens), []
        for block, cache in zip(self.blocks, state.layers, strict=True):
            if self.checkpoint and torch.is_grad_enabled():
                x, cache = checkpoint(block, x, cache, place, use_reentrant=False)
            else:
                x, cache = block(x, cache, place)
            layers.append(cache)
        return self.head(self.norm(x)), TransformerState(document, state.read + tokens.shape[1], tuple(layers))

    def _place(self, tokens: Tensor, state: TransformerState) -> tuple[Grown, Place]:
        count, total = tokens.shape[1], state.read + tokens.shape[1]
        past = torch.arange(total, device=tokens.device)[:, None]
        position = past[state.read :]
        first: Any = self.blocks[0]
        phases = first.turn.phases(position, past if first.keeps_unturned else position)
        if self.bos is None and (count == 1 or not state.read):
            return state.document, Place(position, past, None, phases)
        causal = (position >= past.mT)[None, None]
        if self.bos is None:
            return state.document, Place(position, past, causal, phases)
        documents = (tokens == self.bos).cumsum(1)
        if state.read:
            documents = documents + state.document.memory[:, state.read - 1, None]
        document, all_documents = append(state.document, documents, -1)
        same = documents[:, None, :, None] == all_documents[:, None, None, :]
        return document, Place(position, past, causal & same, phases)

    def _check(self, tokens: Tensor, state: TransformerState) -> None:
        if tokens.ndim != 2 or not tokens.numel():
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; need (rows, at least 1)")
        if not tokens.is_cuda and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            worst = int(tokens.max()) if int(tokens.max()) >= self.vocabulary else int(tokens.min())
            raise ValueError(f"token {worst} is outside the vocabulary of {self.vocabulary}")
        wanted = (len(self.blocks), len(tokens), self.heads, self.head_dim)
        given = len(state.layers), *(state.layers[0].keys.memory.shape[axis] for axis in (0, 1, 3))
        if given != wanted:
            raise ValueError(
                f"the state belongs to another model or batch: its layers, rows, heads and channels are {given}, "
                f"where {wanted} are needed"
            )
