"""Signed distance from boxes to the nearest road edge, positive off the road; edges run with the road on their left.

The nearest segment is searched among blocks of consecutive segments. Boxes around the blocks bound the distances, so
most blocks are never looked into and what is found is still the nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Z_STRETCH = 3.0
"""Heights count this much more than widths where the nearest segment is sought, so that a bridge is not the road below."""
CLOSED = 1.0
"""Square metres: an edge whose ends are nearer than the root of this is a ring."""
BLOCK = 16
"""Segments in a block."""
_SLACK = 1e-2  # metres by which float32 bounds may be off
_CHUNK = 1 << 20  # (box, block) bounds held at once
_PAIRS = 1 << 13  # (box, block) pairs worked out at once, 4 · BLOCK distances each


class RoadEdges(NamedTuple):
    """s segments in b blocks.

    Attributes:
        starts: (s, 3) metres.
        vectors: (s, 3) from start to end.
        prior, next: (s,) int64 segment before and after; the segment itself at the end of an open edge.
        blocks: (b, BLOCK) int64 segments, the last repeated in blocks that are not full.
        low, high: (b, 3) corners of the boxes around the blocks, heights stretched.
    """

    starts: Tensor
    vectors: Tensor
    prior: Tensor
    next: Tensor
    blocks: Tensor
    low: Tensor
    high: Tensor


def road_edges(polylines: list[Tensor], close_longest_only: bool = False) -> RoadEdges | None:
    """Prepares road edges for `distance_to_road_edge`.

    Args:
        polylines: (p, 3) points each, metres; those of fewer than two points are left out.
        close_longest_only: treat only those rings as closed that have as many points as the longest edge, and keep
            segments of no length, as the official code does. Otherwise every ring is closed and repeated points go.

    Returns:
        The segments, or None where there are none.
    """
    if not close_longest_only:
        polylines = [_without_repeats(line) for line in polylines if len(line)]
    polylines = [line for line in polylines if len(line) > 1]
    if not polylines:
        return None
    longest = max(len(line) for line in polylines)
    prior, following, blocks, first = [], [], [], 0
    for line in polylines:
        count = len(line) - 1
        own = torch.arange(first, first + count)
        closed = bool((line[0] - line[-1]).square().sum() < CLOSED) and (not close_longest_only or len(line) == longest)
        prior.append(torch.cat((own[-1:] if closed else own[:1], own[:-1])))
        following.append(torch.cat((own[1:], own[:1] if closed else own[-1:])))
        full = torch.cat((own, own[-1:].expand(-count % BLOCK)))
        blocks.append(full.view(-1, BLOCK))
        first += count
    device = polylines[0].device
    starts = torch.cat([line[:-1] for line in polylines])
    ends = torch.cat([line[1:] for line in polylines])
    block = torch.cat(blocks).to(device)
    stretch = starts.new_tensor([1.0, 1.0, Z_STRETCH])
    corners = torch.cat((starts[block], ends[block]), dim=1) * stretch
    return RoadEdges(
        starts=starts,
        vectors=ends - starts,
        prior=torch.cat(prior).to(device),
        next=torch.cat(following).to(device),
        blocks=block,
        low=corners.amin(1),
        high=corners.amax(1),
    )


def _without_repeats(line: Tensor) -> Tensor:
    moved = (line[1:, :2] != line[:-1, :2]).any(-1)
    return line[functional.pad(moved, (1, 0), value=True)]


def distance_to_road_edge(
    centers: Tensor,
    headings: Tensor,
    sizes: Tensor,
    edges: RoadEdges,
    place: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Distance in the plane from the corner of a box that is farthest off the road to the edge nearest to that corner.

    Args:
        centers: (n, 3) of the boxes, metres.
        headings: (n,) radians.
        sizes: (n, 3) length, width, height.
        edges: of `road_edges`.
        place: rounds corners (n, 4, 3), where that is wanted.

    Returns:
        (n,) metres, positive where a corner is off the road.
    """
    bottom = centers - functional.pad(sizes[:, 2:] / 2, (2, 0))
    forward = torch.stack((headings.cos(), headings.sin()), dim=-1) * sizes[:, :1] / 2
    left = torch.stack((-headings.sin(), headings.cos()), dim=-1) * sizes[:, 1:2] / 2
    around = torch.stack((forward + left, forward - left, -forward - left, left - forward), dim=1)  # (n, 4, 2)
    corners = bottom[:, None] + functional.pad(around, (0, 1))
    if place is not None:
        corners = place(corners)
    nearest = _nearest_segment(bottom, corners, edges)
    return _signed_distance(corners, nearest, edges).amax(-1)


