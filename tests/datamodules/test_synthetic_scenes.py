"""Made-up traffic: equal for equal seeds, unicycles on their lanes, red lights kept, fields as a recording has them."""

from __future__ import annotations

import math

import pytest
import torch

from datamodules.scene import AgentType, FeatureType, LightState
from datamodules.synthetic_scenes import synthetic_scene


def test_equal_seeds_give_equal_scenes():
    for first, second in zip(synthetic_scene(5), synthetic_scene(5), strict=True):
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    assert not torch.equal(synthetic_scene(5).points, synthetic_scene(6).points)


@pytest.mark.parametrize("agents", [1, 2, 64, 1024])
def test_all_agents_are_valid_at_the_current_step(agents):
    scene = synthetic_scene(agents, agents=agents, later=3)
    assert len(scene.simulated()) == agents
    assert scene.agents == agents + 3
    assert scene.valid[scene.sdc].all()
    assert scene.agent_types[scene.sdc] == AgentType.VEHICLE
    assert not scene.valid[:3, :11].any()
    assert scene.valid[:3].any()
    for values in (scene.positions, scene.sizes, scene.headings[..., None], scene.velocities):
        assert values.isfinite().all()
        assert not values[~scene.valid].any()
    assert scene.feature_starts[-1] == len(scene.points)
    assert torch.isin(scene.light_lanes, scene.feature_ids).all()
    assert scene.agent_ids.unique().numel() == scene.agents


def test_some_are_born_late_some_leave_and_some_are_unseen_for_a_while():
    valid = torch.cat([synthetic_scene(seed, agents=64).valid for seed in range(4)])
    first = valid.float().argmax(1)
    assert (first == 0).any()
    assert (first > 0).any()
    assert first.max() <= 10
    assert (~valid[:, -1]).any()
    assert ((valid[:, 1:] & ~valid[:, :-1]).sum(1) > (first > 0)).any()  # seen again


def test_agents_are_unicycles():
    scene = synthetic_scene(3, agents=64)
    both = scene.valid[:, 1:] & scene.valid[:, :-1]
    step = (scene.positions[:, 1:, :2] - scene.positions[:, :-1, :2]) / 0.1
    # The speed of a step is that of its end; it changes by at most 0.8 m/s in one.
    assert (step - scene.velocities[:, 1:]).norm(dim=-1)[both].max() < 0.9
    direction = torch.stack((scene.headings.cos(), scene.headings.sin()), -1)
    speed = scene.velocities.norm(dim=-1)
    torch.testing.assert_close((direction * scene.velocities).sum(-1)[scene.valid], speed[scene.valid])
    assert set(scene.agent_types.tolist()) == {1, 2, 3}


def test_agents_keep_apart():
    closest = []
    for seed in range(4):
        scene = synthetic_scene(seed, agents=64)
        for step in range(0, 91, 10):
            here = scene.positions[scene.valid[:, step], step, :2]
            closest.append(float((torch.cdist(here, here) + 1e3 * torch.eye(len(here))).min()))
    assert min(closest) > 0.8  # two pedestrians pass at a metre


def test_nobody_starts_through_a_red_light():
    crossed = passed = 0
    for seed in range(6):
        scene = synthetic_scene(seed, agents=64, gaps=0)
        red = (scene.light_states == LightState.STOP) | (scene.light_states == LightState.ARROW_STOP)
        vehicles = scene.agent_types == AgentType.VEHICLE
        offset = scene.positions[:, :, None, :2] - scene.light_stops[None, ..., :2]
        near = offset.norm(dim=-1) < 2.5
        forward = (
            offset * scene.velocities[:, :, None] / scene.velocities.norm(dim=-1)[:, :, None, None].clamp(min=1e-6)
        ).sum(-1)
        over = (forward[:, :-1] < 0) & (forward[:, 1:] >= 0) & near[:, 1:] & vehicles[:, None, None]
        passed += int(over.any(-1).sum())
        # Several lanes begin at a stop point and differ in light only by kind, so any of them tells.
        crossed += int((over & red[None, 1:] & red[None, :-1]).any(-1).sum())
    assert passed > 30
    assert crossed <= 0.05 * passed  # who can't stop any more goes on


def test_headings_are_wrapped_or_turned():
    wrapped, turned = synthetic_scene(4, agents=32), synthetic_scene(4, agents=32, turns=2)
    assert wrapped.headings.abs().max() <= 3.1415928
    assert turned.headings.abs().max() > 2 * math.pi
    assert (turned.headings.diff(dim=1).abs()[turned.valid[:, 1:] & turned.valid[:, :-1]] < 0.5).all()


def test_the_road_lies_left_of_its_edges():
    scene = synthetic_scene(0, agents=24)
    lanes = torch.cat(
        [
            scene.points[scene.feature_starts[j] : scene.feature_starts[j + 1], :2]
            for j in range(len(scene.feature_ids))
            if scene.feature_types[j] == FeatureType.LANE_SURFACE
        ]
    )
    edges = 0
    for j in (scene.feature_types == FeatureType.EDGE_BOUNDARY).nonzero().flatten().tolist():
        edge = scene.points[scene.feature_starts[j] : scene.feature_starts[j + 1], :2]
        nearest = lanes[torch.cdist(edge[:-1], lanes).argmin(1)]
        along, across = edge.diff(dim=0), nearest - edge[:-1]
        assert (along[:, 0] * across[:, 1] - along[:, 1] * across[:, 0] > 0).all()
        edges += 1
    assert edges == 4


def test_too_many_for_the_town():
    with pytest.raises(ValueError, match="room for"):
        synthetic_scene(0, agents=200, crossings=1)
    with pytest.raises(ValueError, match="agents=0"):
        synthetic_scene(0, agents=0)
