"""From many simulated rollouts to the few weighted futures that motion forecasting judges."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.scene import Scene
from tasks.metrics.motion_tracks import FUTURE_STEPS, MAX_PREDICTIONS, STRIDE, MotionPrediction


def choose_modes(ends: Tensor, modes: int = MAX_PREDICTIONS, radius: float = 2.5) -> tuple[Tensor, Tensor]:
    """Choose rollouts that stand for all of them, greedily by how many others end near them.

    A rollout covers those that end within `radius` of it; for several agents the mean of their distances counts. The
    one that covers most still uncovered rollouts is chosen next; when all are covered, the one farthest from those
    chosen. In the end every rollout gives its vote to the nearest chosen one. Of equals the first wins.

    Args:
        ends: (r, n, 2) metres, where the n agents of a group end in each of r rollouts.
        modes: how many to choose, at most r.
        radius: metres.

    Returns:
        (modes,) int64 indices of rollouts, most votes first, and (modes,) float32 shares of the votes, which add to 1.

    Raises:
        ValueError: if there are fewer rollouts than modes.
    """
    rollouts = len(ends)
    if not 1 <= modes <= rollouts:
        raise ValueError(f"{modes} futures can't be chosen among {rollouts} rollouts")
    distance = (ends[:, None] - ends[None]).double().norm(dim=-1).mean(-1)  # (r, r)
    near = distance <= radius
    uncovered = torch.ones(rollouts, dtype=torch.bool, device=ends.device)
    chosen: list[int] = []
    for _ in range(modes):
        gain = (near & uncovered).sum(1).double() if bool(uncovered.any()) else distance[:, chosen].amin(1)
        gain[chosen] = -1
        chosen.append(int((gain == gain.max()).nonzero()[0]))
        uncovered = uncovered & ~near[chosen[-1]]
    picked = torch.tensor(chosen, device=ends.device)
    to_chosen = distance[:, picked]
    nearest = (to_chosen == to_chosen.amin(1, keepdim=True)).int().cumsum(1).eq(0).sum(1)
    votes = nearest.bincount(minlength=modes)
    order = votes.argsort(descending=True, stable=True)
    return picked[order], votes[order].float() / rollouts


def predictions_from_rollouts(
    states: Tensor, rows: Tensor, agents: Tensor, modes: int = MAX_PREDICTIONS, radius: float = 2.5
) -> MotionPrediction:
    """Up to six weighted futures of every group of agents, each a rollout that really happened.

    Args:
        states: (a, r, 80, 4) rollouts: x, y, z, heading in the coordinates of the scene.
        rows: (m, n) int64 rows of `states` that form the groups, −1 where padded; (m, 1) predicts agents one by one.
        agents: (m, n) int64 indices of the same agents in the tracks, −1 where padded.
        modes: futures a group.
        radius: metres, see `choose_modes`.

    Raises:
        ValueError: if shapes disagree, a row doesn't exist or there are fewer rollouts than modes.
    """
    if states.ndim != 4 or states.shape[2:] != (FUTURE_STEPS, 4):
        raise ValueError(f"states must be (a, r, {FUTURE_STEPS}, 4), not {tuple(states.shape)}")
    if rows.shape != agents.shape or bool(((rows < 0) != (agents < 0)).any()):
        raise ValueError(f"rows {tuple(rows.shape)} and agents {tuple(agents.shape)} must name the same groups")
    if bool((rows >= len(states)).any()):
        raise ValueError(f"rows: {int(rows.max())} is no row of {len(states)} simulated agents")
    paths = states[:, :, STRIDE - 1 :: STRIDE, :2]  # (a, r, 16, 2)
    trajectories, confidences = [], []
    for group in rows:
        member = group >= 0
        own = paths[group.clamp(min=0)]  # (n, r, 16, 2)
        picked, share = choose_modes(own[member][:, :, -1].transpose(0, 1), modes, radius)
        trajectories.append(torch.where(member[:, None, None, None], own[:, picked], 0.0).transpose(0, 1))
        confidences.append(share)
    if not trajectories:
        shape = (0, modes, rows.shape[1], paths.shape[2], 2)
        return MotionPrediction(states.new_zeros(shape), states.new_zeros((0, modes)).float(), agents)
    return MotionPrediction(torch.stack(trajectories), torch.stack(confidences), agents)


def predictions_of_scene(
    scene: Scene,
    states: Tensor,
    index: Tensor,
    joint: bool = False,
    modes: int = MAX_PREDICTIONS,
    radius: float = 2.5,
) -> MotionPrediction:
    """Weighted futures of the agents that a scene wants predicted, for `MotionTracks.from_scene` of the same scene.

    Args:
        scene: with `to_predict`.
        states: (a, r, 80, 4) rollouts in the coordinates of the scene.
        index: (a,) the agents of `states`.
        joint: predict all of them together, as the interaction challenge asks for its pairs, instead of one by one.
        modes: futures a group.
        radius: metres, see `choose_modes`.

    Raises:
        ValueError: if an agent to predict wasn't simulated; names scenario and object.
    """
    agents = scene.to_predict.to(states.device)
    simulated = agents[:, None] == index.to(states.device)
    missing = ~simulated.any(1)
    if bool(missing.any()):
        identity = int(scene.agent_ids[scene.to_predict[missing.cpu()][0]])
        raise ValueError(f"scenario {scene.scenario_id}: object {identity} is to be predicted and has no rollouts")
    rows = simulated.int().argmax(1)
    groups = (1, -1) if joint and len(agents) else (-1, 1)
    return predictions_from_rollouts(states, rows.reshape(groups), agents.reshape(groups), modes, radius)
