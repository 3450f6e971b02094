"""`Rotary`: holds the frequencies of one attention layer and turns positions into phases, in one place for precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from rotary.frequencies import Frequencies
from rotary.rotate import rotate, unit
from rotary.scaling import Identity, Scaling


def phase_of(positions: Tensor, frequencies: Tensor) -> Tensor:
    """φ[…, h, n, r] = Σ_p positions[…, n, p] · frequencies[h, p, r], brought to [−π, π].

    The sum is taken in float64 by products, never by a matmul, which autocast or TF32 would round; only the reduced angle
    becomes float32, so position 2²⁰ is as exact as position 0.

    Args:
        positions: (*b, n, p) integer, float32 or float64.
        frequencies: (h, p, r) radians per unit of position.

    Returns:
        (*b, h, n, r) radians, float32, or float64 where positions are.

    Raises:
        TypeError: positions are in half precision, which can't tell 256 from 257.
        ValueError: the last axis of positions isn't p.
    """
    if positions.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(f"positions are {positions.dtype}, which can't tell 256 from 257; use integers or float32")
    if positions.shape[-1] != frequencies.shape[-2]:
        raise ValueError(f"positions have {positions.shape[-1]} axes, the frequencies have {frequencies.shape[-2]}")
    x, f = positions.double().unsqueeze(-3), frequencies.double()  # (*b, 1, n, p), (h, p, r)
    phase = x[..., 0, None] * f[:, None, 0]
    for axis in range(1, f.shape[-2]):
        phase = phase + x[..., axis, None] * f[:, None, axis]
    phase = phase - 2 * math.pi * (phase.detach() / (2 * math.pi)).round()
    return phase if positions.dtype == torch.float64 else phase.float()


class KeepsDtype(nn.Module):
    """A module whose own tensors move between devices but never change dtype, under `.half()` or `bf16-true` alike."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class Rotary(KeepsDtype):
    """Phases of positions, and the turn by them.

    F is kept unscaled. Fixed frequencies are a float64 buffer outside the state dict, so a checkpoint loads under any
    scaling; learnable ones are a float32 parameter `frequencies`. Neither changes its dtype with the module.

    Args:
        frequencies: a dataclass of `rotary.frequencies`.
        scaling: a dataclass of `rotary.scaling`; `logit_gain` must then multiply the softmax scale.
        head_dim: channels of a head.
        heads: heads that `frequencies` may tell apart.
        fraction: part of the channels that rotate, its own ladder squeezed into them (NeoX, Phi).
        learnable: whether F is a parameter.

    Raises:
        ValueError: the rotated width is odd, zero or wider than the head, or the frequencies can't fill it.
    """

    frequencies: Tensor

    def __init__(
        self,
        frequencies: Frequencies,
        scaling: Scaling = Identity(),  # noqa: B008 - frozen
        *,
        head_dim: int,
        heads: int = 1,
        fraction: float = 1.0,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        width = int(head_dim * fraction)
        if not 0 < width <= head_dim or width % 2:
            raise ValueError(
                f"Rotary: head_dim={head_dim} with fraction={fraction} rotates {width} channels; need even > 0"
            )
        self.head_dim, self.heads, self.pairs, self.axes = head_dim, heads, width // 2, frequencies.axes
        self.law, self.scaling = frequencies, scaling
        self.periodic = tuple(frequencies.periodic)
        matrix = frequencies(self.pairs, heads)
        if matrix.shape[0] not in (1, heads) or matrix.shape[1:] != (self.axes, self.pairs):
            raise ValueError(
                f"Rotary: {frequencies} made {tuple(matrix.shape)}, not (1|{heads}, {self.axes}, {self.pairs})"
            )
        if learnable:
            self.frequencies = nn.Parameter(matrix.float())
        else:
            self.register_buffer("frequencies", matrix, persistent=False)

    @classmethod
    def from_rope_parameters(
        cls,
        parameters: Mapping[str, Any],
        *,
        head_dim: int,
        max_position_embeddings: int | None = None,
        rope_theta: float | None = None,
        layer_type: str | None = None,
    ) -> Self:
        """The Rotary of a transformers config: see `rotary.rope_parameters.read`, which names what it refuses."""
        from rotary.rope_parameters import read

        return cls(**read(parameters, head_dim, max_position_embeddings, rope_theta, layer_type))

    def reset_parameters(self) -> None:
        """Write F again, as after `to_empty` from the meta device; mixed frequencies are drawn anew."""
        with torch.no_grad():
            self.frequencies.copy_(self.law(self.pairs, self.heads))

    @property
    def logit_gain(self) -> float:
        """What the softmax scale must be multiplied by: 1, but for YaRN and LongRoPE."""
        return self.scaling.logit_gain

    def scaled(self, length: Tensor | None = None) -> Tensor:
        """F after scaling, (h|1, p, r); `length` is an integer tensor, needed by dynamic scalings alone."""
        if not self.periodic:
            return self.scaling(self.frequencies, length)
        resting = torch.zeros(self.axes, 1, dtype=torch.bool, device=self.frequencies.device)
        resting[list(self.periodic)] = True
        scaled = self.scaling(self.frequencies.masked_fill(resting, 0.0), length)
        return torch.where(resting, self.frequencies, scaled)

    def forward(self, positions: Tensor, length: Tensor | int | None = None) -> Tensor:
        """Phases of positions.

        Args:
            positions: (*b, n, p) integer, float32 or float64.
            length: extent of the input for dynamic scalings; read off the positions (largest + 1) if None.

        Returns:
            (*b, h|1, n, r) radians in [−π, π], float32, or float64 where positions are.
        """
        extent = None
        if self.scaling.dynamic:
            extent = positions.amax() + 1 if length is None else torch.as_tensor(length, device=positions.device)
        return phase_of(positions, self.scaled(extent))

    def rotate(self, *tensors: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys, … of equal positions, each (*b, h, n, d), turned by one phase."""
        turn = unit(self(positions))
        return tuple(rotate(x, turn) for x in tensors)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, heads={self.heads}, pairs={self.pairs}, axes={self.axes}, {self.scaling}"
