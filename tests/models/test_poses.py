"""Rigid motions of the plane, wrapped angles and corners of boxes."""

import math

import pytest
import torch

from models.poses import box_corners, compose, corner_distance, corner_distances, inverse, relative, wrap


def test_relative_undoes_compose_and_inverse_is_what_the_origin_looks_like():
    torch.manual_seed(0)
    pose, local = torch.randn(2, 50, 3, dtype=torch.float64) * 3
    back = relative(pose, compose(pose, local))
    torch.testing.assert_close(back[:, :2], local[:, :2], atol=1e-12, rtol=0)
    assert wrap(back[:, 2] - local[:, 2]).abs().max() < 1e-12
    identity = compose(pose, inverse(pose))
    assert torch.minimum(identity.abs(), (identity.abs() - 2 * math.pi).abs()).max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrapped_angles_lie_in_the_half_open_interval(dtype):
    edge = torch.tensor([math.pi, -math.pi, 3 * math.pi, 1e4, -1e4, -math.pi - 1e-7, 0.0], dtype=dtype)
    around = torch.cat((edge, torch.nextafter(edge, edge + 1), torch.nextafter(edge, edge - 1)))
    wrapped = wrap(around)
    assert (wrapped >= -math.pi).all()
    assert (wrapped < math.pi).all()
    torch.testing.assert_close(wrapped.cos(), around.cos(), atol=1e-3 if dtype == torch.float32 else 1e-11, rtol=0)


def test_corners_start_at_the_left_front_and_go_clockwise():
    corners = box_corners(torch.tensor([1.0, 2.0, math.pi / 2]), torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(corners, torch.tensor([[0.0, 4.0], [2.0, 4.0], [2.0, 0.0], [0.0, 0.0]]))


def test_corner_distance_is_that_of_the_corners():
    torch.manual_seed(0)
    first, second = torch.randn(2, 20, 3, dtype=torch.float64)
    box = torch.rand(20, 2, dtype=torch.float64) + 1
    placed = (first[:, 0], first[:, 1], first[:, 2].cos(), first[:, 2].sin())
    expected = (box_corners(first, box) - box_corners(second, box)).norm(dim=-1).sum(-1)
    torch.testing.assert_close(corner_distance(placed, box, box_corners(second, box)), expected)


def test_distances_of_known_corners_are_those_of_placed_boxes():
    torch.manual_seed(0)
    box = torch.tensor([4.8, 2.0], dtype=torch.float64)
    one, other = 3 * torch.randn(7, 3, dtype=torch.float64), 3 * torch.randn(9, 3, dtype=torch.float64)
    corners = box_corners(one, box)
    placed = (other[:, 0], other[:, 1], other[:, 2].cos(), other[:, 2].sin())
    torch.testing.assert_close(
        corner_distances(corners, box_corners(other, box)), corner_distance(placed, box, corners[:, None])
    )
