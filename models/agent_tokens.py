"""What the agent model reads and writes: tokens of map and agents, and the state that a motion starts from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SUBSTEPS = 5  # a motion is five poses, 0.1 s apart


class MapTokens(NamedTuple):
    """Map pieces: pose (b, m, 3) of the start; points (b, m, 2, 2), middle and end in the piece's own frame; type and
    light (b, m) int64; valid (b, m) bool."""

    pose: Tensor
    points: Tensor
    type: Tensor
    light: Tensor
    valid: Tensor


class AgentTokens(NamedTuple):
    """Motions of a agents in s steps of 0.5 s.

    Attributes:
        pose: (b, a, s, 3) x, y, heading at the end of the motion.
        motion: (b, a, s, 5, 3) the five poses of the motion in the frame of the pose it started from.
        speed: (b, a, s) metres a second at its end, along the heading.
        valid: (b, a, s) bool.
        type: (b, a) int64: 0 vehicle, 1 pedestrian, 2 cyclist.
        size: (b, a, 3) length, width, height in metres.
    """

    pose: Tensor
    motion: Tensor
    speed: Tensor
    valid: Tensor
    type: Tensor
    size: Tensor


class MotionState(NamedTuple):
    """What a motion starts from: pose (…, 3), speed (…) along the heading, type (…) int64, size (…, 3)."""

    pose: Tensor
    speed: Tensor
    type: Tensor
    size: Tensor
