"""Made-up traffic, from a seed: unicycles that follow the lanes of a town, keep their distance and stop at red lights.

Distances are kept by the intelligent driver model (arXiv cond-mat/0002177). The scenes are for tests, memory sweeps and
pretraining; they say nothing about how people drive.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from datamodules.scene import AgentType, LightState, Scene
from datamodules.synthetic_roads import Roads, build_roads
from datamodules.windows import most_travelled

STEPS, CURRENT, DT = 91, 10, 0.1
_LEGS = 9  # lines of a route; at most 150 m are driven
_PHASE, _GREEN, _CAUTION = 7.5, 4.0, 6.2  # seconds: of a crossing's way in, of its end of green, of its end of caution
_MOST_A_CROSSING = 24
_TYPES = np.array([AgentType.VEHICLE, AgentType.PEDESTRIAN, AgentType.CYCLIST])
_SIZES = np.array([[4.8, 2.0, 1.6], [0.8, 0.8, 1.75], [1.8, 0.7, 1.7]])
_SPEEDS = np.array([[9.0, 15.0], [0.9, 1.8], [3.5, 6.5]])  # metres a second that agents want, least and greatest
_ACCELERATION = np.array([2.0, 1.0, 1.2])
_BRAKING, _HARDEST = 2.5, 8.0
_KEPT = np.array([2.0, 0.5, 1.0])  # metres between stopped agents


class _Fleet(NamedTuple):
    kind: np.ndarray  # (a,) 0 vehicle, 1 pedestrian, 2 cyclist
    size: np.ndarray  # (a, 3)
    wish: np.ndarray  # (a,) speed
    route: np.ndarray  # (a, legs) lines, −1 where the town ends
    place: np.ndarray  # (a,) metres along the first line


def synthetic_scene(
    seed: int,
    agents: int = 32,
    later: int = 0,
    turns: int = 0,
    gaps: float = 0.1,
    crossings: int | None = None,
    mixture: tuple[float, float, float] = (0.7, 0.2, 0.1),
) -> Scene:
    """Returns a scene of 91 steps, current step 10; equal arguments give equal scenes.

    All `agents` are valid at the current step, some of them only from a step just before; they stop being valid where
    they leave the town. The last agent is the self-driving car, a vehicle valid throughout. Agents to predict are the
    eight `most_travelled`.

    Args:
        seed: of everything that varies.
        agents: valid at the current step, at least 1.
        later: further agents that appear after it.
        turns: 0 wraps headings to [−π, π); k leaves them continuous and adds up to ±k full turns to each agent's.
        gaps: share of the agents that are unseen for some future steps.
        crossings: of a side of the town; None makes room for the agents.
        mixture: shares of vehicles, pedestrians and cyclists.

    Raises:
        ValueError: if there are no agents, or more than the town has room for.
    """
    if agents < 1 or later < 0:
        raise ValueError(f"synthetic scene {seed}: agents={agents} and later={later}, expected at least 1 and 0")
    random = np.random.default_rng(seed)
    total = agents + later
    side = crossings or int(np.ceil(np.sqrt(total / _MOST_A_CROSSING)))
    roads = build_roads(side, tuple(random.uniform(0, 2 * np.pi, 2)))
    fleet = _place(random, roads, total, np.asarray(mixture, np.float64), seed)
    lights = _lights(random, side * side)
    line, place, speed = _drive(roads, fleet, lights)
    points, heading = _poses(roads, line, place)

    valid = line >= 0
    birth = np.zeros(total, np.int64)
    late = random.random(total) < 0.1
    birth[late] = random.integers(1, CURRENT + 1, late.sum())
    birth[:later] = random.integers(CURRENT + 1, STEPS - 5, later)
    birth[-1] = 0
    valid &= np.arange(STEPS) >= birth[:, None]
    unseen = random.random(total) < gaps
    unseen[-1] = False
    begin, long = random.integers(CURRENT + 5, STEPS - 10, total), random.integers(3, 9, total)
    steps = np.arange(STEPS)
    valid &= ~(unseen[:, None] & (steps >= begin[:, None]) & (steps < (begin + long)[:, None]))
    return _scene(random, seed, roads, fleet, lights, points, heading, speed, valid, turns)


def _place(random: np.random.Generator, roads: Roads, total: int, mixture: np.ndarray, seed: int) -> _Fleet:
    """Puts agents at distinct places; the last is a vehicle that enters a crossing near the middle."""
    kind = random.choice(3, total, p=mixture / mixture.sum())
    kind[-1] = 0
    route = np.full((total, _LEGS), -1)
    place = np.zeros(total)
    lanes = np.concatenate((roads.way_in, roads.way_out))
    for number, (lines, pitch, ends) in enumerate(
        ((lanes, 12.0, 20.0), (roads.walk, 5.0, 6.0), (roads.bike, 9.0, 12.0))
    ):
        chosen = np.flatnonzero(kind == number)
        rooms = np.maximum(((roads.length[lines] - ends) / pitch).astype(np.int64), 0)
        slots = np.stack((np.repeat(lines, rooms), np.concatenate([np.arange(room) for room in rooms])), 1)
        if len(chosen) > len(slots):
            raise ValueError(
                f"synthetic scene {seed}: {len(chosen)} agents of type {_TYPES[number]}, its roads have room for "
                f"{len(slots)}; raise crossings"
            )
        order = random.permutation(len(slots))
        if number == 0:
            middle = np.hypot(*roads.points[roads.starts[roads.way_in + 1] - 1].T).argmin()
            first = np.flatnonzero((slots[:, 0] == roads.way_in[middle]) & (slots[:, 1] == 0))[0]
            order = np.append(order[order != first][: len(chosen) - 1], first)
        taken = slots[order[: len(chosen)]]
        route[chosen, 0] = taken[:, 0]
        place[chosen] = (taken[:, 1] + random.uniform(0.2, 0.6, len(chosen))) * pitch
    for leg in range(1, _LEGS):
        following = roads.successors[route[:, leg - 1], random.integers(0, 3, total)]
        route[:, leg] = np.where(route[:, leg - 1] >= 0, following, -1)
    size = _SIZES[kind] * random.uniform(0.9, 1.15, (total, 1))
    return _Fleet(kind, size, random.uniform(*_SPEEDS[kind].T), route, place)


def _lights(random: np.random.Generator, crossings: int) -> np.ndarray:
    """(t, 12 g) light states; the four ways into a crossing have green one after the other."""
    times = np.arange(STEPS)[:, None, None] * DT + random.uniform(0, 4 * _PHASE, (1, crossings, 1))
    within = (times - np.arange(4) * _PHASE) % (4 * _PHASE)  # (t, g, 4) seconds since a way's green began
    state = np.where(within < _GREEN, LightState.GO, np.where(within < _CAUTION, LightState.CAUTION, LightState.STOP))
    arrow = state - LightState.STOP + LightState.ARROW_STOP
    return np.stack((state, arrow, state), -1).reshape(STEPS, -1)  # left turns have arrows


def _drive(roads: Roads, fleet: _Fleet, lights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Line (a, t), −1 after an agent has left; place on it (a, t) in metres; speed (a, t)."""
    total = len(fleet.kind)
    agents, leg, place = np.arange(total), np.zeros(total, np.int64), fleet.place.copy()
    route = np.concatenate((fleet.route, np.full((total, 3), -1)), 1)
    length = np.append(roads.length, 1e6)  # of line −1, which is where agents that left are
    curve = np.append(roads.curve_speed, 30.0)
    light_of = np.full(len(length), -1)
    light_of[roads.signalled] = np.arange(len(roads.signalled))
    size, kept, strength = fleet.size[:, 0], _KEPT[fleet.kind], _ACCELERATION[fleet.kind]
    goes = np.isin(np.append(lights, np.full((STEPS, 1), LightState.GO), 1), (LightState.GO, LightState.ARROW_GO))
    stops = np.isin(np.append(lights, np.full((STEPS, 1), LightState.GO), 1), (LightState.STOP, LightState.ARROW_STOP))
    comfort = 2 * np.sqrt(strength * _BRAKING)
    speed = np.zeros(total)
    lines, places, speeds = [], [], []
    for step in range(STEPS):
        here, ahead, beyond = route[agents, leg], route[agents, leg + 1], route[agents, leg + 2]
        left = length[here] - place
        gap, leader = _leaders(here, ahead, beyond, place, left, length, size)
        light = light_of[ahead]
        line = left - size / 2 - 0.5  # metres from the front to the stop line
        needed = speed**2 / (2 * np.maximum(line, 0.1))
        halt = stops[step, light] | (~goes[step, light] & (needed < 4.0))
        must = halt & (line < gap) & (left > 0)
        gap, closing = np.where(must, line, gap), np.where(must, speed, speed - np.append(speed, 0.0)[leader])
        gap = np.maximum(gap, 0.1)
        wish = np.minimum(fleet.wish, curve[here])
        wish = np.minimum(wish, np.sqrt(curve[ahead] ** 2 + 2 * 1.5 * np.maximum(left, 0.0)))
        if step == 0:  # as fast as everyone could be without braking hard
            speed = np.minimum(wish * 0.9, np.sqrt(2 * 1.5 * np.maximum(gap - kept - 1.0, 0.0)))
            closing = speed
        safe = kept + np.maximum(speed * 1.0 + speed * closing / comfort, 0.0)
        change = strength * (1 - (speed / wish) ** 4 - (safe / gap) ** 2)
        lines.append(here)
        places.append(place)
        speeds.append(speed)
        speed = np.maximum(speed + DT * np.clip(change, -_HARDEST, None), 0.0)
        place = place + DT * speed
        over = (place > length[here]) & (here >= 0)
        place, leg = place - over * length[here], leg + over
    return np.stack(lines, 1), np.stack(places, 1), np.stack(speeds, 1)


