"""Overlap rate of motion forecasting (arXiv 2104.10133): does the most confident future run into another agent?"""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.metrics.motion_tracks import STRIDE, Groups, MotionTracks


def path_headings(trajectories: Tensor) -> Tensor:
    """Headings (…, s) of trajectories (…, s, 2), s ≥ 2: the mean of the directions before and after each point.

    The mean is taken of the two angles as numbers: where they straddle ±π it turns a box by half a turn, which leaves
    the box as it is. A path that stands still has direction 0.
    """
    step = trajectories[..., 1:, :] - trajectories[..., :-1, :]
    angle = torch.atan2(step[..., 1], step[..., 0])
    return torch.cat((angle[..., :1], (angle[..., 1:] + angle[..., :-1]) / 2, angle[..., -1:]), -1)


def boxes_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Whether pairs of rectangles share an area greater than zero.

    Args:
        first, second: (…, 5) x, y, length, width, heading; shapes broadcast.

    Returns:
        (…) bool. Rectangles that touch, and rectangles without area, don't overlap.
    """
    first, second = torch.broadcast_tensors(first, second)
    offset = second[..., :2] - first[..., :2]
    turn = second[..., 4] - first[..., 4]
    cosine, sine = turn.cos().abs(), turn.sin().abs()
    apart = (first[..., 2:4] <= 0).any(-1) | (second[..., 2:4] <= 0).any(-1)
    for own, other in ((first, second), (second, first)):
        heading = own[..., 4]
        along = heading.cos() * offset[..., 0] + heading.sin() * offset[..., 1]
        across = heading.cos() * offset[..., 1] - heading.sin() * offset[..., 0]
        reach_along = own[..., 2] + other[..., 2] * cosine + other[..., 3] * sine
        reach_across = own[..., 3] + other[..., 2] * sine + other[..., 3] * cosine
        apart = apart | (along.abs() >= reach_along / 2) | (across.abs() >= reach_across / 2)
    return ~apart


def overlaps(trajectories: Tensor, confidences: Tensor, agents: Tensor, groups: Groups, tracks: MotionTracks) -> Tensor:
    """Whether the first of the most confident futures hits another agent at each predicted step.

    Others count at a step if they are valid now and then; the box of a predicted agent has its recorded size of that
    step, and so none where the record is not valid and has no size.

    Args:
        trajectories: (m, k, n, 16, 2) metres.
        confidences: (m, k).
        agents: (m, n) indices into the tracks, −1 where padded.
        groups: the tracks of `agents`.
        tracks: all tracks of the scenario.

    Returns:
        (m, 16) bool.
    """
    # torch.argmax doesn't promise the first of equals.
    best = (confidences == confidences.amax(1, keepdim=True)).int().cumsum(1).eq(0).sum(1)
    path = trajectories[torch.arange(len(best), device=best.device), best].double()  # (m, n, 16, 2)
    boxes = torch.cat((path, groups.sizes, path_headings(path)[..., None]), -1)
    steps = slice(STRIDE, None, STRIDE)
    recorded = (tracks.positions[:, steps], tracks.sizes[:, steps], tracks.headings[:, steps, None])
    others = torch.cat([part.double() for part in recorded], -1)  # (a, 16, 5)
    present = tracks.valid[:, steps] & tracks.valid[:, :1]  # (a, 16)
    itself = agents[..., None] == torch.arange(present.shape[0], device=agents.device)  # (m, n, a)
    hit = boxes_overlap(boxes[:, :, None], others) & present & ~itself[..., None] & groups.member[..., None, None]
    return hit.any(2).any(1)
