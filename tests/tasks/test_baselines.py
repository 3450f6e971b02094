"""Constant velocity and log replay: the recipe itself, what is held, and what is refused."""

import math

import pytest
import torch

from datamodules.scene import Scene
from models.poses import wrap
from tasks.baselines import constant_velocity, log_replay


def make(agents=3, steps=91, current=10, lost=None, born=None):
    """A scene of agents on random arcs. Agent 1 is lost from step `lost`; agent 2 is born at step `born`."""
    generator = torch.Generator().manual_seed(3)
    velocity = 10 * torch.randn(agents, 1, 2, generator=generator).expand(-1, steps, -1)
    times = 0.1 * torch.arange(steps, dtype=torch.float64)
    start = 50 * torch.randn(agents, 1, 3, generator=generator)
    positions = start.repeat(1, steps, 1)
    positions[..., :2] += velocity * times.float()[None, :, None]
    headings = torch.linspace(-9, 9, agents)[:, None] + times.float()
    valid = torch.ones(agents, steps, dtype=torch.bool)
    if lost is not None:
        valid[1, lost:] = False
    if born is not None:
        valid[2, :born] = False
    none = torch.zeros(0, dtype=torch.int64)
    return Scene(
        scenario_id="made",
        origin=torch.zeros(3, dtype=torch.float64),
        times=times,
        current=current,
        agent_ids=torch.arange(agents) + 100,
        agent_types=torch.ones(agents, dtype=torch.int64),
        positions=positions * valid[..., None],
        sizes=torch.tensor([4.8, 2.0, 1.5]) * valid[..., None],
        headings=headings * valid,
        velocities=velocity * valid[..., None],
        valid=valid,
        sdc=0,
        to_predict=torch.tensor([1]),
        difficulties=torch.tensor([0]),
        of_interest=none,
        feature_ids=none,
        feature_types=none,
        feature_starts=torch.zeros(1, dtype=torch.int64),
        points=torch.zeros(0, 3),
        light_lanes=none,
        light_states=torch.zeros(steps, 0, dtype=torch.int64),
        light_stops=torch.zeros(steps, 0, 3),
        light_valid=torch.zeros(steps, 0, dtype=torch.bool),
    )


@pytest.mark.parametrize("heading", [math.pi, -math.pi, 3 * math.pi, 3.1415925, -9.4, 12.5, 2**20 + 0.1])
def test_headings_are_wrapped_into_the_half_open_range(heading):
    scene = make()
    scene = scene._replace(headings=torch.full_like(scene.headings, heading))
    for states in (constant_velocity(scene, 2)[0], log_replay(scene, 2)[0]):
        assert ((states[..., 3] >= -math.pi) & (states[..., 3] < math.pi)).all()
        exact = scene.headings[0, 0].double()
        assert torch.allclose(states[..., 3].double().cos(), exact.cos(), atol=1e-6)
        assert torch.allclose(states[..., 3].double().sin(), exact.sin(), atol=1e-6)


def test_constant_velocity_is_the_recipe():
    scene = make()
    states, index = constant_velocity(scene, 32)
    assert states.shape == (3, 32, 80, 4)
    assert index.tolist() == [0, 1, 2]
    for agent, rollout, n in ((0, 0, 1), (1, 17, 40), (2, 31, 80)):
        factor = 0.9 + 0.2 * rollout / 31
        expected = scene.positions[agent, 10, :2] + scene.velocities[agent, 10] * factor * 0.1 * n
        assert torch.allclose(states[agent, rollout, n - 1, :2], expected, atol=1e-4)  # float32 at 100 m
    assert (states[..., 2] == scene.positions[:, 10, 2, None, None]).all()
    assert (states[..., 3] == wrap(scene.headings[:, 10].double()).float()[:, None, None]).all()


def test_one_rollout_is_the_unscaled_velocity_and_follows_straight_lines():
    scene = make()
    states, _ = constant_velocity(scene, 1, spread=0.3)
    assert torch.allclose(states[:, 0, :, :2], scene.positions[:, 11:, :2], atol=2e-4)


def test_replay_is_the_log_and_holds_the_last_valid_state():
    scene = make(lost=40, born=30)
    states, index = log_replay(scene, 2)
    assert index.tolist() == [0, 1]  # agent 2 isn't there yet
    assert torch.equal(states[0, 0, :, :3], scene.positions[0, 11:])
    assert torch.equal(states[1, 0, :29, :3], scene.positions[1, 11:40])
    assert (states[1, 0, 29:] == states[1, 0, 28]).all()
    assert torch.equal(states[:, 0], states[:, 1])
    assert states[..., 3].abs().max() <= math.pi < scene.headings.abs().max()


def test_replay_bridges_a_gap_with_the_state_before_it():
    scene = make()
    valid = scene.valid.clone()
    valid[1, 20:25] = False
    states, _ = log_replay(scene._replace(valid=valid, positions=scene.positions * valid[..., None]))
    assert (states[1, 0, 9:14, :3] == scene.positions[1, 19]).all()
    assert torch.equal(states[1, 0, 14, :3], scene.positions[1, 25])


def test_a_log_without_a_future_is_refused_but_velocity_goes_on():
    scene = make(steps=11)
    with pytest.raises(ValueError, match="scene made records 0 future steps, 80"):
        log_replay(scene)
    assert constant_velocity(scene, 4)[0].shape == (3, 4, 80, 4)


@pytest.mark.parametrize("bad", [{"rollouts": 0}, {"steps": 0}, {"spread": -0.1}])
def test_senseless_counts_are_refused(bad):
    with pytest.raises(ValueError, match="constant_velocity: need"):
        constant_velocity(make(), **bad)
