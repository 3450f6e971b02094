"""Where tokens are: functions that return positions (…, n, p), one column an axis, for `Rotary`.

Only differences reach attention, so origins are free; large coordinates should be centred first (`poses` does it).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sequence(length: int, offset: int = 0, device: torch.device | str | None = None) -> Tensor:
    """offset, offset + 1, …: (length, 1) int64. `offset` is the number of tokens already cached."""
    return torch.arange(offset, offset + length, device=device)[:, None]


def packed(lengths: Sequence[int], *, restart: bool, shared_first: bool = False) -> Tensor:
    """Documents laid end to end in one window: (n, 1) int64.

    Args:
        lengths: tokens of each document.
        restart: count from the start of each document, or on through the window (AnchorAttention, arXiv 2411.13476).
        shared_first: the window opens with one token at position 0 that all documents see, so n = 1 + Σ lengths and
            counting starts, or restarts, at 1.
    """
    if any(length < 1 for length in lengths):
        raise ValueError(f"packed: every document needs a token, got lengths {list(lengths)}")
    first = int(shared_first)
    runs = [torch.arange(first, first + length) for length in lengths] if restart else []
    body = torch.cat(runs) if runs else torch.arange(first, first + sum(lengths))
    return torch.cat((torch.zeros(first, dtype=torch.int64), body))[:, None]


def documents(lengths: Sequence[int], *, shared_first: bool = False) -> Tensor:
    """Which document a packed token belongs to: (n,) int64 from 1; 0 is the shared first token."""
    body = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(list(lengths)))
    return torch.cat((torch.zeros(int(shared_first), dtype=torch.int64), body))


def hierarchy(unit: Tensor, offset: Tensor) -> Tensor:
    """Two levels of position, as (token, function) in code (HiRoPE, arXiv 2403.19115): columns (offset, unit).

    Args:
        unit: (*b, n) index of the unit (function, sentence, frame) that holds the token.
        offset: (*b, n) position of the token, global or within its unit.
    """
    if unit.shape != offset.shape:
        raise ValueError(f"hierarchy: unit {tuple(unit.shape)} and offset {tuple(offset.shape)} differ in shape")
    return torch.stack((offset, unit), dim=-1)


def grid(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Integer patch coordinates in row-major order: (height · width, 2) float32, columns (x, y) (arXiv 2403.13298)."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1).float()


def normalised_grid(
    height: int, width: int, *, keep_aspect: bool = False, device: torch.device | str | None = None
) -> Tensor:
    """Patch centres scaled to [−1, 1]: (height · width, 2) float32, columns (x, y) (arXiv 2508.10104).

    With `keep_aspect` the longer side spans [−1, 1] and both axes share that scale.
    """
    size = torch.tensor([width, height], dtype=torch.float64, device=device)
    span = size.amax().expand(2) if keep_aspect else size
    centres = (grid(height, width, device).double() + 0.5) / span
    return (2 * centres - 1).float()


def augment(
    positions: Tensor,
    *,
    shift: float = 0.0,
    jitter: float = 1.0,
    rescale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One random map of all positions, for training (arXiv 2508.10104): an added shift, then two log-uniform factors.

    Args:
        positions: (…, n, p) floating point.
        shift: each axis moves by U(−shift, shift).
        jitter: each axis is scaled by a factor in [1 / jitter, jitter].
        rescale: all axes are scaled by one factor in [1 / rescale, rescale].

    Raises:
        ValueError: shift < 0, or jitter or rescale < 1.
    """
    if shift < 0 or jitter < 1 or rescale < 1:
        raise ValueError(f"augment: need shift ≥ 0, jitter ≥ 1, rescale ≥ 1; got {shift}, {jitter}, {rescale}")

    def uniform(count: int) -> Tensor:
        draw = torch.rand(
            count, generator=generator, dtype=torch.float32, device=generator.device if generator else None
        )
        return (2 * draw - 1).to(positions.device)

    axes = positions.shape[-1]
    moved = positions + shift * uniform(axes)
    return moved * torch.tensor(jitter).pow(uniform(axes)) * torch.tensor(rescale).pow(uniform(1))


def poses(xy: Tensor, heading: Tensor, time: Tensor | None = None, origin: Tensor | None = None) -> Tensor:
    """Poses of agents: columns (x, y, heading[, time]) for `Directional` (arXiv 2503.15029).

    The origin is subtracted in float64 before anything becomes float32: 10 km of offset cost a logit 6e-4 otherwise.

    Args:
        xy: (*b, n, 2) metres.
        heading: (*b, n) radians, any multiple of 2π apart.
        time: (*b, n) in steps.
        origin: (*b, 2) metres; the mean position of the scene if None.

    Returns:
        (*b, n, 3 | 4) float32.
    """
    wide = xy.double()
    centre = wide.mean(-2) if origin is None else origin.double()
    columns = [wide - centre[..., None, :], heading.double()[..., None]]
    if time is not None:
        columns.append(time.double()[..., None])
    return torch.cat(columns, dim=-1).float()
