"""Rigid motions of the plane as x, y, heading, and the distance between two placed boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def wrap(angle: Tensor) -> Tensor:
    """Any shape: the angle in [−π, π)."""
    turned = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    return torch.where(turned >= math.pi, -math.pi, turned)  # remainder rounds up to 2π just below 0


def wrapped(angle: Tensor) -> Tensor:
    """Any shape: the angle in [−π, π) as float32, which rounds angles just below π up to it."""
    narrow = wrap(angle.double()).float()
    return torch.where(narrow >= math.pi, -math.pi, narrow)


def compose(pose: Tensor, local: Tensor) -> Tensor:
    """Poses (…, 3) and `local` (…, 3) in their frames, broadcast together → (…, 3) in the frame of `pose`, heading in
    [−π, π)."""
    x, y, heading = pose.unbind(-1)
    forward, left, turn = local.unbind(-1)
    cos, sin = heading.cos(), heading.sin()
    return torch.stack(
        torch.broadcast_tensors(x + cos * forward - sin * left, y + sin * forward + cos * left, wrap(heading + turn)),
        -1,
    )


def relative(pose: Tensor, other: Tensor) -> Tensor:
    """`other` (…, 3) as seen from `pose` (…, 3), broadcast together: `compose(pose, relative(pose, other)) == other`, but
    for whole turns; heading in [−π, π)."""
    dx, dy, turn = (other - pose).unbind(-1)
    cos, sin = pose[..., 2].cos(), pose[..., 2].sin()
    return torch.stack(torch.broadcast_tensors(cos * dx + sin * dy, cos * dy - sin * dx, wrap(turn)), -1)


def inverse(pose: Tensor) -> Tensor:
    """(…, 3) → (…, 3), the origin as seen from `pose`."""
    return relative(pose, torch.zeros_like(pose))


def mirror(pose: Tensor) -> Tensor:
    """(…, 3) → (…, 3), left and right exchanged: y and heading change sign."""
    return pose * pose.new_tensor((1.0, -1.0, -1.0))


def box_corners(pose: Tensor, box: Tensor) -> Tensor:
    """Corners (…, 4, 2) of boxes (…, 2), length and width, at poses (…, 3): left front, right front, right back, left
    back."""
    signs = box.new_tensor(((0.5, 0.5), (0.5, -0.5), (-0.5, -0.5), (-0.5, 0.5)))
    forward, left = (signs * box[..., None, :]).unbind(-1)  # (…, 4)
    cos, sin = pose[..., 2, None].cos(), pose[..., 2, None].sin()
    x = pose[..., 0, None] + cos * forward - sin * left
    y = pose[..., 1, None] + sin * forward + cos * left
    return torch.stack((x, y), -1)


def corner_distance(placed: Sequence[Tensor], box: Tensor, corners: Tensor) -> Tensor:
    """Sum of the four distances between the corners of a box and other corners. Not for gradients.

    Args:
        placed: where the box is: x, y, and cos and sin of its heading, each (…).
        box: (…, 2) length and width.
        corners: (…, 4, 2) as `box_corners` gives them.

    Returns:
        (…), all but the last axes named being broadcast together.
    """
    x, y, cos, sin = placed
    half_length, half_width = (box / 2).unbind(-1)
    along_x, along_y = half_length * cos, half_length * sin
    across_x, across_y = half_width * sin, half_width * cos
    total: Tensor | None = None
    for corner, (front, left) in enumerate(((1, 1), (1, -1), (-1, -1), (-1, 1))):
        dx = x + (front * along_x - left * across_x - corners[..., corner, 0])
        dy = y + (front * along_y + left * across_y - corners[..., corner, 1])
        distance = (dx * dx + dy * dy).sqrt_()
        total = distance if total is None else total.add_(distance)
    assert total is not None
    return total


def corner_distances(corners: Tensor, others: Tensor) -> Tensor:
    """(r, n) the sums of the four distances between corners (r, 4, 2) and (n, 4, 2). Not for gradients."""
    total: Tensor | None = None
    for mine, other in zip(corners.unbind(1), others.unbind(1), strict=True):
        dx, dy = (other[:, axis].contiguous() - mine[:, axis, None] for axis in (0, 1))
        distance = dx.square_().add_(dy.square_()).sqrt_()
        total = distance if total is None else total.add_(distance)
    assert total is not None
    return total


def unicycle(speed: Tensor, acceleration: Tensor, yaw_rate: Tensor, times: Tensor) -> Tensor:
    """Poses (…, t, 3) at `times` (t,) seconds, in the frame of the start, by the midpoint rule from speeds, accelerations and
    yaw rates (…): all the way goes along the heading of half the time, at the speed of half the time."""
    speed, acceleration, yaw_rate = speed[..., None], acceleration[..., None], yaw_rate[..., None]
    distance = (speed + acceleration * times / 2) * times
    turn = (yaw_rate * times).expand_as(distance)
    return torch.stack((distance * (turn / 2).cos(), distance * (turn / 2).sin(), turn), -1)
