"""Documents in one long stream, cut for training into strands that run through an epoch and for evaluation into windows."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.batches import TokenBatch
from datamodules.token_files import TokenFile

IGNORED = -100


class DocumentStream:
    """Documents of a token file in some order, one after another.

    Args:
        file: the documents.
        bytes_per_token: (ids,) bytes that each id stands for.
        order: a permutation of the documents that `limited` keeps; None for as they lie.
        limit: tokens of the file to use, from its start; the last document may be cut.
    """

    def __init__(
        self, file: TokenFile, bytes_per_token: np.ndarray, order: np.ndarray | None = None, limit: int | None = None
    ) -> None:
        kept, lengths = limited(file, limit)
        order = np.arange(len(kept)) if order is None else order
        self.file = file
        self.bytes_per_token = bytes_per_token
        self.sources = file.starts[kept[order]]  # where each document starts in the file
        self.starts = np.concatenate(([0], lengths[order].cumsum()))  # and in the stream

    def __len__(self) -> int:
        return int(self.starts[-1])

    def cut(self, first: np.ndarray, columns: int, fresh: bool, since: np.ndarray) -> TokenBatch:
        """Takes rows of the stream; what lies behind its end is padded with targets that are ignored.

        Args:
            first: (b,) places in the stream where the rows start.
            columns: tokens of a row, t.
            fresh: whether the rows begin anew.
            since: (b,) where reading began from nothing: positions count from here where a document began before.
        """
        places = first[:, None] + np.arange(columns)  # (b, t)
        inside, follows = places < len(self), places + 1 < len(self)
        document, here = self._find(np.where(inside, places, 0))
        following, there = self._find(np.where(follows, places + 1, 0))
        told = follows & (following == document)
        tokens = self.file.read(here)
        targets = np.where(told, self.file.read(there), IGNORED)
        begun = np.maximum(self.starts[document], since[:, None])
        return TokenBatch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            position=torch.from_numpy(np.where(inside, places - begun, 0)),
            bytes=torch.from_numpy(np.where(told, self.bytes_per_token[targets], 0)),
            fresh=torch.full((len(first),), fresh),
            depth=torch.full((len(first),), torch.nan),
        )

    def _find(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The document at a place of the stream, and the place in the file."""
        document = np.searchsorted(self.starts, places, side="right") - 1
        return document, self.sources[document] + places - self.starts[document]


def limited(file: TokenFile, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Indices and tokens of the documents within the first `limit` tokens of a file, those of a beginning alone left out."""
    lengths = np.diff(file.starts)
    if limit is not None:
        lengths = np.clip(limit - file.starts[:-1], 0, lengths)
    (kept,) = (lengths > 1).nonzero()
    return kept, lengths[kept]


class TrainingStrands(Dataset[TokenBatch]):
    """Strands of equal length side by side, one for each row of each rank; items are batches, by (epoch, step).

    An epoch shuffles the documents and cuts their stream, up to a rest shorter than one step, into strands. Step s holds
    columns [s · segment, (s + 1) · segment) of this rank's strands.

    Args:
        file: documents.
        bytes_per_token: (ids,) bytes that each id stands for.
        rows: strands of a rank.
        segment: tokens of a step.
        rank, world: which strands of how many.
        seed: of the order.
        limit: as in `DocumentStream`.
        name: source and split, for messages.

    Raises:
        ValueError: if the stream is shorter than one step of all strands.
    """

    def __init__(
        self,
        file: TokenFile,
        bytes_per_token: np.ndarray,
        rows: int,
        segment: int,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        limit: int | None = None,
        name: str = "text",
    ) -> None:
        tokens = int(limited(file, limit)[1].sum())
        self.steps = tokens // (rows * world * segment)
        if self.steps == 0:
            raise ValueError(
                f"{name}: {tokens} tokens make no step of {segment} tokens on {rows} strands of {world} ranks; "
                "lower datamodule.batch_size or segment"
            )
        self.file, self.bytes_per_token, self.limit = file, bytes_per_token, limit
        self.rows, self.segment, self.seed = rows, segment, seed
        self.strands = rank * rows + np.arange(rows)
        self._laid: tuple[int, DocumentStream] | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: tuple[int, int]) -> TokenBatch:
        epoch, step = index
        begun = self.strands * self.steps * self.segment
        return self.stream(epoch).cut(begun + step * self.segment, self.segment, fresh=step == 0, since=begun)

    def stream(self, epoch: int) -> DocumentStream:
        """The stream of an epoch."""
        if self._laid is None or self._laid[0] != epoch:
            count = len(limited(self.file, self.limit)[0])
            order = np.random.default_rng([self.seed, epoch]).permutation(count)
            self._laid = (epoch, DocumentStream(self.file, self.bytes_per_token, order, self.limit))
        return self._laid[1]


class EvaluationWindows(Dataset[TokenBatch]):
    """A stream cut so that over all ranks each token but the documents' beginnings is predicted once; items are batches.

    Windows come `segment` tokens at a time, rows beginning anew with each window alone; the last piece of a window may be
    shorter. All ranks have the same number of batches of the same shapes.

    Args:
        stream: all documents.
        rows: windows of a batch and rank, at most.
        segment: tokens of a batch's row, at most.
        context: tokens of a window; None cuts the stream into as many windows as there are rows, so that each is read on.
        rank, world: which windows of how many.
        name: source and split, for messages.

    Raises:
        ValueError: if the stream is shorter than a window, or without windows than a segment or one token for each row.
    """

    def __init__(
        self,
        stream: DocumentStream,
        rows: int,
        segment: int,
        context: int | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        name: str = "text",
    ) -> None:
        tokens = len(stream)
        needed = {f"a context of {context}": context} if context else {
            f"a segment of {segment}": segment, f"{rows} rows on each of {world} ranks": rows * world
        }  # fmt: skip
        for what, count in needed.items():
            if tokens < count:
                raise ValueError(f"{name}: {tokens} tokens are too few for {what}")
        self.stream, self.rank, self.world = stream, rank, world
        self.window = context or -(-tokens // (rows * world))
        windows = -(-tokens // self.window)
        self.groups = -(-windows // (rows * world))
        self.rows = -(-windows // (self.groups * world))
        self.segment = min(segment, self.window)
        self.segments = -(-self.window // self.segment)

    def __len__(self) -> int:
        return self.groups * self.segments

    def __getitem__(self, index: int) -> TokenBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group, segment = divmod(index, self.segments)
        window = (group * self.world + self.rank) * self.rows + np.arange(self.rows)
        begun, done = window * self.window, segment * self.segment
        columns = min(self.segment, self.window - done)
        return self.stream.cut(begun + done, columns, fresh=segment == 0, since=begun)
