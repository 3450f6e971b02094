"""Speeds and accelerations of recorded or simulated tracks by central differences, undefined (NaN) where a neighbour lacks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

STEP = 0.1
"""Seconds between two steps."""


def wrap(angle: Tensor) -> Tensor:
    """Angles in [−π, π), radians, any shape."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def central_difference(values: Tensor) -> Tensor:
    """(..., t) half the difference of the two neighbours, NaN at both ends."""
    return functional.pad((values[..., 2:] - values[..., :-2]) / 2, (1, 1), value=math.nan)


def central_and(valid: Tensor) -> Tensor:
    """(..., t) bool, whether both neighbours are valid; False at both ends."""
    return functional.pad(valid[..., 2:] & valid[..., :-2], (1, 1), value=False)


def linear_motion(positions: Tensor, step: float = STEP) -> tuple[Tensor, Tensor]:
    """Speed along the track and its rate.

    Args:
        positions: (..., t, 2 or 3) metres.
        step: seconds between two steps.

    Returns:
        (..., t) speed in m/s, NaN at both ends, and (..., t) acceleration in m/s², NaN at the two outer steps each.
    """
    speed = central_difference(positions.movedim(-1, 0)).norm(dim=0) / step
    return speed, central_difference(speed) / step


def angular_motion(headings: Tensor, step: float = STEP) -> tuple[Tensor, Tensor]:
    """Yaw rate and its rate; a turn over two steps is taken the short way round, so at most π/2 a step is seen.

    Args:
        headings: (..., t) radians, wrapped or not.
        step: seconds between two steps.

    Returns:
        (..., t) rate in rad/s, NaN at both ends, and (..., t) its rate in rad/s², NaN at the two outer steps each.
    """
    turn = wrap(central_difference(headings) * 2) / 2
    change = wrap(central_difference(turn) * 2) / 2
    return turn / step, change / step**2
