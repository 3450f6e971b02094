"""What the realism score looks at in a scene: motion, nearness to others and to the map, of the recorded future and of
every rollout alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.scene import AgentType, FeatureType, LightState, Scene
from tasks.metrics.box_distance import nearest_object
from tasks.metrics.kinematics import angular_motion, central_and, linear_motion, wrap
from tasks.metrics.road_edge import RoadEdges, distance_to_road_edge, road_edges
from tasks.metrics.time_to_collision import time_to_collision
from tasks.metrics.traffic_light import Lanes, lanes_of, red_light_violations

FUTURE = 80
"""Steps that are simulated."""
_EDGES = (FeatureType.EDGE_BOUNDARY, FeatureType.EDGE_MEDIAN, FeatureType.EDGE_UNKNOWN)
_OFF_MAP = -1e10

Place = Callable[[Tensor], Tensor]


class SceneFeatures(NamedTuple):
    """Features of e scored agents, in 1 recorded and r simulated futures of s steps.

    Attributes:
        linear_speed, linear_acceleration, angular_speed, angular_acceleration: (e, 1 + r, s); NaN where undefined.
        distance_to_nearest_object: (e, 1 + r, s) metres.
        collision_indication: (e, 1 + r, s) bool.
        time_to_collision: (e, 1 + r, s) seconds.
        distance_to_road_edge: (e, 1 + r, s) metres, positive off the road; None where the scene has no road edges.
        offroad_indication: (e, 1 + r, s) bool, or None likewise.
        traffic_light_violation: (e, 1 + r, s) bool.
        displacement: (e, r, s) metres between simulated and recorded centres.
        valid: (e, s) bool, of the recorded future.
        valid_with_history: (e, h + s) bool, of all recorded steps.
        is_vehicle: (e,) bool.
    """

    linear_speed: Tensor
    linear_acceleration: Tensor
    angular_speed: Tensor
    angular_acceleration: Tensor
    distance_to_nearest_object: Tensor
    collision_indication: Tensor
    time_to_collision: Tensor
    distance_to_road_edge: Tensor | None
    offroad_indication: Tensor | None
    traffic_light_violation: Tensor
    displacement: Tensor
    valid: Tensor
    valid_with_history: Tensor
    is_vehicle: Tensor


def scene_features(scene: Scene, states: Tensor, index: Tensor, parity: bool = True) -> SceneFeatures:
    """Features of a scene and its rollouts, on the device and in the precision of `states`.

    Boxes keep the size that they have at the current step. In rollouts every agent stays valid.

    Args:
        scene: with `FUTURE` steps behind the current one.
        states: (a, r, `FUTURE`, 4) x, y, z, heading in the coordinates of the scene.
        index: (a,) int64 agents of the scene, all of those valid at the current step and no other.
        parity: do as the official code does where it departs from its own description; see `docs/metrics_driving.md`.
    """
    device, dtype = states.device, states.dtype
    index = index.to(device)
    scored = (index == scene.scored().to(device)[:, None]).int().argmax(1)  # (e,) places among the agents of states
    origin = scene.origin
    place = partial(_as_in_file, origin=origin) if parity else _unchanged
    now = scene.current
    valid = scene.valid.to(device)[index]  # (a, t)
    positions, headings = scene.positions.to(device, dtype)[index], wrap(scene.headings.to(device, dtype)[index])
    if parity:  # what is not valid is zero in the coordinates of the file
        positions = torch.where(valid[..., None], positions, -origin.to(positions))
        headings = torch.where(valid, headings, 0)
    recorded = torch.cat((place(positions), headings[..., None]), dim=-1)  # (a, t, 4)
    history = recorded[:, None, : now + 1].expand(-1, 1 + states.shape[1], -1, -1)
    simulated = torch.cat((place(states[..., :3]), wrap(states[..., 3:])), dim=-1)
    tracks = torch.cat((history, torch.cat((recorded[:, None, now + 1 :], simulated), dim=1)), dim=2)  # (a, 1+r, t, 4)
    track_valid = valid[:, None].expand(tracks.shape[:3]).clone()
    track_valid[:, 1:, now + 1 :] = True
    sizes = scene.sizes.to(device, dtype)[index, now]

    motion = _motion(tracks[scored], None if parity else track_valid[scored], now)
    nearest, times = _interactions(tracks[:, :, now:], track_valid[:, :, now:], sizes, scored, parity)
    future, future_valid = tracks[scored][:, :, now + 1 :], track_valid[scored][:, :, now + 1 :]
    to_edge = _to_edge(scene, future, future_valid, sizes[scored], place, parity)
    violated = _violations(scene, tracks[scored][:, :, now:, :2], track_valid[scored][:, :, now:], place, parity)
    return SceneFeatures(
        *motion,
        distance_to_nearest_object=nearest,
        collision_indication=nearest < 0,
        time_to_collision=times,
        distance_to_road_edge=to_edge,
        offroad_indication=None if to_edge is None else to_edge > 0,
        traffic_light_violation=violated,
        displacement=(future[:, 1:, :, :3] - future[:, :1, :, :3]).norm(dim=-1),
        valid=valid[scored][:, now + 1 :],
        valid_with_history=valid[scored],
        is_vehicle=scene.agent_types.to(device)[index][scored] == AgentType.VEHICLE,
    )


def _unchanged(points: Tensor) -> Tensor:
    return points


def _as_in_file(points: Tensor, origin: Tensor) -> Tensor:
    """(..., 3) points rounded as float32 rounds them in the coordinates of the file, kilometres from its origin."""
    origin = origin.to(points.device)
    return ((points.double() + origin).float().double() - origin).to(points.dtype)


def _motion(tracks: Tensor, valid: Tensor | None, now: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Speeds and accelerations of the future; given `valid`, NaN where a step that they look at is not valid."""
    speed, acceleration = linear_motion(tracks[..., :3])
    turning, angular_acceleration = angular_motion(tracks[..., 3])
    if valid is not None:
        known = central_and(valid)
        speed, turning = (torch.where(known, value, math.nan) for value in (speed, turning))
        known = central_and(known)
        acceleration = torch.where(known, acceleration, math.nan)
        angular_acceleration = torch.where(known, angular_acceleration, math.nan)
    return (
        speed[..., now + 1 :],
        acceleration[..., now + 1 :],
        turning[..., now + 1 :],
        angular_acceleration[..., now + 1 :],
    )