def _leaders(
    here: np.ndarray,
    ahead: np.ndarray,
    beyond: np.ndarray,
    place: np.ndarray,
    left: np.ndarray,
    length: np.ndarray,
    size: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Metres between bumpers to the next agent on this line or the two after it, and its index; 1e3 and −1 for none."""
    total = len(here)
    order = np.lexsort((place, here))
    sorted_lines = here[order]
    gap: np.ndarray = np.full(total, 1e3)
    leader: np.ndarray = np.full(total, -1)
    behind = np.flatnonzero((sorted_lines[1:] == sorted_lines[:-1]) & (sorted_lines[1:] >= 0))
    leader[order[behind]] = order[behind + 1]
    last = np.full(len(length), -1)  # the hindmost agent of each line
    first = np.flatnonzero(np.append(True, sorted_lines[1:] != sorted_lines[:-1]) & (sorted_lines >= 0))
    last[sorted_lines[first]] = order[first]
    distance = np.where(leader >= 0, place[leader] - place, 1e3)
    for line, offset in ((ahead, left), (beyond, left + length[ahead])):
        candidate = last[line]
        found = (leader < 0) & (candidate >= 0) & (line >= 0)
        distance = np.where(found, offset + place[candidate], distance)
        leader = np.where(found, candidate, leader)
    known = leader >= 0
    gap[known] = distance[known] - (size[known] + size[leader[known]]) / 2
    return gap, leader


def _poses(roads: Roads, line: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (a, t, 2) and headings (a, t) of places on lines."""
    long = roads.length.max() + 1.0
    keys = np.repeat(np.arange(len(roads.length)), np.diff(roads.starts)) * long + roads.arc
    inside = np.maximum(line, 0)
    index = np.searchsorted(keys, inside * long + place, side="right") - 1
    index = np.clip(index, roads.starts[inside], roads.starts[inside + 1] - 2)
    share = (place - roads.arc[index]) / (roads.arc[index + 1] - roads.arc[index])
    points = roads.points[index] + share[..., None] * (roads.points[index + 1] - roads.points[index])
    return points, roads.heading[index] + share * (roads.heading[index + 1] - roads.heading[index])


def _scene(
    random: np.random.Generator,
    seed: int,
    roads: Roads,
    fleet: _Fleet,
    lights: np.ndarray,
    points: np.ndarray,
    heading: np.ndarray,
    speed: np.ndarray,
    valid: np.ndarray,
    turns: int,
) -> Scene:
    """Turns the town by an angle, moves it kilometres away and writes all in a scene."""
    angle = random.uniform(-np.pi, np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    hills = random.uniform(0, 2 * np.pi, 2)

    def ground(at: np.ndarray) -> np.ndarray:
        return np.sin(at[..., 0] / 90 + hills[0]) + np.sin(at[..., 1] / 70 + hills[1])

    def placed(at: np.ndarray, lift: np.ndarray | float = 0.0) -> torch.Tensor:
        return torch.from_numpy(np.append(at @ turn, (ground(at) + lift)[..., None], -1).astype(np.float32))

    total = len(fleet.kind)
    heading = np.unwrap(heading, axis=1) + angle
    full = 2 * np.pi
    heading = heading + full * random.integers(-turns, turns + 1, (total, 1)) if turns else heading
    velocity = speed[..., None] * np.stack((np.cos(heading), np.sin(heading)), -1)
    heading = heading if turns else (heading + np.pi) % full - np.pi
    seen = torch.from_numpy(valid)
    positions = placed(points, fleet.size[:, None, 2] / 2)
    stops = roads.points[roads.starts[roads.signalled]]
    ids = np.arange(len(roads.features)) + 1
    empty = torch.zeros(0, dtype=torch.int64)
    scene = Scene(
        scenario_id=f"synthetic-{seed}",
        origin=torch.from_numpy(np.append(random.uniform(-6000, 6000, 2), random.uniform(-100, 100))),
        times=torch.arange(STEPS, dtype=torch.float64) * DT,
        current=CURRENT,
        agent_ids=torch.from_numpy(100 + np.arange(total)),
        agent_types=torch.from_numpy(_TYPES[fleet.kind].astype(np.int64)),
        positions=positions * seen[..., None],
        sizes=torch.from_numpy(fleet.size.astype(np.float32))[:, None] * seen[..., None],
        headings=torch.from_numpy(heading.astype(np.float32)) * seen,
        velocities=torch.from_numpy(velocity.astype(np.float32)) * seen[..., None],
        valid=seen,
        sdc=total - 1,
        to_predict=empty,
        difficulties=empty,
        of_interest=empty,
        feature_ids=torch.from_numpy(ids),
        feature_types=torch.tensor([int(kind) for kind, _ in roads.features]),
        feature_starts=torch.from_numpy(np.cumsum([0, *(len(line) for _, line in roads.features)])),
        points=placed(np.concatenate([line for _, line in roads.features])),
        light_lanes=torch.from_numpy(ids[roads.signalled_features]),
        light_states=torch.from_numpy(lights.astype(np.int64)),
        light_stops=placed(stops).expand(STEPS, -1, -1).contiguous(),
        light_valid=torch.ones(lights.shape, dtype=torch.bool),
    )
    chosen = most_travelled(scene, 8)
    return scene._replace(to_predict=chosen, difficulties=torch.ones_like(chosen), of_interest=chosen[:2])
