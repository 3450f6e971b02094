"""Whether vehicles cross the stop point of a red light of the lane that they are on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from datamodules.scene import LightState

RED = (LightState.ARROW_STOP, LightState.STOP)
"""States that forbid to pass."""
_CHUNK = 1 << 20  # (point, segment) distances held at once


class Lanes(NamedTuple):
    """Surface streets, s segments in all.

    Attributes:
        ids: (m,) int64 of the lanes.
        starts: (s, 2) metres.
        vectors: (s, 2) from start to end.
        lane: (s,) int64 index of the lane of a segment, rising.
    """

    ids: Tensor
    starts: Tensor
    vectors: Tensor
    lane: Tensor


def lanes_of(polylines: list[Tensor], ids: Tensor, ghost: Tensor | None = None) -> Lanes | None:
    """Prepares lanes for `red_light_violations`.

    Args:
        polylines: (p, 2 or 3) points each, metres; those of fewer than two points are left out.
        ids: (m,) int64, one a polyline.
        ghost: (2,) point to which every lane shorter than the longest goes on, as in the official code, where that is
            the origin of the file's coordinates.

    Returns:
        The lanes, or None where there are none.
    """
    kept = [index for index, line in enumerate(polylines) if len(line) > 1]
    if not kept:
        return None
    lines = [polylines[index][:, :2] for index in kept]
    longest = max(len(line) for line in lines)
    if ghost is not None:
        lines = [line if len(line) == longest else torch.cat((line, ghost[None])) for line in lines]
    counts = torch.tensor([len(line) - 1 for line in lines], device=ids.device)
    return Lanes(
        ids=ids[kept],
        starts=torch.cat([line[:-1] for line in lines]),
        vectors=torch.cat([line[1:] - line[:-1] for line in lines]),
        lane=torch.arange(len(lines), device=ids.device).repeat_interleave(counts),
    )


def red_light_violations(
    points: Tensor,
    valid: Tensor,
    lanes: Lanes,
    light_lanes: Tensor,
    light_states: Tensor,
    light_stops: Tensor,
    parity: bool = False,
) -> Tensor:
    """Whether an object, on a lane whose light is red, passes the light's stop point between the step before and a step.

    Objects that pass no stop point are never compared with lanes, so the search for the nearest lane is for few points.

    Args:
        points: (e, r, t, 2) centres, metres.
        valid: (e, r, t) bool.
        lanes: of `lanes_of`.
        light_lanes: (l,) int64 ids of lanes.
        light_states: (t, l) int64.
        light_stops: (t, l, 2) metres.
        parity: find the nearest segment with the official formula, in which the offset along the segment is added where
            geometry wants it subtracted, and judge both steps by the stop point of their own step.

    Returns:
        (e, r, t) bool, False at the first step.
    """
    violated = torch.zeros_like(valid)
    lane_of_light = (light_lanes[:, None] == lanes.ids).int().argmax(1)
    known = (light_lanes[:, None] == lanes.ids).any(1).nonzero().flatten()
    for light in known.tolist():
        own = (lanes.lane == lane_of_light[light]).nonzero().flatten()
        starts, vectors, stops = lanes.starts[own], lanes.vectors[own], light_stops[:, light]
        nearest = _distances(stops, starts, vectors, parity).argmin(1)  # (t,)
        start, vector = starts[nearest], vectors[nearest]
        length = vector.square().sum(-1)

        def along(offset: Tensor, vector: Tensor = vector, length: Tensor = length) -> Tensor:
            return torch.where(length > 0, (offset * vector).sum(-1) / length, 0)

        stop = along(stops - start)
        before = points
        if not parity:  # the point one step earlier, judged by the stop point of this step
            before = torch.cat((points[:, :, :1], points[:, :, :-1]), dim=2)
        behind = along(before - start) < stop
        if parity:
            behind = functional.pad(behind[:, :, :-1], (1, 0))
        ahead = along(points - start) > stop
        red = (light_states[:, light] == RED[0]) | (light_states[:, light] == RED[1])
        crossed = behind & ahead & red & valid
        crossed[:, :, 0] = False
        where = crossed.nonzero(as_tuple=True)
        on_lane = nearest_lane(points[where], lanes, parity) == lane_of_light[light]
        violated[where] |= on_lane
    return violated


def nearest_lane(points: Tensor, lanes: Lanes, parity: bool = False) -> Tensor:
    """(n,) int64 index of the lane with the segment nearest to each of (n, 2) points; `parity` as above."""
    if not len(points):
        return points.new_zeros(0, dtype=torch.int64)
    parts = points.split(max(1, _CHUNK // len(lanes.starts)))
    nearest = [_distances(part, lanes.starts, lanes.vectors, parity).argmin(1) for part in parts]
    return lanes.lane[torch.cat(nearest)]


def _distances(points: Tensor, starts: Tensor, vectors: Tensor, parity: bool) -> Tensor:
    """(n, s) square distances."""
    offset = points[:, None] - starts
    length = vectors.square().sum(-1)
    part = torch.where(length > 0, (offset * vectors).sum(-1) / length, 0).clamp(0, 1)
    along = part[..., None] * vectors
    return (offset + along if parity else offset - along).square().sum(-1)
