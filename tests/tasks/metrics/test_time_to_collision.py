"""Who is followed, and how long until it is reached."""

import math

import pytest
import torch

from tasks.metrics.kinematics import linear_motion
from tasks.metrics.time_to_collision import LONGEST, time_to_collision

SIZES = torch.tensor([[4.0, 2.0], [4.0, 2.0]], dtype=torch.float64)


def times(x, y, heading, speed, valid=True, scored=(0,), **options):
    """One step of agents given by lists."""
    centers = torch.tensor([x, y], dtype=torch.float64).T[:, None]
    headings, speeds = (torch.tensor(value, dtype=torch.float64)[:, None] for value in (heading, speed))
    sizes = SIZES[:1].expand(len(x), 2)
    mask = torch.ones(len(x), 1, dtype=torch.bool) & torch.as_tensor(valid).view(-1, 1)
    return time_to_collision(centers, headings, speeds, sizes, mask, torch.tensor(scored), **options)[:, 0].tolist()


def test_closing_in_on_the_leader():
    time = torch.arange(5, dtype=torch.float64) * 0.1
    x = torch.stack((10 * time, 14 + 5 * time))
    centers = torch.stack((x, 0 * x), -1)
    speed = linear_motion(centers)[0]
    found = time_to_collision(
        centers, 0 * x, speed, SIZES, torch.ones_like(x, dtype=torch.bool), torch.tensor([0, 1]), wrap_difference=False
    )
    assert torch.allclose(found[0], torch.tensor([5.0, 1.9, 1.8, 1.7, 5.0], dtype=torch.float64), atol=1e-9)
    assert found[1].tolist() == [LONGEST] * 5  # the leader follows nobody


@pytest.mark.parametrize(
    ("y", "heading", "follows"),
    [
        (0.0, 0.0, True),
        (1.4, 0.0, True),
        (2.1, 0.0, False),  # beside the track
        (0.0, math.radians(74), True),
        (0.0, math.radians(76), False),
        (1.7, math.radians(9), True),  # overlaps by 0.6 m
        (3.0, math.radians(30), False),  # overlaps by less than half a metre, and turned
        (0.0, -math.radians(74), True),
    ],
)
def test_whom_it_follows(y, heading, follows):
    (found,) = times([0, 12], [0, y], [0, heading], [10, 0])
    assert (found < LONGEST) is follows


def test_the_nearest_leader_counts_and_only_valid_ones():
    assert times([0, 24, 14], [0, 0, 0], [0, 0, 0], [10, 0, 5])[0] == pytest.approx(2.0)
    assert times([0, 24, 14], [0, 0, 0], [0, 0, 0], [10, 0, 5], [True, True, False])[0] == pytest.approx(2.0)
    assert times([0, 28, 14], [0, 0, 0], [0, 0, 0], [10, 0, 5], [True, True, False])[0] == pytest.approx(2.4)
    assert times([0, 14], [0, 0], [0, 0], [10, math.nan]) == [LONGEST]
    assert times([0, 5.99], [0, 0], [0, 0], [0.001, 0]) == [LONGEST]


def test_headings_on_both_sides_of_the_wrap():
    arguments = [0, -12], [0, 0], [math.pi - 0.01, 0.01 - math.pi], [10, 0]
    assert times(*arguments, wrap_difference=True)[0] == pytest.approx(0.8, abs=1e-2)
    assert times(*arguments, wrap_difference=False) == [LONGEST]  # as the official code has it
