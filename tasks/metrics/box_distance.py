"""Signed distance between boxes with rounded corners, and from each of some objects to the nearest other one."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 0.7
"""Radius of a corner over half of the shorter side: 0 has sharp corners, 1 makes capsules."""
FAR = 1e10
"""Metres to the nearest object where there is none."""
_SLACK = 1e-2  # metres by which float32 bounds may be off
_CHUNK = 1 << 21  # pairs held at once


def box_distance(offset: Tensor, heading: Tensor, other_heading: Tensor, size: Tensor, other_size: Tensor) -> Tensor:
    """Distance between two boxes in the plane, negative by the depth of penetration where they overlap.

    Args:
        offset: (..., 2) centre of the other box minus centre of the box, metres.
        heading, other_heading: (...) radians.
        size, other_size: (..., 2) length and width, metres.

    Returns:
        (...) metres: between overlapping boxes minus the shortest translation that parts them.
    """
    half, other_half = size / 2, other_size / 2
    ahead = _turn(offset, -heading)  # the other centre in the frame of the box
    behind = _turn(-offset, -other_heading)
    turn = other_heading - heading
    cosine, sine = turn.cos(), turn.sin()
    reach = _extent(other_half, cosine, sine)
    other_reach = _extent(half, cosine, sine)
    # Boxes overlap unless an axis of one of them parts them; the depth is that along the axis of least overlap.
    gaps = torch.cat((ahead.abs() - half - reach, behind.abs() - other_half - other_reach), dim=-1)
    parted = gaps.amax(-1)
    # Between convex shapes apart, a corner of one of them is the nearest point.
    nearest = torch.minimum(
        _to_corners(ahead, half, other_half, cosine, sine), _to_corners(behind, other_half, half, cosine, -sine)
    )
    return torch.where(parted > 0, nearest, parted)


def rounded_box_distance(
    offset: Tensor,
    heading: Tensor,
    other_heading: Tensor,
    size: Tensor,
    other_size: Tensor,
    rounding: float = ROUNDING,
) -> Tensor:
    """`box_distance` of boxes whose corners are rounded with `rounding` times half of the shorter side."""
    radius, other_radius = (rounding / 2 * sides.amin(-1) for sides in (size, other_size))
    core, other_core = size - 2 * radius[..., None], other_size - 2 * other_radius[..., None]
    return box_distance(offset, heading, other_heading, core, other_core) - radius - other_radius


def nearest_object(
    centers: Tensor, headings: Tensor, sizes: Tensor, valid: Tensor, scored: Tensor, rounding: float = ROUNDING
) -> Tensor:
    """Signed distance of rounded boxes to the nearest other valid one.

    A box holds the circle of its half width and lies in one through its corners, which bounds each distance from the
    centres alone; only pairs that can be the nearest by these bounds are worked out.

    Args:
        centers: (a, n, 2) metres.
        headings: (a, n) radians.
        sizes: (a, 2) length and width.
        valid: (a, n) bool.
        scored: (e,) int64 indices of the objects to measure from.
        rounding: as for `rounded_box_distance`.

    Returns:
        (e, n) metres, `FAR` where the object is not valid or alone.
    """
    scenes = max(1, _CHUNK // max(1, len(scored) * len(centers)))
    chunks = [
        _nearest(centers[:, low : low + scenes], headings[:, low : low + scenes], sizes, valid[:, low : low + scenes],
                 scored, rounding)
        for low in range(0, centers.shape[1], scenes)
    ]  # fmt: skip
    return torch.cat(chunks, dim=1)


def _nearest(
    centers: Tensor, headings: Tensor, sizes: Tensor, valid: Tensor, scored: Tensor, rounding: float
) -> Tensor:
    objects, count = centers.shape[:2]
    short = sizes.amin(-1) / 2
    radius = rounding * short
    outer = (sizes / 2 - radius[:, None]).norm(dim=-1) + radius  # (a,) circle around the rounded box
    between = centers[scored, None] - centers  # (e, a, n, 2)
    distance = torch.hypot(between[..., 0], between[..., 1])
    possible = valid[scored, None] & valid
    possible &= (scored[:, None] != torch.arange(objects, device=scored.device))[..., None]
    least = distance - (outer[scored, None] + outer)[..., None]
    most = (distance - (short[scored, None] + short)[..., None]).masked_fill_(~possible, FAR)
    ego, other, place = (possible & (least <= most.amin(1, keepdim=True) + _SLACK)).nonzero(as_tuple=True)
    source = scored[ego]
    exact = rounded_box_distance(
        -between[ego, other, place], headings[source, place], headings[other, place], sizes[source], sizes[other],
        rounding,
    )  # fmt: skip
    nearest = exact.new_full((len(scored) * count,), FAR)
    return nearest.scatter_reduce_(0, ego * count + place, exact, "amin").view(len(scored), count)


def _turn(points: Tensor, angle: Tensor) -> Tensor:
    cosine, sine = angle.cos(), angle.sin()
    x, y = points.unbind(-1)
    return torch.stack((cosine * x - sine * y, sine * x + cosine * y), dim=-1)


def _extent(half: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """(..., 2) half of what a turned box covers of each axis."""
    length, width = half.unbind(-1)
    cosine, sine = cosine.abs(), sine.abs()
    return torch.stack((length * cosine + width * sine, length * sine + width * cosine), dim=-1)


def _to_corners(center: Tensor, half: Tensor, other_half: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """(...) distance from a box at the origin to the nearest corner of one at `center` turned by cosine and sine."""
    signs = center.new_tensor([[1, 1], [1, -1], [-1, -1], [-1, 1]])
    along, across = (other_half[..., None, :] * signs).unbind(-1)  # (..., 4)
    cosine, sine = cosine[..., None], sine[..., None]
    x = (center[..., 0:1] + cosine * along - sine * across).abs() - half[..., 0:1]
    y = (center[..., 1:2] + sine * along + cosine * across).abs() - half[..., 1:2]
    return torch.hypot(x.clamp_min(0), y.clamp_min(0)).amin(-1)
