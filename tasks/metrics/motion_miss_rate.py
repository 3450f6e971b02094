"""When a predicted future matches the record, and the miss rate of motion forecasting (arXiv 2104.10133)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tasks.metrics.motion_tracks import Groups

SLOW, FAST = 1.4, 11.0
SLOW_SCALE, FAST_SCALE = 0.5, 1.0


class Horizon(NamedTuple):
    """A moment of measurement.

    Attributes:
        seconds: into the future.
        step: index of the predicted step.
        lateral, longitudinal: the greatest distance in metres at which a fast agent still matches.
    """

    seconds: int
    step: int
    lateral: float
    longitudinal: float


HORIZONS = (Horizon(3, 5, 1.0, 2.0), Horizon(5, 9, 1.8, 3.6), Horizon(8, 15, 3.0, 6.0))


def speed_scale(speed: Tensor) -> Tensor:
    """Factor on the thresholds by the speed at the current step: 0.5 below 1.4 m/s, 1 above 11 m/s, linear between."""
    fraction = ((speed - SLOW) / (FAST - SLOW)).clamp(0, 1)
    return SLOW_SCALE + (FAST_SCALE - SLOW_SCALE) * fraction


def matches(trajectories: Tensor, groups: Groups, horizon: Horizon) -> tuple[Tensor, Tensor]:
    """Whether all agents of a joint future are near enough to the record, along and across their recorded heading.

    Args:
        trajectories: (m, k, n, 16, 2) metres.
        groups: the recorded tracks.
        horizon: when, and how near.

    Returns:
        (m, k) bool, and (m,) bool that is False where an agent of the group isn't valid at that step.
    """
    offset = trajectories[..., horizon.step, :].double() - groups.positions[:, None, :, horizon.step]
    heading = groups.headings[:, None, :, horizon.step]
    cosine, sine = heading.cos(), heading.sin()
    along = cosine * offset[..., 0] + sine * offset[..., 1]
    across = cosine * offset[..., 1] - sine * offset[..., 0]
    scale = speed_scale(groups.start_speed)[:, None]
    near = (along.abs() / scale <= horizon.longitudinal) & (across.abs() / scale <= horizon.lateral)
    measured = (groups.valid[..., horizon.step] | ~groups.member).all(-1)
    return (near | ~groups.member[:, None]).all(-1), measured


def misses(matched: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    """(m,) 1.0 where none of the (m, k) futures matched, and (m,) bool whether the group counts."""
    return torch.where(measured, (~matched.any(1)).double(), 0.0), measured
