"""Where a stream of tokens stands, apart from any layer: its chunk, its documents, and what of the past each token may see."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Stream(NamedTuple):
    """Bookkeeping that all layers of a chunked model share. Rows are independent; documents are counted per row from 0.

    Attributes:
        document: (b,) int64 the document that the last token belonged to.
        carried: (b, p) int64 documents of the tokens of the chunk before, −1 where there was none; p is 0 or c.
        current: (b, i) int64 documents of the tokens so far in this chunk, i < c.
        remembered: (b,) int64 the document that the bank holds, −1 while it is empty.
    """

    document: Tensor
    carried: Tensor
    current: Tensor
    remembered: Tensor


class Span(NamedTuple):
    """What a layer must know of the tokens it is given: k whole chunks of t = c tokens, or, k = 1, a piece of one.

    s is the number of keys: those carried from the chunk before, those of the chunk so far, and the t new ones.

    Attributes:
        seen: (b · k, 1, t, s) bool: keys that the full path sees.
        near: (b · k, 1, t, s') the same of the chunked path, of the last s' keys, the others being out of its reach; None
            where there is no such path.
        position: (t, 1) int64 of the new tokens within their chunk, 0 … c − 1.
        recalls: (b, k, t) bool: tokens of the document that the bank holds when their chunk begins.
        pooled: (b, k, t) bool: tokens that the writers pool, those of the last document so far in their chunk.
        restarts: (b,) bool: a document began in this span, so what the writers pooled of its chunk before is dropped.
        continues: (b, k) bool: the chunk's last document is the one that the bank holds; if not, the bank is cleared first.
        commits: whether the span ends its chunk, so that the bank is written.
        reads: False makes every bank answer with zero, to measure what it is worth.
    """

    seen: Tensor
    near: Tensor | None
    position: Tensor
    recalls: Tensor
    pooled: Tensor
    restarts: Tensor
    continues: Tensor
    commits: bool
    reads: bool = True


def begin(rows: int, chunk: int, carry: bool, device: torch.device | str | None = None) -> Stream:
    """The start of every stream."""
    none = torch.zeros(rows, 0, dtype=torch.int64, device=device)
    carried = torch.full((rows, chunk), -1, dtype=torch.int64, device=device) if carry else none
    remembered = torch.full((rows,), -1, dtype=torch.int64, device=device)
    return Stream(torch.zeros_like(remembered), carried, none, remembered)


def advance(
    stream: Stream, starts: Tensor, chunk: int, *, window: int | None, blocks: bool, reads: bool = True
) -> tuple[Span, Stream]:
    """Lay out the next tokens.

    Args:
        stream: where things stand.
        starts: (b, n) bool: tokens that begin a document; n is a multiple of `chunk` at a chunk's start, or stays within one.
        chunk: tokens of a chunk.
        window: tokens that the chunked path sees, itself included; None for no such path.
        blocks: the chunked path sees its own block of `window` tokens of the chunk, instead of the last `window` tokens.
        reads: see `Span`.
    """
    tokens = starts.shape[1]
    begun = stream.current.shape[1]
    chunks, t = (tokens // chunk, chunk) if tokens > chunk else (1, tokens)
    assert chunks == 1 or (begun == 0 and tokens % chunk == 0)
    document = stream.document[:, None] + starts.cumsum(1)  # (b, n)
    new = document.unflatten(1, (chunks, t))  # (b, k, t)
    own = torch.cat((stream.current, new[:, 0]), 1)[:, None] if chunks == 1 else new  # (b, k, i + t)
    before = stream.carried[:, None]
    if chunks > 1 and stream.carried.shape[1]:
        before = torch.cat((before, new[:, :-1]), 1)
    keys = torch.cat((before.expand(-1, chunks, -1), own), -1)  # (b, k, s)

    carried = stream.carried.shape[1]
    key = torch.arange(-carried, begun + t, device=starts.device)
    query = key[-t:, None]
    distance = query - key
    seen = (new[..., None] == keys[:, :, None, :]) & (distance >= 0)  # (b, k, t, s)
    near = None
    if window is not None:
        close = query // window == key // window if blocks else distance < window  # carried keys lie in blocks below 0
        within = min(len(key), t + window - 1)
        near = (seen & close)[..., -within:].flatten(0, 1).unsqueeze(1)

    last = own[..., -1]  # (b, k)
    remembered = torch.cat((stream.remembered[:, None], last[:, :-1]), 1)
    commits = begun + t == chunk
    span = Span(
        seen=seen.flatten(0, 1).unsqueeze(1),
        near=near,
        position=query,
        recalls=new == remembered[..., None],
        pooled=new == last[..., None],
        restarts=starts.any(1),
        continues=last == remembered,
        commits=commits,
        reads=reads,
    )
    if not commits:
        return span, stream._replace(document=document[:, -1], current=own[:, 0])
    carries = own[:, -1] if carried else stream.carried
    return span, Stream(document[:, -1], carries, stream.current[:, :0], last[:, -1])
