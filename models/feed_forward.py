"""Feed-forward layers of a language model's blocks, made by a factory (width, hidden) → module."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class GELU(nn.Module):
    """x W₁, GELU, W₂: (…, c) → (…, c).

    Args:
        width: channels c in and out.
        hidden: channels between the two matrices.
        bias: whether both matrices have one.

    `output` is the last Linear, whose result joins the residual stream.
    """

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.input = nn.Linear(width, hidden, bias=bias)
        self.output = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(functional.gelu(self.input(x)))


class SwiGLU(nn.Module):
    """silu(x W_g) ⊙ x W₁, W₂: (…, c) → (…, c) (arXiv 2002.05202).

    It has half as many parameters more than `GELU` of the same hidden width.

    Args:
        width: channels c in and out.
        hidden: channels between the matrices.
        bias: whether all three matrices have one.

    `output` is the last Linear, whose result joins the residual stream.
    """

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.input = nn.Linear(width, hidden, bias=bias)
        self.output = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(functional.silu(self.gate(x)) * self.input(x))
