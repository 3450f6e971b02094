"""Small seeded scenes with all that is awkward: tracks that come and go, flickering lights, rings, bridges, lone points."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from datamodules.scene import FeatureType, Scene

ORIGIN = torch.tensor([4000.3, -2500.7, 31.2], dtype=torch.float64)


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def _line(start: tuple[float, float], end: tuple[float, float], points: int, z: float = 0.0) -> Tensor:
    part = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    plane = torch.tensor(start, dtype=torch.float64) * (1 - part) + torch.tensor(end, dtype=torch.float64) * part
    return torch.cat((plane, torch.full((points, 1), z, dtype=torch.float64)), 1)


def _ring(center: tuple[float, float], radius: float, points: int) -> Tensor:
    angle = torch.linspace(0, 2 * math.pi, points, dtype=torch.float64)
    return torch.stack((center[0] + radius * angle.cos(), center[1] + radius * angle.sin(), 0 * angle), -1)


def features(generator: torch.Generator) -> list[tuple[int, Tensor]]:
    """(type, points) of a crossing of two roads with an island, a bridge and degenerate pieces."""
    wave = _line((-80, 9), (80, 9), 33).flip(0)
    wave[:, 1] += 1.5 * torch.sin(wave[:, 0] / 7)
    repeated = _line((-80, -9), (80, -9), 21)
    repeated = torch.cat((repeated[:8], repeated[7:8], repeated[8:]))
    zigzag = _line((20, -60), (20, 60), 25) + torch.nn.functional.pad(_uniform(generator, -1.5, 1.5, 25, 1), (0, 2))
    return [
        (FeatureType.LANE_SURFACE, _line((-80, -3), (80, -3), 23)),
        (FeatureType.LANE_SURFACE, _line((80, 3), (-80, 3), 40)),
        (FeatureType.LANE_SURFACE, _line((12, -60), (12, 60), 9)),
        (FeatureType.LANE_BIKE, _line((-80, -6), (80, -6), 12)),
        (FeatureType.LANE_SURFACE, _line((5, 5), (5, 5), 1)),
        (FeatureType.EDGE_BOUNDARY, wave),
        (FeatureType.EDGE_BOUNDARY, repeated),
        (FeatureType.EDGE_MEDIAN, _ring((-30, 0), 1.5, 12).flip(0)),
        (FeatureType.EDGE_MEDIAN, _ring((40, 0), 2.5, 33)),
        (FeatureType.EDGE_BOUNDARY, zigzag),
        (FeatureType.EDGE_BOUNDARY, _line((-20, -40), (-20, 40), 15, 8.0)),
        (FeatureType.EDGE_UNKNOWN, _line((0, 0), (0, 0), 1)),
        (FeatureType.LINE_SOLID_WHITE, _line((-80, 0), (80, 0), 5)),
    ]


def scene_and_states(
    seed: int, agents: int = 9, rollouts: int = 4, gaps: bool = True, lights: bool = True
) -> tuple[Scene, Tensor, Tensor]:
    """A scene of 91 steps, rollouts (s, r, 80, 4) that stray from the record, and the agents (s,) that they move."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(91, dtype=torch.float64) / 10
    road = torch.randint(3, (agents,), generator=generator)
    start = torch.stack((_uniform(generator, -60, 0, agents), torch.full((agents,), -3.0, dtype=torch.float64)), -1)
    start[road == 1] = start[road == 1] * -1
    start[road == 2] = torch.stack((torch.full((agents,), 12.0), start[:, 0]), -1)[road == 2].double()
    base = torch.tensor([0.0, math.pi, math.pi / 2], dtype=torch.float64)[road]
    speed, rate = _uniform(generator, 0, 14, agents), _uniform(generator, -0.06, 0.06, agents)

    def drive(speed: Tensor, rate: Tensor) -> Tensor:
        heading = base[:, None] + rate[:, None] * time
        step = torch.stack((heading.cos(), heading.sin()), -1) * speed[:, None, None] * 0.1
        plane = start[:, None] + step.cumsum(1) - step[:, :1]
        height = 0.02 * plane[..., :1]
        return torch.cat((plane, height, heading[..., None]), -1)

    track = drive(speed, rate)
    kinds = torch.ones(agents, dtype=torch.int64)
    kinds[1::4], kinds[3::5] = 2, 3
    size = torch.stack(
        (_uniform(generator, 3, 6, agents), _uniform(generator, 1.6, 2.4, agents), _uniform(generator, 1, 2, agents)),
        -1,
    )
    size[kinds == 2] = torch.tensor([0.8, 0.9, 1.8], dtype=torch.float64)
    valid = torch.ones(agents, 91, dtype=torch.bool)
    if gaps:
        for agent in range(1, agents):
            low, high = sorted(torch.randint(91, (2,), generator=generator).tolist())
            valid[agent, low : min(high, low + 40)] = False
        valid[1:5, 10] = True
        valid[-1, 10] = False
    lines = features(generator)
    lane_ids = torch.arange(100, 100 + len(lines))
    light_lanes = lane_ids[[0, 1, 2, 3]] if lights else lane_ids[:0]
    count = len(light_lanes)
    state = torch.randint(9, (10, count), generator=generator).repeat_interleave(10, 0)[:91]
    state[:, :2] = torch.where(torch.rand(91, min(2, count), generator=generator) < 0.9, 4, state[:, :2])
    stop = torch.tensor([[-10, -3, 0], [20, 3, 0], [12, -15, 0], [0, -6, 0]], dtype=torch.float64)[:count]
    given = torch.rand(91, count, generator=generator) < 0.9
    scored = torch.tensor([agent for agent in (1, 2, 3, 4, 0) if agent < agents])
    scene = Scene(
        scenario_id=f"made{seed}",
        origin=ORIGIN,
        times=time,
        current=10,
        agent_ids=torch.arange(agents) * 7 + 3,
        agent_types=kinds,
        positions=torch.where(valid[..., None], track[..., :3], 0).float(),
        sizes=torch.where(valid[..., None], size[:, None], 0).float(),
        headings=torch.where(valid, track[..., 3], 0).float(),
        velocities=torch.zeros(agents, 91, 2),
        valid=valid,
        sdc=0,
        to_predict=scored[:-1],
        difficulties=torch.zeros(len(scored) - 1, dtype=torch.int64),
        of_interest=scored[:0],
        feature_ids=lane_ids,
        feature_types=torch.tensor([int(kind) for kind, _ in lines]),
        feature_starts=torch.tensor([0, *(len(line) for _, line in lines)]).cumsum(0),
        points=torch.cat([line for _, line in lines]).float(),
        light_lanes=light_lanes,
        light_states=torch.where(given, state, 0),
        light_stops=torch.where(given[..., None], stop, 0).float(),
        light_valid=given,
    )
    index = scene.simulated()
    made = [
        drive(speed * _uniform(generator, 0.8, 1.2, agents), rate + _uniform(generator, -0.04, 0.04, agents))
        for _ in range(rollouts)
    ]
    offset = torch.where(valid[:, 10, None, None], track[:, 10:11] - torch.stack(made)[:, :, 10:11], 0)
    states = (torch.stack(made) + offset)[:, index, 11:].movedim(0, 1)
    return scene, states.float().contiguous(), index
