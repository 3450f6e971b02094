"""One scene as the model sees it: in a frame of its own, with the agents and map pieces that matter, rows not yet padded."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.map_pieces import map_pieces
from datamodules.scene import AgentType, Scene


@dataclass(frozen=True)
class SceneView:
    """What of a scene is shown, and in which frame. Distances are metres from the self-driving car at the current step.

    Attributes:
        canonical: the frame's origin is the self-driving car's pose at the current step, x along its heading; False keeps
            the axes and origin of the scene.
        rotation: True turns the frame by a random angle.
        stretch: for training, distances and speeds, but not agents, are multiplied by a random factor between 1 / stretch
            and stretch (TrajTok, arXiv 2506.21618, does so by up to a fifth): few recordings then show many speeds.
        observed: states farther away count as not valid; None sees all.
        trained: agents up to here count in the loss if they have `future_steps` valid future steps.
        future_steps: see `trained`.
        most_trained: agents that count in the loss, at most; those with a role come first, then the nearest.
        max_agents: agents shown, at most; None shows all.
        drop_agents: leave out the farthest where there are more than `max_agents`, but never one with a role, and warn;
            False refuses the scene. Who must move every agent can't leave any out.
        max_pieces: map pieces shown, at most: those nearest to an agent at the current step; None shows all.
    """

    canonical: bool = True
    rotation: bool = False
    stretch: float = 1.0
    observed: float | None = 150.0
    trained: float = 100.0
    future_steps: int = 5
    most_trained: int = 32
    max_agents: int | None = None
    drop_agents: bool = True
    max_pieces: int | None = None


class ViewedScene(NamedTuple):
    """A row of `SceneBatch` before padding: its fields without the leading dimension, and the scene."""

    agent_pose: Tensor
    agent_velocity: Tensor
    agent_valid: Tensor
    agent_height: Tensor
    agent_size: Tensor
    agent_type: Tensor
    agent_trains: Tensor
    agent_index: Tensor
    map_pose: Tensor
    map_points: Tensor
    map_type: Tensor
    map_light: Tensor
    frame: Tensor
    scene: Scene


def frame_of(scene: Scene, canonical: bool) -> Tensor:
    """(3,) float64 x, y and heading of a scene's frame in the scene's coordinates.

    Raises:
        ValueError: if the frame is canonical and the self-driving car is not valid at the current step.
    """
    if not canonical:
        return torch.zeros(3, dtype=torch.float64)
    _require_car(scene)
    heading = scene.headings[scene.sdc, scene.current].double()
    return torch.cat((scene.positions[scene.sdc, scene.current, :2].double(), heading[None]))


def turned(points: Tensor, angle: Tensor) -> Tensor:
    """Rotates points (…, 2) about the origin."""
    cosine, sine = angle.cos(), angle.sin()
    x, y = points.unbind(-1)
    return torch.stack((cosine * x - sine * y, sine * x + cosine * y), -1)


def to_frame(pose: Tensor, frame: Tensor) -> Tensor:
    """Poses (…, 3) of scene coordinates in a frame (3,), float64; headings are not wrapped."""
    pose, frame = pose.double(), frame.double()
    return torch.cat((turned(pose[..., :2] - frame[:2], -frame[2]), pose[..., 2:] - frame[2]), -1)


def from_frame(pose: Tensor, frame: Tensor) -> Tensor:
    """Undoes `to_frame`."""
    pose, frame = pose.double(), frame.double()
    return torch.cat((turned(pose[..., :2], frame[2]) + frame[:2], pose[..., 2:] + frame[2]), -1)


def view(scene: Scene, settings: SceneView) -> ViewedScene:
    """Prepares one scene; `scene_batches.collate_scenes` makes a batch of several.

    Raises:
        ValueError: if the self-driving car is not valid at the current step, or the agents are more than allowed, or a
            valid state is not finite; names the scene and the agent.
    """
    _require_car(scene)
    frame = frame_of(scene, settings.canonical)
    if settings.rotation:
        frame = frame + torch.tensor([0.0, 0.0, math.tau * torch.rand(()).item()], dtype=torch.float64)
    car = scene.positions[scene.sdc, scene.current, :2].double()
    distance = (scene.positions[..., :2].double() - car).norm(dim=-1)  # (a, t)
    valid = scene.valid if settings.observed is None else scene.valid & (distance <= settings.observed)
    index = _shown(scene, valid[:, scene.current], distance[:, scene.current], settings)
    trains = _trained(scene, valid, distance[:, scene.current], settings)
    seen = valid[index]
    pose = to_frame(torch.cat((scene.positions[index, :, :2], scene.headings[index, :, None]), -1), frame)
    factor = math.exp(math.log(settings.stretch) * (2 * torch.rand(()).item() - 1)) if settings.stretch > 1 else 1.0
    longer = torch.tensor([factor, factor, 1.0], dtype=torch.float64)
    pose = pose * longer
    velocity = factor * turned(scene.velocities[index].double(), -frame[2])
    broken = seen & ~(pose.isfinite().all(-1) & velocity.isfinite().all(-1))
    if broken.any():
        agent, step = broken.nonzero()[0].tolist()
        raise ValueError(
            f"scene {scene.scenario_id}: agent {int(scene.agent_ids[index[agent]])} has a valid state that is not finite "
            f"at step {step}"
        )
    types = scene.agent_types[index]
    known = (types >= AgentType.VEHICLE) & (types <= AgentType.CYCLIST)
    pieces = map_pieces(scene)
    near = _nearest(pieces.pose[:, :2] - car, scene.positions[index, scene.current, :2] - car, settings.max_pieces)
    return ViewedScene(
        agent_pose=torch.where(seen[..., None], pose, 0.0).float(),
        agent_velocity=torch.where(seen[..., None], velocity, 0.0).float(),
        agent_valid=seen,
        agent_height=scene.positions[index, scene.current, 2].float(),
        agent_size=scene.sizes[index, scene.current].float(),
        agent_type=torch.where(known, types - AgentType.VEHICLE, 0),
        agent_trains=trains[index],
        agent_index=index,
        map_pose=(to_frame(pieces.pose[near], frame) * longer).float(),
        map_points=factor * pieces.points[near].float(),
        map_type=pieces.type[near],
        map_light=pieces.light[near],
        frame=frame,
        scene=scene,
    )


def _require_car(scene: Scene) -> None:
    if not scene.valid[scene.sdc, scene.current]:
        raise ValueError(
            f"scene {scene.scenario_id}: its self-driving car, agent {int(scene.agent_ids[scene.sdc])}, is not valid at "
            f"the current step {scene.current}"
        )


def _roles(scene: Scene) -> Tensor:
    """(a,) bool: the self-driving car, agents to predict or of interest."""
    roles = torch.zeros(scene.agents, dtype=torch.bool)
    roles[torch.cat((scene.scored(), scene.of_interest))] = True
    return roles


def _shown(scene: Scene, valid: Tensor, distance: Tensor, settings: SceneView) -> Tensor:
    """Rising indices of the agents shown, of those valid at the current step."""
    candidates = valid.nonzero().flatten()
    most = settings.max_agents
    if most is None or len(candidates) <= most:
        return candidates
    roles = _roles(scene)[candidates]
    if not settings.drop_agents or int(roles.sum()) > most:
        raise ValueError(
            f"scene {scene.scenario_id}: {len(candidates)} agents at the current step, {int(roles.sum())} of them with a "
            f"role, and max_agents is {most}; raise it"
        )
    # One text for all scenes, so that it is shown once.
    warnings.warn(f"agents beyond max_agents={most} are left out of scenes, the farthest first", stacklevel=2)
    order = torch.where(roles, -1.0, distance[candidates]).argsort(stable=True)
    return candidates[order[:most]].sort().values


def _trained(scene: Scene, valid: Tensor, distance: Tensor, settings: SceneView) -> Tensor:
    roles = _roles(scene)
    future = valid[:, scene.current + 1 :].sum(1)
    wanted = valid[:, scene.current] & (roles | ((distance <= settings.trained) & (future >= settings.future_steps)))
    rank = torch.where(wanted, torch.where(roles, -1.0, distance), torch.inf).argsort(stable=True)
    chosen = torch.zeros_like(wanted)
    chosen[rank[: settings.most_trained]] = True
    return chosen & wanted


def _nearest(starts: Tensor, agents: Tensor, most: int | None) -> Tensor:
    """Rising indices of the `most` starts (m, 2) that are nearest to an agent (a, 2)."""
    if most is None or len(starts) <= most:
        return torch.arange(len(starts))
    distance = torch.cdist(starts.float(), agents.float()).amin(1)
    return distance.topk(most, largest=False).indices.sort().values