def _nearest_segment(centers: Tensor, corners: Tensor, edges: RoadEdges) -> Tensor:
    """(n, 4) int64 segment nearest to each corner, by distance with stretched heights."""
    stretch = centers.new_tensor([1.0, 1.0, Z_STRETCH])
    boxes = max(1, _CHUNK // len(edges.blocks))
    found = [
        _nearest_in_chunk(centers[low : low + boxes] * stretch, corners[low : low + boxes] * stretch, edges)
        for low in range(0, len(centers), boxes)
    ]
    return torch.cat(found) if found else centers.new_zeros((0, 4), dtype=torch.int64)


def _nearest_in_chunk(centers: Tensor, corners: Tensor, edges: RoadEdges) -> Tensor:
    reach = (corners - centers[:, None]).norm(dim=-1).amax(1)
    bound = torch.zeros(len(centers), len(edges.blocks), dtype=centers.dtype, device=centers.device)
    middle, half = (edges.high + edges.low) / 2, (edges.high - edges.low) / 2
    for axis in range(3):
        outside = (centers[:, axis, None] - middle[:, axis]).abs_().sub_(half[:, axis]).clamp_min_(0)
        bound.addcmul_(outside, outside)
    # The nearest block gives a distance that the nearest segment of every corner can only undercut.
    first = _in_blocks(corners, bound.argmin(1), edges)[0].amax(1).sqrt()
    box, block = (bound <= (first + reach + _SLACK).square()[:, None]).nonzero(as_tuple=True)
    distance, segment = zip(
        *(
            _in_blocks(corners[box[low : low + _PAIRS]], block[low : low + _PAIRS], edges)
            for low in range(0, len(box), _PAIRS)
        ),
        strict=True,
    )
    squared, segments = torch.cat(distance), torch.cat(segment)  # (pairs, 4)
    row = box[:, None].expand(-1, 4)
    least = torch.full_like(corners[..., 0], torch.inf).scatter_reduce_(0, row, squared, "amin")
    # Of equally near segments the first counts.
    segments = torch.where(squared == least[box], segments, len(edges.starts))
    return torch.full_like(least, len(edges.starts), dtype=torch.int64).scatter_reduce_(0, row, segments, "amin")


def _in_blocks(corners: Tensor, block: Tensor, edges: RoadEdges) -> tuple[Tensor, Tensor]:
    """For pairs of four corners (k, 4, 3), heights stretched, and a block: (k, 4) least square distance and segment."""
    segments = edges.blocks[block]  # (k, BLOCK)
    start_x, start_y, start_z = edges.starts[segments].unbind(-1)
    along_x, along_y, along_z = edges.vectors[segments].unbind(-1)
    scale = 1 / (along_x.square() + along_y.square())
    scale = torch.where(scale.isinf(), 0, scale)  # a segment of no length is its start
    x, y, z = (corners[..., None] - torch.stack((start_x, start_y, start_z * Z_STRETCH), 1)[:, None]).unbind(2)
    part = (x * along_x[:, None]).addcmul_(y, along_y[:, None]).mul_(scale[:, None]).clamp_(0, 1)
    squared = torch.addcmul(x, part, along_x[:, None], value=-1).square_()
    squared += torch.addcmul(y, part, along_y[:, None], value=-1).square_()
    squared += torch.addcmul(z, part, along_z[:, None], value=-Z_STRETCH).square_()
    least, place = squared.min(-1)
    return least, segments.gather(1, place)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _signed_distance(points: Tensor, segment: Tensor, edges: RoadEdges) -> Tensor:
    """(...) distance in the plane from (..., 3) points to their segments (...), positive on the right of the edge.

    Past an end of its segment a point is judged by both segments that meet there: right of either where the edge turns
    left, right of both where it turns right.
    """
    vector = edges.vectors[segment]
    offset = points - edges.starts[segment]
    length = vector[..., :2].square().sum(-1)
    part = torch.where(length > 0, (offset[..., :2] * vector[..., :2]).sum(-1) / length, 0)
    distance = (offset[..., :2] - part.clamp(0, 1)[..., None] * vector[..., :2]).norm(dim=-1)

    def side_of(other: Tensor) -> Tensor:
        return _cross(points - edges.starts[other], edges.vectors[other]).sign()

    def joined(own: Tensor, other: Tensor, turn: Tensor) -> Tensor:
        return torch.where(turn > 0, torch.maximum(own, other), torch.minimum(own, other))

    prior, following = edges.prior[segment], edges.next[segment]
    side = side_of(segment)
    before = joined(side, side_of(prior), _cross(edges.vectors[prior], vector))
    after = joined(side, side_of(following), _cross(vector, edges.vectors[following]))
    return torch.where(part < 0, before, torch.where(part > 1, after, side)) * distance
