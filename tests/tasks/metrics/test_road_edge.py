"""Signed distances to road edges: the official numbers, rings and bridges, and the pruned search against all segments."""

import math

import pytest
import torch

from tasks.metrics.road_edge import Z_STRETCH, distance_to_road_edge, road_edges


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def at(points, polylines, size=(1e-6, 1e-6, 0.0), **options):
    """Distances of tiny boxes, so of points."""
    points = torch.as_tensor(points, dtype=torch.float64)
    edges = road_edges(polylines, **options)
    assert edges is not None
    sizes = double(size).expand(len(points), 3)
    return distance_to_road_edge(points, points.new_zeros(len(points)), sizes, edges)


def ring(radius, points, clockwise=False):
    angle = torch.linspace(0, 2 * math.pi, points, dtype=torch.float64)
    line = torch.stack((radius * angle.cos(), radius * angle.sin(), 0 * angle), -1)
    return line.flip(0) if clockwise else line


def test_a_road_between_two_edges():
    edges = [double([-50, -4, 0], [50, -4, 0]), double([50, 6, 0], [-50, 6, 0])]
    found = at([[0, 0, 0], [0, -2.5, 0], [0, -5, 0]], edges, (4.0, 2.0, 1.5))
    assert torch.allclose(found, double(-3.0, -0.5, 2.0), atol=1e-9)


def test_inside_a_ring_is_the_side_on_its_left():
    inside, outside = [[0.3, 0.1, 0.0]], [[14.0, 3.0, 0.0]]
    for clockwise, sign in ((False, -1), (True, 1)):
        line = [ring(10, 41, clockwise)]
        assert at(inside, line).sign().item() == sign
        assert at(outside, line).sign().item() == -sign


def test_the_height_chooses_the_level():
    below, above = double([-50, 0, 0], [50, 0, 0]), double([-50, 3, 8], [50, 3, 8])
    found = at([[0, 2.9, 0.1], [0, 2.9, 7.9]], [below, above])
    assert torch.allclose(found, double(-2.9, 0.1), atol=1e-5)


def test_past_a_corner_both_segments_are_asked():
    left_turn = double([0, 0, 0], [10, 0, 0], [10, 10, 0])
    right_turn = double([0, 0, 0], [10, 0, 0], [10, -10, 0])
    beyond = [[12.0, -2.0, 0.0], [12.0, 2.0, 0.0]]
    assert at(beyond[:1], [left_turn]).item() == pytest.approx(math.hypot(2, 2), abs=1e-5)
    assert at(beyond[1:], [right_turn]).item() == pytest.approx(-math.hypot(2, 2), abs=1e-5)


def test_where_a_ring_closes():
    # Clockwise, so the outside is on the road. Beyond its sharp corner the point lies right of the first segment's line.
    triangle = double([0, 0, 0], [10, 2, 0], [10, -2, 0], [0, 0, 0])
    longer = double(*[[float(x), 90.0, 0.0] for x in range(9)])
    beyond = [[-1.0, -0.5, 0.0]]
    for polylines, only_longest, sign in (
        ([triangle, longer], False, -1),
        ([triangle], True, -1),
        ([triangle, longer], True, 1),  # as the official code has it
        ([triangle[:3]], False, 1),
    ):
        found = at(beyond, polylines, (0.0, 0.0, 0.0), close_longest_only=only_longest).item()
        assert found == pytest.approx(sign * math.hypot(1, 0.5), abs=1e-9)


def test_repeated_points_change_nothing():
    line = double([-50, 0, 0], [0, 0, 0], [50, 0, 0])
    repeated = line[[0, 1, 1, 2, 2]]
    points = torch.randn(50, 3, dtype=torch.float64) * 20
    points[:, 2] = 0
    assert torch.allclose(at(points, [line]), at(points, [repeated]), atol=1e-9)


def test_without_edges_there_is_nothing():
    assert road_edges([]) is None
    assert road_edges([double([0, 0, 0])]) is None
    assert road_edges([double([0, 0, 0])[:0]]) is None


def every_segment(points, polylines):
    """Stretched and plane distance of points to all segments, one by one."""
    starts, ends = torch.cat([line[:-1] for line in polylines]), torch.cat([line[1:] for line in polylines])
    vector = ends - starts
    part = ((points[:, None] - starts)[..., :2] * vector[:, :2]).sum(-1) / vector[:, :2].square().sum(-1)
    offset = points[:, None] - starts - part.clamp(0, 1)[..., None] * vector
    return (offset * double(1, 1, Z_STRETCH)).norm(dim=-1), offset[..., :2].norm(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_search_finds_the_nearest_of_all_segments(dtype):
    lines = []
    for length in (2, 3, 17, 18, 33, 100, 250):
        step = torch.randn(length, 3, dtype=torch.float64) * double(1, 1, 0.2)
        lines.append((step.cumsum(0) + torch.randn(3, dtype=torch.float64) * double(30, 30, 3)).to(dtype))
    points = torch.randn(3000, 3, dtype=torch.float64) * double(60, 60, 4)
    edges = road_edges(lines)
    assert edges is not None
    sizes = double(1e-7, 1e-7, 0).expand(3000, 3).to(dtype)
    found = distance_to_road_edge(points.to(dtype), torch.zeros(3000, dtype=dtype), sizes, edges)
    stretched, plane = every_segment(points.to(dtype).double(), [line.double() for line in lines])
    nearest = plane.gather(1, stretched.argmin(1, keepdim=True))[:, 0]
    tolerance = 1e-6 if dtype == torch.float64 else 1e-3  # float32 of coordinates up to 200 m, and ties of two segments
    wrong = (found.double().abs() - nearest).abs() > tolerance
    assert wrong.sum() <= (0 if dtype == torch.float64 else 2)
