"""The mean loss by how far a token stands from a beginning: of its document, of a window or of a chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from tasks.metrics.bits_per_byte import counted

_STARTS = (0, *(2**exponent for exponent in range(63)))


def label(start: int) -> str:
    """What the bin that begins with position `start`, 0 or a power of two, is called: "0", "1", "2-3", "4-7" …"""
    return str(start) if start < 2 else f"{start}-{2 * start - 1}"


class LossByPosition(Metric):
    """Nats a token in bins of position that double in width: 0, 1, 2-3, 4-7, 8-15, …

    `compute()` gives bin → mean as float64 scalars, in rising order, of the bins in which a target counted. The last
    bin of a window whose length is a power of two is its second half. For positions in chunks, give positions modulo
    the chunk.

    Args:
        kwargs: of torchmetrics.Metric.
    """

    higher_is_better = False
    full_state_update = False
    nats: Tensor
    tokens: Tensor
    starts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("starts", torch.tensor(_STARTS), persistent=False)
        for name in ("nats", "tokens"):
            self.add_state(name, torch.zeros(len(_STARTS), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, losses: Tensor, targets: Tensor, position: Tensor) -> None:
        """Adds a batch.

        Args:
            losses: (b, t) nats a token.
            targets: (b, t) int64, −100 where ignored.
            position: (b, t) int64 tokens since the beginning; at position p, p + 1 tokens have been read.

        Raises:
            ValueError, FloatingPointError: as `counted`; also a position below 0.
        """
        nats, kept = counted(losses, targets)
        if position.shape != targets.shape:
            raise ValueError(f"position {tuple(position.shape)} and targets {tuple(targets.shape)} must have one shape")
        if (kept & (position < 0)).any():
            raise ValueError(f"position {position[kept].min().item()} is below 0")
        bins = torch.bucketize(position.clamp(min=0), self.starts, right=True).sub_(1).flatten()
        self.nats.index_add_(0, bins, nats.flatten())
        self.tokens.index_add_(0, bins, kept.flatten().double())

    def compute(self) -> dict[str, Tensor]:
        means = self.nats / self.tokens
        return {label(_STARTS[index]): means[index] for index in self.tokens.nonzero().flatten().tolist()}
