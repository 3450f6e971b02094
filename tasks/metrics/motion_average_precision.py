"""Mean average precision of motion forecasting (arXiv 2104.10133), over buckets of recorded manoeuvres."""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from tasks.metrics.motion_tracks import MotionTracks

STATIONARY_SPEED = 2.0
STATIONARY_DISTANCE = 3.0
STRAIGHT_ACROSS = 2.5
STRAIGHT_TURN = math.pi / 6


class TrajectoryType(IntEnum):
    """Manoeuvres, in the order of precedence among the agents of one joint prediction."""

    STATIONARY = 0
    STRAIGHT = 1
    STRAIGHT_RIGHT = 2
    STRAIGHT_LEFT = 3
    RIGHT_TURN = 4
    LEFT_TURN = 5
    LEFT_U_TURN = 6
    RIGHT_U_TURN = 7


BUCKETS = len(TrajectoryType) - 1  # right U-turns count as right turns


class Outcome(IntEnum):
    """What a sample is: a repeated match is a false positive for mAP and doesn't exist for soft mAP."""

    FALSE = 0
    TRUE = 1
    REPEATED = 2


def trajectory_types(tracks: MotionTracks) -> tuple[Tensor, Tensor]:
    """Manoeuvre of each track between now and its last valid step.

    Returns:
        (a,) int64 `TrajectoryType`, and (a,) bool that is False where the track isn't valid now or never after.
    """
    later = tracks.valid[:, 1:]
    steps = torch.arange(1, later.shape[1] + 1, device=later.device)
    last = (later * steps).amax(1)
    rows = torch.arange(len(last), device=last.device)
    offset = tracks.positions[rows, last].double() - tracks.positions[:, 0].double()
    start = tracks.headings[:, 0].double()
    turn = tracks.headings[rows, last].double() - start
    turn = torch.atan2(turn.sin(), turn.cos())
    along = start.cos() * offset[:, 0] + start.sin() * offset[:, 1]
    across = start.cos() * offset[:, 1] - start.sin() * offset[:, 0]
    speed = torch.maximum(tracks.velocities[:, 0].norm(dim=-1), tracks.velocities[rows, last].norm(dim=-1))

    right = across < 0
    found = torch.where(right, TrajectoryType.RIGHT_TURN, TrajectoryType.LEFT_TURN)
    u_turn = torch.where(right, TrajectoryType.RIGHT_U_TURN, TrajectoryType.LEFT_U_TURN)
    found = torch.where(along < 0, u_turn, found)
    drift = torch.where(right, TrajectoryType.STRAIGHT_RIGHT, TrajectoryType.STRAIGHT_LEFT)
    straight = torch.where(across.abs() < STRAIGHT_ACROSS, TrajectoryType.STRAIGHT, drift)
    found = torch.where(turn.abs() < STRAIGHT_TURN, straight, found)
    standing = (speed < STATIONARY_SPEED) & (offset.norm(dim=-1) < STATIONARY_DISTANCE)
    return torch.where(standing, TrajectoryType.STATIONARY, found), tracks.valid[:, 0] & later.any(1)


def buckets(tracks: MotionTracks, agents: Tensor) -> tuple[Tensor, Tensor]:
    """Bucket of each group of `agents` (m, n): the manoeuvre of highest precedence among its agents.

    Returns:
        (m,) int64 in [0, BUCKETS), and (m,) bool that is False where no agent of the group has a manoeuvre.
    """
    kinds, known = trajectory_types(tracks)
    member = (agents >= 0) & known[agents.clamp(min=0)]
    kind = torch.where(member, kinds[agents.clamp(min=0)], TrajectoryType.STATIONARY).amax(1)
    return torch.where(kind == TrajectoryType.RIGHT_U_TURN, TrajectoryType.RIGHT_TURN, kind), member.any(1)


def outcomes(matched: Tensor, confidences: Tensor) -> Tensor:
    """(m, k) int64 `Outcome`: of the futures that match, the most confident is true (of equals the first)."""
    order = confidences.argsort(dim=1, descending=True, stable=True)
    sorted_match = matched.gather(1, order)
    first = sorted_match & (sorted_match.cumsum(1) == 1)
    outcome = torch.where(first, Outcome.TRUE, torch.where(sorted_match, Outcome.REPEATED, Outcome.FALSE))
    return torch.empty_like(outcome).scatter_(1, order, outcome)


def average_precision(confidences: Tensor, positive: Tensor, truths: int) -> float:
    """Area under the envelope of precision over recall, all points; among equal confidences false ones come first.

    Args:
        confidences: (s,) of the samples, in any order.
        positive: (s,) bool.
        truths: how many there were to find.
    """
    if len(confidences) == 0:
        return 0.0
    order = positive.long().argsort(stable=True)
    order = order[confidences[order].argsort(descending=True, stable=True)]
    hit = positive[order].double()
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1, device=hit.device)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return float((envelope * hit).sum() / truths)
