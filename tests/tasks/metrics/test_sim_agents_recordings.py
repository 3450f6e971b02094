"""Real scenes: numbers of the official code for constant velocity and for a replay of the record."""

import math

import pytest
import torch

from datamodules.embedded_scenes import load_embedded
from datamodules.embedded_source import SourceError
from datamodules.windows import MostTravelled, window, wrap_headings
from tasks.metrics.realism import COMPONENTS
from tasks.metrics.sim_agents import SimAgents

NAMES = (
    "metametric_2025",
    "metametric_2024",
    *(f"{name}_likelihood" for name in COMPONENTS),
    "average_displacement_error",
    "min_average_displacement_error",
    "simulated_collision_rate",
    "simulated_offroad_rate",
)


def constant_velocity(scene, index):
    """32 rollouts at 0.9 to 1.1 of the current velocity, height and heading held."""
    now = scene.current
    position, velocity = scene.positions[index, now].double(), scene.velocities[index, now].double()
    factor = 0.9 + 0.2 * torch.arange(32, dtype=torch.float64) / 31
    time = 0.1 * torch.arange(1, 81, dtype=torch.float64)
    states = torch.zeros(len(index), 32, 80, 4, dtype=torch.float64)
    states[..., :3] = position[:, None, None]
    states[..., :2] += velocity[:, None, None] * factor[:, None, None] * time[:, None]
    states[..., 3] = wrap_headings(scene).headings[index, now].double()[:, None, None]
    return states.float()


def replay(scene, index):
    """The record 32 times; where it ends the last valid state is held."""
    track = torch.cat((scene.positions, wrap_headings(scene).headings[..., None]), -1)[index]
    last = torch.where(scene.valid[index], torch.arange(scene.steps), 0).cummax(1).values
    held = track.gather(1, last[..., None].expand(-1, -1, 4))
    return held[:, None, 11:].expand(-1, 32, -1, -1).contiguous()


# (recording, first step, tracks to predict, how) → scored ids and what the official code says of them.
SCORED = {
    1: [655, 658, 663, 665, 669, 677, 683, 696, 913],
    2: [0, 4, 9, 39],
    0: [1515, 1516, 1519, 1520, 1522, 1525, 1538],
}
OFFICIAL = {
    (1, 0, 8, constant_velocity): (
        0.659334, 0.656885, 0.001692, 0.094688, 0.794860, 0.828170, 0.704096, 0.910619, 0.999649, 0.950975, 0.311150,
        0.999969, 4.465706, 3.535984, 0.076389, 0.125,
    ),
    (1, 0, 8, replay): (
        0.755120, 0.752700, 0.511490, 0.517626, 0.934857, 0.904734, 0.881285, 0.315800, 0.970378, 0.951555, 0.999969,
        0.999969, 0, 0, 0.111111, 0,
    ),
    (2, 20, 6, constant_velocity): (
        0.458542, 0.437845, 0.002168, 0.039547, 0.115613, 0.335711, 0.032358, 0.999969, 0.999649, 0.586029, 0.005590,
        0.999969, 9.018642, 6.932207, 0, 0.5,
    ),
    (2, 20, 6, replay): (
        0.516527, 0.501839, 0.317623, 0.361689, 0.593303, 0.708986, 0.050160, 0.000418, 0.770257, 0.706208, 0.999969,
        0.999969, 0, 0, 0.75, 0,
    ),
    (0, 0, 8, constant_velocity): (
        0.804298, 0.783231, 0.065043, 0.254515, 0.987115, 0.903178, 0.149264, 0.999969, 0.999649, 0.578626, 0.999969,
        0.999969, 4.373006, 3.148576, 0, 0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def recordings():
    try:
        return load_embedded()
    except SourceError as error:
        pytest.skip(f"embedded scenes: {error}")


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda case: f"{case[0]}-{case[3].__name__}")
def test_real_scenes_score_as_the_official_code_has_them(recordings, case):
    recording, start, count, states_of = case
    scene = window(recordings[recording], start, to_predict=MostTravelled(count))
    assert sorted(scene.agent_ids[scene.scored()].tolist()) == SCORED[recording]
    index = scene.simulated()
    metric = SimAgents()
    metric.update(scene, states_of(scene, index), index)
    found = metric.compute()
    for name, expected in zip(NAMES, OFFICIAL[case], strict=True):
        assert found[name].item() == pytest.approx(expected, abs=5e-5), name


def test_chunks_change_nothing(recordings, monkeypatch):
    scene = window(recordings[1], to_predict=MostTravelled(8))
    index = scene.simulated()
    states = constant_velocity(scene, index)[:, :4]
    whole, parts = SimAgents(), SimAgents()
    whole.update(scene, states, index)
    for module, constant in (
        ("box_distance._CHUNK", 5000),
        ("time_to_collision._CHUNK", 7000),
        ("road_edge._CHUNK", 3000),
        ("road_edge._PAIRS", 77),
        ("traffic_light._CHUNK", 9000),
    ):
        monkeypatch.setattr(f"tasks.metrics.{module}", constant)
    parts.update(scene, states, index)
    for name, value in whole.compute().items():
        assert value.item() == pytest.approx(parts.compute()[name].item(), abs=1e-12), name


def test_headings_of_whole_turns_change_nothing(recordings):
    scene = window(recordings[0], to_predict=MostTravelled(8))
    index = scene.simulated()
    states = constant_velocity(scene, index)[:, :4].double()
    assert (scene.headings.abs() > math.pi).any()
    plain, wrapped = SimAgents(), SimAgents()
    plain.update(scene, states, index)
    wrapped.update(wrap_headings(scene), states + torch.tensor([0, 0, 0, 2 * math.pi]), index)
    found, expected = plain.compute(), wrapped.compute()
    # In 2023 the even number of bins puts straight driving, a yaw rate of zero, on an edge: rounding decides its bin.
    for name in found.keys() - {"metametric_2023"}:
        assert found[name].item() == pytest.approx(expected[name].item(), abs=1e-6), name
