"""How much of each path a head takes: softmax weights over full, chunked and memory attention (after arXiv 2507.00453)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Fusion(nn.Module):
    """One weight a head and path, equal at the start.

    Args:
        width: channels of a token.
        heads: h.
        paths: p.
    """

    def __init__(self, width: int, heads: int, paths: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(heads, paths))

    def forward(self, x: Tensor) -> Tensor:
        """Normed tokens (b, k, t, c) → weights (b|1, k|1, t|1, h|1, p) that sum to 1 over p, float32."""
        return self.logits.float().softmax(-1)[None, None, None]


class ScalarFusion(Fusion):
    """One weight a path, shared by all heads, as the paper has it."""

    def __init__(self, width: int, heads: int, paths: int) -> None:
        super().__init__(width, 1, paths)


class TokenFusion(Fusion):
    """Weights of a head that each token moves by a linear map, which is zero at the start."""

    def __init__(self, width: int, heads: int, paths: int) -> None:
        super().__init__(width, heads, paths)
        self.shift = nn.Linear(width, heads * paths, bias=False)

    def reset_gates(self) -> None:
        """Zero the map; an initialiser of linear layers calls it last."""
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (self.logits.float() + self.shift(x).float().unflatten(-1, self.logits.shape)).softmax(-1)
