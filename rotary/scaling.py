"""What stretches trained frequencies to longer inputs: frozen dataclasses F → F, read from F itself, base-free.

A pair's speed is the length of its frequency vector |F[h, :, r]|, so one formula serves 1D, axial and mixed frequencies;
a pair at rest stays at rest. `length` is the extent (largest position + 1) that dynamic schemes look at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Scaling(Protocol):
    """F → F. `logit_gain` multiplies the softmax scale, `dynamic` says that `length` is needed."""

    @property
    def logit_gain(self) -> float: ...
    @property
    def dynamic(self) -> bool: ...
    def __call__(self, frequencies: Tensor, length: Tensor | None = None) -> Tensor: ...


def _positive(name: str, **values: float) -> None:
    for key, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: {key} must be positive, got {value}")


def _speed(frequencies: Tensor) -> Tensor:
    return frequencies.detach().double().norm(dim=-2, keepdim=True)  # (h, 1, r)


def _rung(frequencies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Continuous rung of each pair (h, 1, r) from 0, number of rungs and log spacing (h, 1, 1) of the head's ladder."""
    speed = _speed(frequencies)
    moving = speed > 0
    logs = torch.where(moving, speed.clamp(min=1e-300).log(), -math.inf)
    top = logs.amax(-1, keepdim=True)
    depth = torch.where(moving, top - logs, 0.0)
    order = depth.sort(dim=-1).values
    rungs = 1 + (order.diff(dim=-1) > 1e-6).sum(-1, keepdim=True)  # pairs of equal speed share a rung, as x and y do
    spacing = order[..., -1:] / (rungs - 1).clamp(min=1)
    return depth / torch.where(spacing > 0, spacing, 1.0), rungs, spacing


@dataclass(frozen=True)
class Identity:
    """No scaling: pure extrapolation."""

    logit_gain = 1.0
    dynamic = False

    def __call__(self, frequencies: Tensor, length: Tensor | None = None) -> Tensor:
        return frequencies


@dataclass(frozen=True)
class Interpolate:
    """Position interpolation: every frequency divided by `factor` (arXiv 2306.15595)."""

    factor: float
    logit_gain = 1.0
    dynamic = False

    def __post_init__(self) -> None:
        _positive("Interpolate", factor=self.factor)

    def __call__(self, frequencies: Tensor, length: Tensor | None = None) -> Tensor:
        return frequencies / self.factor


def _stretch(frequencies: Tensor, factor: float | Tensor) -> Tensor:
    rung, rungs, _ = _rung(frequencies)
    exponent = rung / (rungs - 1).clamp(min=1)
    return frequencies * (torch.as_tensor(factor, dtype=torch.float64, device=frequencies.device) ** -exponent)


@dataclass(frozen=True)
class NTK:
    """A larger base: the fastest pair is kept, the slowest is interpolated by `factor` (NTK-aware, arXiv 2309.00071)."""

    factor: float
    logit_gain = 1.0
    dynamic = False

    def __post_init__(self) -> None:
        _positive("NTK", factor=self.factor)

    def __call__(self, frequencies: Tensor, length: Tensor | None = None) -> Tensor:
        return _stretch(frequencies, self.factor).to(frequencies.dtype)


@dataclass(frozen=True)
class DynamicNTK:
    """NTK with a factor that follows the input: factor · length / original − (factor − 1), at least 1 (2309.00071 §3.3)."""

    factor: float
    original: int
    logit_gain = 1.0
    dynamic = True

    def __post_init__(self) -> None:
        _positive("DynamicNTK", factor=self.factor, original=self.original)

    def __call__(self, frequencies: Tensor, length: Tensor | None = None) -> Tensor:
        if length is None:
            raise ValueError("DynamicNTK needs the length of the input")
        factor = (self.factor * length.double() / self.original - (self.factor - 1)).clamp(min=1.0)
        return _stretch(frequencies, factor).to(frequencies.dtype)