def _interactions(tracks: Tensor, valid: Tensor, sizes: Tensor, scored: Tensor, parity: bool) -> tuple[Tensor, Tensor]:
    """Distance to the nearest object and time to collision of the future; `tracks` begin at the current step."""
    speed = linear_motion(tracks[..., :2])[0]
    if not parity:
        speed = torch.where(central_and(valid), speed, math.nan)
    rollouts, steps = tracks.shape[1], tracks.shape[2] - 1
    flat, flat_valid = tracks[:, :, 1:].flatten(1, 2), valid[:, :, 1:].flatten(1)
    flat_speed = speed[:, :, 1:].flatten(1)
    centers, headings, plane = flat[..., :2], flat[..., 3], sizes[:, :2]
    nearest = nearest_object(centers, headings, plane, flat_valid, scored)
    times = time_to_collision(centers, headings, flat_speed, plane, flat_valid, scored, wrap_difference=not parity)
    return nearest.view(-1, rollouts, steps), times.view(-1, rollouts, steps)


def _lines(scene: Scene, chosen: Tensor, dtype: torch.dtype, place: Place) -> list[Tensor]:
    points, bounds = place(scene.points.to(dtype)), scene.feature_starts.tolist()
    return [points[bounds[j] : bounds[j + 1]] for j in chosen.nonzero().flatten().tolist()]


def _to_edge(scene: Scene, tracks: Tensor, valid: Tensor, sizes: Tensor, place: Place, parity: bool) -> Tensor | None:
    """(e, 1 + r, s) metres; None where the scene has no road edges."""
    chosen = torch.isin(scene.feature_types, scene.feature_types.new_tensor(_EDGES))
    edges = road_edges(_lines(scene, chosen, tracks.dtype, place), close_longest_only=parity)
    if edges is None:
        return None
    edges = RoadEdges(*(part.to(tracks.device) for part in edges))
    boxes = tracks[valid]  # (n, 4)
    size = sizes[:, None, None].expand(*valid.shape, 3)[valid]
    distance = tracks.new_full(valid.shape, _OFF_MAP)
    distance[valid] = distance_to_road_edge(boxes[:, :3], boxes[:, 3], size, edges, place)
    return distance


def _violations(scene: Scene, points: Tensor, valid: Tensor, place: Place, parity: bool) -> Tensor:
    """(e, 1 + r, s) bool; `points` (e, 1 + r, 1 + s, 2) and `valid` begin at the current step."""
    chosen = scene.feature_types == FeatureType.LANE_SURFACE
    zero = -scene.origin[:2].to(points.dtype)
    ghost = zero if parity else None
    lanes = lanes_of(_lines(scene, chosen, points.dtype, place), scene.feature_ids[chosen], ghost)
    if lanes is None or not len(scene.light_lanes):
        return torch.zeros_like(valid[..., 1:])
    given = scene.light_valid[scene.current :]
    states = torch.where(given, scene.light_states[scene.current :], LightState.UNKNOWN)
    stops = place(scene.light_stops[scene.current :].to(points.dtype))[..., :2]
    if parity:  # a stop point that is not given is zero in the coordinates of the file
        stops = torch.where(given[..., None], stops, zero)
    device = points.device
    lanes = Lanes(*(part.to(device) for part in lanes))
    return red_light_violations(
        points, valid, lanes, scene.light_lanes.to(device), states.to(device), stops.to(device), parity
    )[..., 1:]
