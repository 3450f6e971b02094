"""How fast each pair of channels turns along each axis: frozen dataclasses that make the matrix F (h|1, p, r).

Radians per unit of position, float64, highest frequency first within a ladder. Nothing here knows a length or a scaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Frequencies(Protocol):
    """What a `Rotary` is built from. `axes` is p; `periodic` lists the axes a scaling must leave alone."""

    @property
    def axes(self) -> int: ...
    @property
    def periodic(self) -> tuple[int, ...]: ...
    def __call__(self, pairs: int, heads: int) -> Tensor: ...


def ladder(base: float, rungs: int) -> Tensor:
    """base^(−i / rungs) for i = 0 … rungs − 1: (rungs,) float64."""
    if base <= 0:
        raise ValueError(f"frequencies: base must be positive, got {base}")
    return base ** (-torch.arange(rungs, dtype=torch.float64) / rungs)


def _place(rungs: Tensor, axis_of_pair: Tensor, axes: int) -> Tensor:
    matrix = torch.zeros(1, axes, len(rungs), dtype=torch.float64)
    matrix[0, axis_of_pair, torch.arange(len(rungs))] = rungs
    return matrix


@dataclass(frozen=True)
class Geometric:
    """One axis, one ladder base^(−i/r): the original RoPE (arXiv 2104.09864)."""

    base: float
    axes = 1
    periodic = ()

    def __call__(self, pairs: int, heads: int) -> Tensor:
        return ladder(self.base, pairs)[None, None]


@dataclass(frozen=True)
class Axial:
    """Blocks of pairs, one a coordinate and each with its own ladder: RoPE-Axial, base 100 (arXiv 2403.13298).

    Raises:
        ValueError: the pairs don't divide by the number of axes.
    """

    base: float
    axes: int = 2
    periodic = ()

    def __call__(self, pairs: int, heads: int) -> Tensor:
        if pairs % self.axes:
            raise ValueError(f"Axial: {pairs} pairs (head width {2 * pairs}) don't divide by {self.axes} axes")
        rungs = ladder(self.base, pairs // self.axes)
        return _place(rungs.repeat(self.axes), torch.arange(self.axes).repeat_interleave(len(rungs)), self.axes)


@dataclass(frozen=True)
class Mixed:
    """Free 2D frequencies for every head, meant to be learned: RoPE-Mixed, base 10 (arXiv 2403.13298).

    Each head starts as an axial encoding whose two axes are turned by one angle, drawn uniformly from torch's global
    generator, or given as `angles` (one a head).
    """

    base: float
    angles: Sequence[float] | None = None
    axes = 2
    periodic = ()

    def __call__(self, pairs: int, heads: int) -> Tensor:
        if pairs % 2:
            raise ValueError(f"Mixed: {pairs} pairs (head width {2 * pairs}) don't divide by 2")
        if self.angles is not None and len(self.angles) != heads:
            raise ValueError(f"Mixed: {len(self.angles)} angles for {heads} heads")
        if self.angles is None:
            turn = torch.rand(heads, dtype=torch.float64) * (2 * math.pi)
        else:
            turn = torch.tensor(list(self.angles), dtype=torch.float64)
        rungs = ladder(self.base, pairs // 2)
        direction = torch.stack((turn, turn + math.pi / 2), dim=-1)[..., None]  # (h, 2, 1)
        x, y = direction.cos() * rungs, direction.sin() * rungs  # (h, 2, r / 2)
        return torch.stack((x.flatten(1), y.flatten(1)), dim=1)


def sections(counts: Sequence[int]) -> list[int]:
    """Axis of each pair when axis a owns a run of counts[a] pairs: M-RoPE's (16, 24, 24)."""
    return [axis for axis, count in enumerate(counts) for _ in range(count)]


def cycle(axes: Sequence[int], pairs: int, tail: Sequence[int] = ()) -> list[int]:
    """Axis of each pair when `axes` alternate over the first pairs − len(tail) and `tail` ends the list: VideoRoPE's."""
    return [axes[pair % len(axes)] for pair in range(pairs - len(tail))] + list(tail)


@dataclass(frozen=True)
class Assigned:
    """Any allocation of pairs to axes: `axis_of_pair[t]` is the coordinate that turns pair t (−1: none).

    One ladder runs over all pairs (M-RoPE, VRoPE, VideoRoPE: arXiv 2502.11664, 2502.05173), or each axis has its own
    (`ladder_per_axis`, as FLUX). Axes in `still` get frequency zero but keep their rungs (HoPE, arXiv 2505.20444).
    With `periods`, a frequency is 2π times its rung: coordinates then count turns (DINOv3, arXiv 2508.10104).
    """

    axis_of_pair: Sequence[int]
    base: float
    axes: int
    ladder_per_axis: bool = False
    still: Sequence[int] = ()
    periods: bool = False
    periodic = ()

    def __call__(self, pairs: int, heads: int) -> Tensor:
        axis = torch.tensor(list(self.axis_of_pair))
        if len(axis) != pairs:
            raise ValueError(f"Assigned: axis_of_pair names {len(axis)} pairs, the head has {pairs}")
        if axis.max() >= self.axes or axis.min() < -1:
            raise ValueError(f"Assigned: axis_of_pair must lie in −1 … {self.axes - 1}, got {list(self.axis_of_pair)}")
        rungs = ladder(self.base, pairs)
        if self.ladder_per_axis:
            for a in axis.unique().tolist():
                rungs[axis == a] = ladder(self.base, int((axis == a).sum()))
        resting = torch.tensor([a == -1 or a in tuple(self.still) for a in axis.tolist()])
        rungs = torch.where(resting, 0.0, rungs * (2 * math.pi if self.periods else 1.0))
        return _place(rungs, axis.clamp(min=0), self.axes)


