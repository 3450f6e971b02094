"""What the motion-forecasting metrics compare: predicted trajectories at 2 Hz and the recorded tracks at 10 Hz."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.scene import Scene

FUTURE_STEPS = 80
STRIDE = 5
PREDICTION_STEPS = FUTURE_STEPS // STRIDE
MAX_PREDICTIONS = 6


class MotionTracks(NamedTuple):
    """Recorded tracks of one scenario from the current step on: a agents over 81 steps of 0.1 s, the first being now.

    Attributes:
        positions: (a, 81, 2) metres.
        sizes: (a, 81, 2) length and width in metres.
        headings: (a, 81) radians, wrapped or not.
        velocities: (a, 81, 2) metres a second.
        valid: (a, 81) bool.
        types: (a,) int64 `AgentType`.
    """

    positions: Tensor
    sizes: Tensor
    headings: Tensor
    velocities: Tensor
    valid: Tensor
    types: Tensor

    @classmethod
    def from_scene(cls, scene: Scene) -> MotionTracks:
        """The tracks of all agents of a scene, in its coordinates.

        Raises:
            ValueError: if fewer than 80 steps follow the current one.
        """
        if scene.steps < scene.current + 1 + FUTURE_STEPS:
            raise ValueError(
                f"scenario {scene.scenario_id}: {scene.steps - scene.current - 1} steps follow the current one, "
                f"motion forecasting is measured over {FUTURE_STEPS}"
            )
        window = slice(scene.current, scene.current + 1 + FUTURE_STEPS)
        return cls(
            positions=scene.positions[:, window, :2],
            sizes=scene.sizes[:, window, :2],
            headings=scene.headings[:, window],
            velocities=scene.velocities[:, window],
            valid=scene.valid[:, window],
            types=scene.agent_types,
        )


class MotionPrediction(NamedTuple):
    """Predictions for one scenario: m groups of n agents, k joint futures a group, 16 steps 0.5 s apart.

    A group of one agent is a marginal prediction; the agents of a larger group are predicted, and judged, together.

    Attributes:
        trajectories: (m, k, n, 16, 2) positions in metres, the first 0.5 s after the current step.
        confidences: (m, k), not negative. Only the first six of k are judged.
        agents: (m, n) int64 indices into the tracks, −1 where a group has fewer than n agents.
    """

    trajectories: Tensor
    confidences: Tensor
    agents: Tensor


def check(prediction: MotionPrediction, tracks: MotionTracks) -> None:
    """Compare shapes and values with what the metrics can judge.

    Raises:
        ValueError: if shapes disagree, a group is empty, an agent doesn't exist, or a number isn't finite.
    """
    trajectories, confidences, agents = prediction
    if trajectories.ndim != 5 or trajectories.shape[3:] != (PREDICTION_STEPS, 2):
        raise ValueError(f"trajectories must be (m, k, n, {PREDICTION_STEPS}, 2), not {tuple(trajectories.shape)}")
    m, k, n = trajectories.shape[:3]
    if k == 0 or n == 0:
        raise ValueError(f"trajectories {tuple(trajectories.shape)} hold no prediction")
    if confidences.shape != (m, k) or agents.shape != (m, n):
        raise ValueError(
            f"trajectories {tuple(trajectories.shape)} need confidences ({m}, {k}) and agents ({m}, {n}), "
            f"not {tuple(confidences.shape)} and {tuple(agents.shape)}"
        )
    if m == 0:
        return
    count = tracks.types.shape[0]
    if bool((agents >= count).any()) or bool((agents < -1).any()):
        wrong = agents[(agents >= count) | (agents < -1)][0]
        raise ValueError(f"agents: {int(wrong)} is no index of the {count} tracks")
    empty = (agents < 0).all(1)
    if bool(empty.any()):
        raise ValueError(f"agents: group {int(empty.nonzero()[0])} names no agent")
    repeated = (agents[:, :, None] == agents[:, None]) & (agents >= 0)[:, :, None]
    if bool((repeated.sum((1, 2)) > (agents >= 0).sum(1)).any()):
        raise ValueError("agents: a group names the same agent twice")
    finite = trajectories.isfinite().all(-1).all(-1) | (agents < 0)[:, None]
    if not bool(finite.all()):
        group, mode, member = (~finite).nonzero()[0].tolist()
        raise ValueError(f"trajectories of agent {int(agents[group, member])}, prediction {mode}: not finite")
    if not bool((confidences.isfinite() & (confidences >= 0)).all()):
        raise ValueError("confidences must be finite and not negative")


class Groups(NamedTuple):
    """Recorded tracks gathered for the groups of a prediction, everything else in float64.

    Attributes:
        member: (m, n) bool, False where a group is padded.
        positions, sizes: (m, n, 16, 2) at the predicted steps.
        headings, valid: (m, n, 16) at the predicted steps.
        start_speed: (m, n) metres a second at the current step.
        types: (m, n) int64 `AgentType`, UNSET where padded.
    """

    member: Tensor
    positions: Tensor
    sizes: Tensor
    headings: Tensor
    valid: Tensor
    start_speed: Tensor
    types: Tensor


def gather(tracks: MotionTracks, agents: Tensor) -> Groups:
    """Tracks of `agents` (m, n), indices with −1 where padded."""
    member = agents >= 0
    index = agents.clamp(min=0)
    steps = torch.arange(STRIDE, FUTURE_STEPS + 1, STRIDE, device=agents.device)
    return Groups(
        member=member,
        positions=tracks.positions.double()[index][:, :, steps],
        sizes=tracks.sizes.double()[index][:, :, steps],
        headings=tracks.headings.double()[index][:, :, steps],
        valid=tracks.valid[index][:, :, steps] & member[..., None],
        start_speed=tracks.velocities[:, 0].double().norm(dim=-1)[index],
        types=tracks.types[index] * member,
    )
