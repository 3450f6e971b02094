"""When passing a stop point counts, and what the official nearest lane makes of it."""

import pytest
import torch

from datamodules.scene import LightState
from tasks.metrics.traffic_light import lanes_of, nearest_lane, red_light_violations

LANES = [
    torch.tensor([[0.0, 0, 0], [10, 0, 0], [20, 0, 0], [40, 0, 0]]),
    torch.tensor([[0.0, 4, 0], [40, 4, 0]]),
    torch.tensor([[0.0, 8, 0]]),
]
IDS = torch.tensor([11, 22, 33])
STEPS = 6


def violations(state=LightState.STOP, y=0.0, light=11, speed=4.0, valid=None, parity=False, stop=(20.0, 0.0)):
    """Steps at which an object passes x = 20 between steps 2 and 3 of 6."""
    x = 11 + speed * torch.arange(STEPS, dtype=torch.float32)
    points = torch.stack((x, torch.full_like(x, y)), -1)[None, None]
    lanes = lanes_of(LANES, IDS)
    assert lanes is not None
    states = torch.as_tensor(state).expand(STEPS).reshape(STEPS, 1)
    mask = torch.ones(1, 1, STEPS, dtype=torch.bool) if valid is None else torch.tensor(valid)[None, None]
    stops = torch.tensor(stop).expand(STEPS, 1, 2)
    found = red_light_violations(points, mask, lanes, torch.tensor([light]), states, stops, parity)
    return found[0, 0].nonzero().flatten().tolist()


@pytest.mark.parametrize("state", list(LightState))
def test_only_red_forbids(state):
    assert violations(state) == ([3] if state in (LightState.STOP, LightState.ARROW_STOP) else [])


def test_the_light_counts_at_the_step_after_the_stop_point():
    go, red = LightState.GO, LightState.STOP
    assert violations([go, go, go, red, go, go]) == [3]
    assert violations([red, red, red, go, red, red]) == []


def test_only_the_lane_of_the_light():
    assert violations(y=3.9) == []
    assert violations(light=22) == []
    assert violations(light=22, y=3.9, stop=(20.0, 4.0)) == [3]
    assert violations(light=33) == []  # a lane of one point is no lane
    assert violations(light=44) == []  # not a surface street


def test_standing_turning_back_and_invalid_steps():
    assert violations(speed=0.0) == []
    assert violations(speed=1.0) == []
    assert violations(valid=[True, True, True, False, True, True]) == []
    assert violations(valid=[True, True, False, True, True, True]) == [3]


def test_the_official_nearest_lane_adds_where_it_should_subtract():
    lanes = lanes_of(LANES, IDS)
    assert lanes is not None
    points = torch.tensor([[30.0, 1.0], [30.0, 3.5]])
    assert nearest_lane(points, lanes).tolist() == [0, 1]
    # (x − start) + t (end − start): 30 along the long lane seems 60 away, along the lane of short pieces 20 + 10.
    assert nearest_lane(points, lanes, parity=True).tolist() == [0, 0]
    assert violations(parity=True) == [3]
    assert violations(y=3.9, parity=True) == [3]


def test_the_official_lanes_end_in_the_origin_of_the_file():
    ghost = torch.tensor([-100.0, -50.0])
    lanes = lanes_of(LANES, IDS, ghost)
    assert lanes is not None
    assert torch.equal(lanes.starts[-1] + lanes.vectors[-1], ghost)
    assert lanes.lane.tolist() == [0, 0, 0, 1, 1]  # the longest lane stays as it is


def test_without_lanes_there_is_nothing():
    assert lanes_of(LANES[2:], IDS[2:]) is None
    assert lanes_of([], IDS[:0]) is None