@dataclass(frozen=True)
class Directional:
    """Poses (x, y, heading[, time]): headings turn pairs by whole multiples of the angle itself (DRoPE, 2503.15029).

    Intra-head by default: in every head the first `heading_share` of the pairs carries the heading, the rest is split
    between the other axes, each with its own ladder. Head by head (`heading_heads`: a number of heads, or below 1 a share
    of them): those heads carry the heading on all their pairs and the others carry no heading. `harmonics` are cycled over
    the heading's pairs; (1,) is the paper. Position ladders are base^(−i/n) over metres, or geometric between two
    `wavelengths` in metres.

    Attributes:
        time_share: part of the pairs without heading that carries time; None for as many as x or y.
        heading_base: an ordinary ladder for headings instead: not periodic, the case that DRoPE mends.
        across_heads: one ladder (and one cycle of harmonics) is dealt out to the heads, so that narrow heads still cover
            all wavelengths between them; otherwise every head has a ladder of its own, the same.
    """

    base: float | None = None
    wavelengths: tuple[float, float] | None = None
    harmonics: Sequence[int] = (1,)
    heading_share: float = 0.5
    heading_heads: float = 0
    time_base: float | None = None
    time_share: float | None = None
    heading_base: float | None = None
    across_heads: bool = False

    @property
    def axes(self) -> int:
        return 3 if self.time_base is None else 4

    @property
    def periodic(self) -> tuple[int, ...]:
        return (2,) if self.heading_base is None else ()

    def _rungs(self, count: int) -> Tensor:
        if (self.base is None) == (self.wavelengths is None):
            raise ValueError("Directional: give either base or wavelengths")
        if self.base is not None:
            return ladder(self.base, count)
        shortest, longest = self.wavelengths or (1.0, 1.0)
        if not 0 < shortest <= longest < math.inf:
            raise ValueError(f"Directional: wavelengths must be positive and ascending, got {shortest} and {longest}")
        steps = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
        return 2 * math.pi / (shortest * (longest / shortest) ** steps)

    def _travel(self, pairs: int, head: int, heads: int) -> Tensor:
        timed = 0 if self.time_base is None else round(pairs * (1 / 3 if self.time_share is None else self.time_share))
        uneven = self.time_base is not None and self.time_share is None and pairs % 3
        if uneven or (pairs - timed) % 2:
            axes = 2 if self.time_base is None else 3
            raise ValueError(f"Directional: {pairs} pairs for {axes} axes of position and time don't divide")
        count = (pairs - timed) // 2
        metres = self._rungs(count * heads)[head::heads]
        rungs = [metres, metres]
        if self.time_base is not None:
            rungs.append(ladder(self.time_base, timed * heads)[head::heads])
        axis_of_pair = torch.tensor(sections((count, count, 0, timed)), dtype=torch.int64)
        return _place(torch.cat(rungs), axis_of_pair, self.axes)

    def _heading(self, pairs: int, head: int, heads: int) -> Tensor:
        if any(h != int(h) or h == 0 for h in self.harmonics):
            raise ValueError(f"Directional: harmonics must be non-zero integers, got {tuple(self.harmonics)}")
        first = head * pairs
        whole = [float(self.harmonics[(first + i) % len(self.harmonics)]) for i in range(pairs)]
        rungs = torch.tensor(whole, dtype=torch.float64)
        if self.heading_base is not None:
            rungs = ladder(self.heading_base, pairs * heads)[head::heads]
        return _place(rungs, torch.full((pairs,), 2), self.axes)

    def __call__(self, pairs: int, heads: int) -> Tensor:
        share = self.heading_heads
        if share > 1 and share != int(share):
            raise ValueError(f"Directional: heading_heads={share}, expected a whole number of heads or a share below 1")
        if not 0 <= self.heading_share <= 1:
            raise ValueError(f"Directional: heading_share={self.heading_share}, expected a number from 0 to 1")
        turning = round(share * heads) if share < 1 else int(share)
        if share and not 0 < turning < heads:
            raise ValueError(f"Directional: heading_heads={share} of {heads} heads leaves none to one side")
        groups = [(pairs, turning), (0, heads - turning)] if share else [(round(pairs * self.heading_share), heads)]
        rows = []
        for turned, count in groups:
            for head in range(count):
                part = (head, count) if self.across_heads else (0, 1)
                rows.append(torch.cat((self._heading(turned, *part), self._travel(pairs - turned, *part)), dim=-1))
        return torch.cat(rows if share or self.across_heads else rows[:1])


@dataclass(frozen=True)
class Subset:
    """A few pairs of one ladder, chosen for each head: `chosen[h]` are rungs of a ladder of `rungs` (arXiv 2503.01586).

    The head rotates as many pairs as are chosen; the others carry no position.
    """

    base: float
    rungs: int
    chosen: Sequence[Sequence[int]]
    axes = 1
    periodic = ()

    def __call__(self, pairs: int, heads: int) -> Tensor:
        if len(self.chosen) != heads or any(len(row) != pairs for row in self.chosen):
            shape = [len(row) for row in self.chosen]
            raise ValueError(f"Subset: chosen has {shape} pairs a head, the layer has {heads} heads of {pairs} pairs")
        index = torch.tensor([list(row) for row in self.chosen])
        if index.min() < 0 or index.max() >= self.rungs:
            raise ValueError(f"Subset: chosen must lie in 0 … {self.rungs - 1}")
        return ladder(self.base, self.rungs)[index][:, None]
