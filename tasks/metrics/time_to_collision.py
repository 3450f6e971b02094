"""Time until an object reaches the one that it follows, if both kept their speeds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tasks.metrics.kinematics import wrap

LONGEST = 5.0
"""Seconds, also where nothing is followed or the gap does not close."""
ALIGNED = math.radians(75)
"""Greatest difference of headings between an object and one that it follows."""
NARROWLY_ALIGNED = math.radians(10)
"""The same where they overlap sideways by less than `NARROW`."""
NARROW = 0.5
"""Metres."""
_CHUNK = 1 << 20  # pairs held at once


def time_to_collision(
    centers: Tensor,
    headings: Tensor,
    speeds: Tensor,
    sizes: Tensor,
    valid: Tensor,
    scored: Tensor,
    wrap_difference: bool = True,
) -> Tensor:
    """Gap to the object followed over the speed at which it closes.

    An object is followed if all of it lies ahead of the follower's front, it overlaps the straight track of the
    follower sideways, and the headings agree within `ALIGNED`; of several the one with the smallest gap counts.

    Args:
        centers: (a, n, 2) metres.
        headings: (a, n) radians in [−π, π).
        speeds: (a, n) m/s; where one of the two is NaN the result is `LONGEST`.
        sizes: (a, 2) length and width.
        valid: (a, n) bool, who can be followed.
        scored: (e,) int64 indices of the followers.
        wrap_difference: compare headings around the circle. Without, 3.1 and −3.1 rad count as opposed.

    Returns:
        (e, n) seconds, at most `LONGEST`.
    """
    scenes = max(1, _CHUNK // max(1, len(scored) * len(centers)))
    chunks = []
    for low in range(0, centers.shape[1], scenes):
        part = slice(low, low + scenes)
        chunks.append(
            _times(centers[:, part], headings[:, part], speeds[:, part], sizes, valid[:, part], scored, wrap_difference)
        )
    return torch.cat(chunks, dim=1)


def _times(
    centers: Tensor,
    headings: Tensor,
    speeds: Tensor,
    sizes: Tensor,
    valid: Tensor,
    scored: Tensor,
    wrap_difference: bool,
) -> Tensor:
    cosine, sine = headings.cos(), headings.sin()
    cos_ego, sin_ego = cosine[scored, None], sine[scored, None]  # (e, 1, n)
    turn_cosine = (cos_ego * cosine + sin_ego * sine).abs()  # (e, a, n)
    turn_sine = (cos_ego * sine - sin_ego * cosine).abs()
    difference = headings - headings[scored, None]
    difference = (wrap(difference) if wrap_difference else difference).abs()
    x, y = (centers - centers[scored, None]).unbind(-1)
    half = sizes / 2
    length, width = half[:, 0, None], half[:, 1, None]  # (a, 1)
    half_ego = half[scored, :, None, None]  # (e, 2, 1, 1)
    gap = cos_ego * x + sin_ego * y - half_ego[:, 0] - (length * turn_cosine + width * turn_sine)
    overlap = (cos_ego * y - sin_ego * x).abs() - half_ego[:, 1] - (length * turn_sine + width * turn_cosine)
    followed = (gap > 0) & (difference <= ALIGNED) & (overlap < 0) & valid
    followed &= (overlap < -NARROW) | (difference <= NARROWLY_ALIGNED)
    gap, leader = gap.masked_fill_(~followed, math.inf).min(1)  # (e, n)
    closing = speeds[scored] - speeds.gather(0, leader)
    return torch.where(closing > 0, (gap / closing).clamp_max(LONGEST), LONGEST)
