"""How well a language model predicts text: nats a token, perplexity, and bits a byte, deaf to the tokeniser."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

IGNORED = -100
"""The target of a token that is not to be predicted."""


def counted(losses: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the targets that count.

    Args:
        losses: (b, t) nats a token.
        targets: (b, t) int64, −100 where ignored.

    Returns:
        (b, t) float64 losses, 0 where ignored, and (b, t) bool whether a target counts.

    Raises:
        ValueError: shapes differ.
        FloatingPointError: a loss that counts is not finite; names row and token.
    """
    if losses.shape != targets.shape:
        raise ValueError(f"losses {tuple(losses.shape)} and targets {tuple(targets.shape)} must have one shape")
    kept = targets != IGNORED
    nats = torch.where(kept, losses.double(), 0)
    broken = ~nats.isfinite()
    if broken.any():
        row, token = broken.nonzero()[0].tolist()
        raise FloatingPointError(
            f"the loss is {nats[row, token].item()} at row {row}, token {token} of the batch "
            f"(target {targets[row, token].item()})"
        )
    return nats, kept


class BitsPerByte(Metric):
    """`loss` in nats a token, `perplexity` = exp(loss), and `bits_per_byte`, over all targets that count.

    `compute()` gives float64 scalars: NaN where nothing was counted, and for bits where no target stands for text.

    Args:
        kwargs: of torchmetrics.Metric.
    """

    higher_is_better = False
    full_state_update = False
    nats: Tensor
    tokens: Tensor
    text_bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("nats", "tokens", "text_bytes"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, losses: Tensor, targets: Tensor, bytes: Tensor) -> None:
        """Adds a batch.

        Args:
            losses: (b, t) nats a token.
            targets: (b, t) int64, −100 where ignored.
            bytes: (b, t) int64 bytes of text that a target stands for.

        Raises:
            ValueError, FloatingPointError: as `counted`.
        """
        if bytes.shape != targets.shape:
            raise ValueError(f"bytes {tuple(bytes.shape)} and targets {tuple(targets.shape)} must have one shape")
        nats, kept = counted(losses, targets)
        self.nats += nats.sum()
        self.tokens += kept.sum()
        self.text_bytes += torch.where(kept, bytes, 0).sum()

    def compute(self) -> dict[str, Tensor]:
        loss = self.nats / self.tokens
        bits = self.nats / (math.log(2) * self.text_bytes)
        known = torch.where(self.text_bytes > 0, bits, torch.nan)
        return {"loss": loss, "perplexity": loss.exp(), "bits_per_byte": known}
