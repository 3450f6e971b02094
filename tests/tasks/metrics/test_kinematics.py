"""Differences of tracks: values worked out by hand or with the official code, and laws of circles and straight lines."""

import math

import pytest
import torch

from tasks.metrics.kinematics import angular_motion, central_and, linear_motion, wrap


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_headings_across_the_wrap():
    rate, change = angular_motion(double(3.0, 3.1, -3.1, -3.0, -2.9))
    assert torch.allclose(rate[1:-1], double(0.91592654, 0.91592654, 1.0), atol=1e-8, rtol=0)
    assert change[2].item() == pytest.approx(0.42036732, abs=1e-8)
    assert rate.isnan().tolist() == [True, False, False, False, True]
    assert change.isnan().tolist() == [True, True, False, True, True]


def test_positions_along_a_line():
    x = double(0, 1, 2.1, 3.3, 4.6)
    speed, acceleration = linear_motion(torch.stack((x, 0 * x, 0 * x), -1))
    assert torch.allclose(speed[1:-1], double(10.5, 11.5, 12.5), atol=1e-9, rtol=0)
    assert acceleration[2].item() == pytest.approx(10.0, abs=1e-9)
    assert speed.isnan().tolist() == [True, False, False, False, True]
    assert acceleration.isnan().tolist() == [True, True, False, True, True]


def test_climbing_counts_as_moving():
    positions = torch.arange(5, dtype=torch.float64)[:, None] * double(0.3, 0.0, 0.4)
    assert torch.allclose(linear_motion(positions)[0][1:-1], double(5.0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("turns", [-3, 1, 2])
def test_whole_turns_change_no_rate(turns):
    headings = torch.linspace(-4, 9, 40, dtype=torch.float64)
    shifted = headings + 2 * math.pi * turns * (torch.arange(40) % 2)
    for plain, other in zip(angular_motion(headings), angular_motion(shifted), strict=True):
        assert torch.allclose(plain, other, atol=1e-9, equal_nan=True)


def test_a_circle_has_its_rate():
    time = torch.arange(60, dtype=torch.float64) * 0.1
    heading = 0.7 * time
    positions = 10 * torch.stack((heading.sin(), -heading.cos()), -1)
    speed, acceleration = linear_motion(positions)
    rate, change = angular_motion(wrap(heading))
    assert torch.allclose(speed[1:-1], double(10 * math.sin(0.07) / 0.1), atol=1e-9)  # the chord of two steps
    assert torch.allclose(rate[1:-1], double(0.7), atol=1e-9)
    assert acceleration[2:-2].abs().max() < 1e-9
    assert change[2:-2].abs().max() < 1e-9


def test_validity_needs_both_neighbours():
    valid = torch.tensor([True, True, False, True, True, True])
    assert central_and(valid).tolist() == [False, False, True, False, True, False]
