"""What a memory bank of the chunked language model is: something read by every token and written once a chunk."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.stream import Span


class Bank(Protocol):
    """A memory of constant size beside the attention of one layer.

    Tokens of a chunk read what chunks before it wrote, never their own, so that no token sees the future. The state is a
    NamedTuple of tensors whose first axis is the row; its floats are float32 whatever autocast says.
    """

    def initial(self, rows: int, device: torch.device | str | None = None) -> Any:
        """The empty bank."""

    def gate_parameters(self) -> list[nn.Parameter]:
        """What learns better at a higher rate than the rest."""

    def __call__(self, x: Tensor, state: Any, span: Span) -> tuple[Tensor, Any]:
        """Read, and pool or write.

        Args:
            x: (b, k, t, c) normed inputs of the layer: k whole chunks, or a piece of one (k = 1).
            state: as the last call left it.
            span: which tokens may read (`recalls`), which are pooled, what restarts, what is written (`commits`).

        Returns:
            What each head read, (b, k, t, h, d), zero for a token that doesn't recall; and the next state.
        """
