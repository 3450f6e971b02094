"""Recorded tracks as motions: rolling matching that goes on from the matched pose, so that errors don't add up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.agent_tokens import SUBSTEPS, AgentTokens, MotionState
from models.motion_head import STEP, MotionHead
from models.poses import wrap

_JUMP = 1.5  # radians in 0.1 s: a tracker that takes front for back, not a turn


class Tokenised(NamedTuple):
    """Motions of a agents in s steps of 0.5 s, and what truly came after each.

    Attributes:
        tokens: poses, motions and speeds as matched; zero where not valid.
        futures: (b, a, s, 5, 3) recorded poses of the next motion; zero where `target_valid` is False.
        target_valid: (b, a, s) whether the motion is valid and the record goes on to the end of the next.
    """

    tokens: AgentTokens
    futures: Tensor
    target_valid: Tensor


@torch.no_grad()
def tokenise(
    head: MotionHead, pose: Tensor, velocity: Tensor, valid: Tensor, type: Tensor, size: Tensor, current: int = 10
) -> Tokenised:
    """Matches tracks to motions of the head: motion τ goes from step 5τ to step 5(τ + 1), from the pose that motion τ − 1
    ended with, or from the recorded pose after a gap.

    Headings that jump between two steps keep the earlier value. Tracks are continued backwards at constant velocity from
    their first step to the multiple of five before it, and an agent that is at the current step but not five steps before
    is so too, such that a motion ends at the current step. Poses missing within a motion lie evenly between its ends.

    Args:
        head: what motions there are.
        pose: (b, a, t, 3) x, y, heading, heading wrapped or not; t = 5 s + 1.
        velocity: (b, a, t, 2) metres a second, in the frame of the poses.
        valid: (b, a, t) bool. What isn't valid is not read: it may be NaN.
        type: (b, a) int64: 0 vehicle, 1 pedestrian, 2 cyclist.
        size: (b, a, 3) length, width, height.
        current: the current step, a multiple of five.

    Raises:
        ValueError: t isn't 5 s + 1, or `current` isn't a multiple of five among the steps.
    """
    steps = pose.shape[2]
    if steps < SUBSTEPS + 1 or steps % SUBSTEPS != 1:
        raise ValueError(f"{steps} steps, expected one more than a multiple of {SUBSTEPS}")
    if not 0 < current < steps or current % SUBSTEPS:
        raise ValueError(f"current is {current}, expected a multiple of {SUBSTEPS} below {steps}")
    pose = torch.where(valid[..., None], pose, 0.0)
    velocity = torch.where(valid[..., None], velocity, 0.0)
    pose = torch.cat((pose[..., :2], steady_headings(pose[..., 2], valid)[..., None]), -1)
    pose, velocity, valid = continue_backwards(pose, velocity, valid, current)

    windows = pose.unfold(2, SUBSTEPS + 1, SUBSTEPS).transpose(-1, -2)  # (b, a, s, 6, 3)
    inside = valid.unfold(2, SUBSTEPS + 1, SUBSTEPS)  # (b, a, s, 6)
    whole = inside[..., 0] & inside[..., -1]
    truth = _fill(windows, inside)[..., 1:, :]

    speed = velocity[..., 0] * pose[..., 2].cos() + velocity[..., 1] * pose[..., 2].sin()
    state = MotionState(pose[:, :, 0], speed[:, :, 0], type, size)
    poses, motions, speeds = [], [], []
    for token in range(whole.shape[2]):
        matched = whole[:, :, token]
        mine = MotionState(*(t[matched] for t in state))
        motion, following = head.advance(mine, head.nearest(mine, truth[:, :, token][matched]))
        poses.append(_placed(following.pose, matched))
        motions.append(_placed(motion, matched))
        speeds.append(_placed(following.speed, matched))
        step = SUBSTEPS * (token + 1)
        state = state._replace(
            pose=torch.where(matched[..., None], poses[-1], pose[:, :, step]),
            speed=torch.where(matched, speeds[-1], speed[:, :, step]),
        )
    tokens = AgentTokens(torch.stack(poses, 2), torch.stack(motions, 2), torch.stack(speeds, 2), whole, type, size)
    target_valid = torch.cat((whole[..., :-1] & whole[..., 1:], torch.zeros_like(whole[..., :1])), -1)
    futures = torch.cat((truth[:, :, 1:], torch.zeros_like(truth[:, :, :1])), 2)
    return Tokenised(tokens, torch.where(target_valid[..., None, None], futures, 0.0), target_valid)


def _placed(rows: Tensor, where: Tensor) -> Tensor:
    """Rows (n, …) at the n places of a mask (b, a), zeros elsewhere: (b, a, …)."""
    whole = rows.new_zeros(*where.shape, *rows.shape[1:])
    whole[where] = rows
    return whole


def steady_headings(heading: Tensor, valid: Tensor) -> Tensor:
    """(…, t) and (…, t) → (…, t): between two valid steps a heading that turns by more than 1.5 radians, whole turns not
    counted, keeps the value of the step before."""
    both = valid[..., 1:] & valid[..., :-1]
    tracks = ((wrap(heading.diff(dim=-1)).abs() > _JUMP) & both).any(-1)  # of the others nothing is kept
    if not tracks.any():
        return heading
    given, both = heading[tracks], both[tracks]
    kept = [given[..., 0]]
    for step in range(1, heading.shape[-1]):
        jumps = wrap(given[..., step] - kept[-1]).abs() > _JUMP
        kept.append(torch.where(jumps & both[..., step - 1], kept[-1], given[..., step]))
    steady = heading.clone()
    steady[tracks] = torch.stack(kept, -1)
    return steady


def continue_backwards(pose: Tensor, velocity: Tensor, valid: Tensor, current: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fills steps before the first valid one, back to a multiple of five, and those missing among the five before the
    current one where the agent was not there at the first of them; all at constant velocity, with the heading kept.

    Args:
        pose: (…, t, 3).
        velocity: (…, t, 2).
        valid: (…, t).
        current: a multiple of five.

    Returns:
        The three, filled.
    """
    steps = torch.arange(valid.shape[-1], device=valid.device)
    first = valid.int().argmax(-1, keepdim=True)  # (…, 1); 0 also where nothing is valid
    fills = valid.any(-1, keepdim=True) & (steps < first) & (steps >= first - first % SUBSTEPS)
    before = current - SUBSTEPS
    appears = valid[..., current, None] & ~(valid | fills)[..., before, None]
    lacks = appears & (steps >= before) & (steps < current) & ~valid
    fills, source = fills | lacks, torch.where(lacks, current, first)  # (…, t)
    start = pose.gather(-2, source[..., None].expand_as(pose))
    constant = velocity.gather(-2, source[..., None].expand_as(velocity))
    ago = ((steps - source) * STEP)[..., None].to(pose.dtype)
    moved = torch.cat((start[..., :2] + constant * ago, start[..., 2:]), -1)
    return (
        torch.where(fills[..., None], moved, pose),
        torch.where(fills[..., None], constant, velocity),
        valid | fills,
    )


def _fill(windows: Tensor, inside: Tensor) -> Tensor:
    """(…, 6, 3) and (…, 6): poses that aren't valid, put evenly between the first and the last."""
    share = torch.arange(SUBSTEPS + 1, device=windows.device).to(windows.dtype)[:, None] / SUBSTEPS
    start, change = windows[..., :1, :], windows[..., -1:, :] - windows[..., :1, :]
    change = torch.cat((change[..., :2], wrap(change[..., 2:])), -1)
    return torch.where(inside[..., None], windows, start + share * change)