@dataclass(frozen=True)
class YaRN:
    """Interpolate slow pairs, keep fast ones, ramp between (NTK by parts), and sharpen the softmax (arXiv 2309.00071).

    A pair that makes more than `fast` turns within `original` positions is kept, one that makes fewer than `slow` is
    interpolated. The ramp is linear in the rung of the ladder, as in every released checkpoint; its ends are rounded
    outwards to whole rungs (`truncate`). `gain` is the factor of cos and sin (None: 0.1 ln s + 1), so logits get gain².
    """

    factor: float
    original: float
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    gain: float | None = None
    dynamic = False

    def __post_init__(self) -> None:
        _positive("YaRN", factor=self.factor, original=self.original, fast=self.fast, slow=self.slow)

    @property
    def attention_factor(self) -> float:
        if self.gain is not None:
            return self.gain
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def logit_gain(self) -> float:
        return self.attention_factor**2

    def __call__(self, frequencies: Tensor, length: Tensor | None = None) -> Tensor:
        rung, rungs, spacing = _rung(frequencies)
        top = _speed(frequencies).amax(-1, keepdim=True)
        step = torch.where(spacing > 0, spacing, 1.0)

        def rung_of(turns: float) -> Tensor:
            return (top * self.original / (2 * math.pi * turns)).log() / step

        low, high = rung_of(self.fast), rung_of(self.slow)
        if self.truncate:
            low, high = low.floor(), high.ceil()
        low, high = low.clamp(min=0), torch.minimum(high, 2.0 * rungs - 1)
        high = torch.where(low == high, high + 1e-3, high)
        interpolated = ((rung - low) / (high - low)).clamp(0, 1)
        return (frequencies * (interpolated / self.factor + (1 - interpolated))).to(frequencies.dtype)


@dataclass(frozen=True)
class Llama3:
    """Keep wavelengths below original / high, divide those above original / low, blend between (Llama 3.1)."""

    factor: float
    original: float
    low: float
    high: float
    logit_gain = 1.0
    dynamic = False

    def __post_init__(self) -> None:
        _positive("Llama3", factor=self.factor, original=self.original, low=self.low, high=self.high)
        if self.high <= self.low:
            raise ValueError(f"Llama3: high ({self.high}) must exceed low ({self.low})")

    def __call__(self, frequencies: Tensor, length: Tensor | None = None) -> Tensor:
        turns = self.original * _speed(frequencies) / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (frequencies * (kept + (1 - kept) / self.factor)).to(frequencies.dtype)


@dataclass(frozen=True)
class LongRoPE:
    """A divisor for every pair, searched for: `short` up to `original` positions, `long` past it (arXiv 2402.13753).

    `gain` is the factor of cos and sin in both regimes, sqrt(1 + ln s / ln original) for an extension s if None.
    """

    short: Sequence[float]
    long: Sequence[float]
    original: float
    factor: float
    gain: float | None = None
    dynamic = True

    def __post_init__(self) -> None:
        _positive("LongRoPE", factor=self.factor, original=self.original)

    @property
    def attention_factor(self) -> float:
        if self.gain is not None:
            return self.gain
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original)) if self.factor > 1 else 1.0

    @property
    def logit_gain(self) -> float:
        return self.attention_factor**2

    def __call__(self, frequencies: Tensor, length: Tensor | None = None) -> Tensor:
        if length is None:
            raise ValueError("LongRoPE needs the length of the input")
        pairs = frequencies.shape[-1]
        if len(self.short) != pairs or len(self.long) != pairs:
            raise ValueError(f"LongRoPE: {len(self.short)} short and {len(self.long)} long factors for {pairs} pairs")
        short, long = (
            torch.tensor(list(row), dtype=torch.float64, device=frequencies.device) for row in (self.short, self.long)
        )
        return (frequencies / torch.where(length > self.original, long, short)).to(frequencies.dtype)


def _keep(frequencies: Tensor, fraction: float, fastest: bool) -> Tensor:
    speed = _speed(frequencies)
    moving = speed > 0
    count = (fraction * moving.sum(-1, keepdim=True).double()).floor().long()  # (h, 1, 1), of the pairs that turn
    order = torch.where(moving, speed, -math.inf if fastest else math.inf).sort(dim=-1, descending=fastest).values
    limit = order.gather(-1, (count - 1).clamp(min=0))
    kept = speed >= limit * (1 - 1e-6) if fastest else speed <= limit * (1 + 1e-6)  # equal speeds stay together
    return torch.where(kept & (count > 0), frequencies, 0.0)


@dataclass(frozen=True)
class Truncate:
    """p-RoPE: only the `fraction` of highest frequencies turns, the rest carries no position (arXiv 2410.06205).

    transformers calls it "proportional", where `factor` also divides what is kept.
    """

    fraction: float
    factor: float = 1.0
    logit_gain = 1.0
    dynamic = False

    def __post_init__(self) -> None:
        _positive("Truncate", factor=self.factor)
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"Truncate: fraction must lie in [0, 1], got {self.fraction}")

    def __call__(self, frequencies: Tensor, length: Tensor | None = None) -> Tensor:
        return _keep(frequencies, self.fraction, fastest=True) / self.factor


@dataclass(frozen=True)
class Reversed:
    """The ablation of p-RoPE: only the `fraction` of lowest frequencies turns (arXiv 2410.06205)."""

    fraction: float
    logit_gain = 1.0
    dynamic = False

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"Reversed: fraction must lie in [0, 1], got {self.fraction}")

    def __call__(self, frequencies: Tensor, length: Tensor | None = None) -> Tensor:
        return _keep(frequencies, self.fraction, fastest=False)
