"""Distances of boxes against distances of sampled outlines, and the pruned search against all pairs."""

import math

import pytest
import torch

from tasks.metrics.box_distance import FAR, box_distance, nearest_object, rounded_box_distance


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def place(*shape, low, high):
    return low + (high - low) * torch.rand(*shape, dtype=torch.float64)


def turned(points, angle):
    cosine, sine = angle.cos(), angle.sin()
    x, y = points.unbind(-1)
    return torch.stack((cosine * x - sine * y, sine * x + cosine * y), -1)


def outline(center, size, heading, samples=400):
    """(n, 4 * samples, 2) points on the sides of boxes, corners among them."""
    part = torch.linspace(-1, 1, samples, dtype=torch.float64)
    one = torch.ones_like(part)
    sides = [torch.stack(side, -1) for side in ((part, one), (part, -one), (one, part), (-one, part))]
    points = torch.cat(sides) * (size / 2)[:, None]
    return turned(points, heading[:, None]) + center[:, None]


def outside(points, center, size, heading):
    """(n, m) distance from points to boxes, zero inside."""
    local = turned(points - center[:, None], -heading[:, None])
    return torch.linalg.vector_norm((local.abs() - (size / 2)[:, None]).clamp_min(0), dim=-1)


def random_pairs(count, spread):
    centers = place(2, count, 2, low=-spread, high=spread)
    headings = place(2, count, low=-4, high=4)
    sizes = torch.stack((place(2, count, low=0.5, high=6), place(2, count, low=0.4, high=2.5)), -1)
    return centers, headings, sizes


def distance(centers, headings, sizes):
    return box_distance(centers[1] - centers[0], headings[0], headings[1], sizes[0], sizes[1])


def test_apart_it_is_the_least_distance_of_the_outlines():
    centers, headings, sizes = random_pairs(300, 8)
    found = distance(centers, headings, sizes)
    apart = found > 0
    assert 50 < apart.sum() < 290
    sampled = outside(outline(centers[0], sizes[0], headings[0]), centers[1], sizes[1], headings[1]).amin(1)
    # Samples lie up to 6 / 399 m apart, so the sampled distance exceeds the true one by half of that at most.
    assert torch.all((sampled - found)[apart] > -1e-9)
    assert torch.all((sampled - found)[apart] < 6 / 399 / 2)
    contains = outside(centers[0][:, None], centers[1], sizes[1], headings[1])[:, 0] == 0
    assert torch.all(found[contains] <= 0)


def test_overlapping_it_is_the_shortest_way_out():
    centers, headings, sizes = random_pairs(200, 1.5)
    found = distance(centers, headings, sizes)
    inside = found < 0
    assert inside.sum() > 100
    angle = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)
    directions = torch.stack((angle.cos(), angle.sin()), -1)
    way = -found[:, None, None] * directions  # every translation of the found length
    moved = box_distance(
        (centers[1] - centers[0])[:, None] + 0.999 * way,
        headings[0][:, None], headings[1][:, None], sizes[0][:, None], sizes[1][:, None],
    )  # fmt: skip
    assert torch.all(moved[inside] < 0)  # a shorter one never parts them
    further = box_distance(
        (centers[1] - centers[0])[:, None] + 1.01 * way,
        headings[0][:, None], headings[1][:, None], sizes[0][:, None], sizes[1][:, None],
    )  # fmt: skip
    assert torch.all(further[inside].amax(1) > 0)  # one little longer does, in some direction


def test_rounded_boxes_have_the_official_distances():
    size = double([4.0, 2.0])
    aligned = rounded_box_distance(double([6.0, 0.0]), double(0.0), double(0.0), size, size)
    assert aligned.item() == pytest.approx(2.0, abs=1e-9)
    turned_box = rounded_box_distance(double([4.5, 2.5]), double(0.0), double(0.6), size, size)
    assert turned_box.item() == pytest.approx(1.1832874, abs=1e-7)


def test_it_is_symmetric_and_moves_with_the_plane():
    centers, headings, sizes = random_pairs(200, 5)
    found = distance(centers, headings, sizes)
    assert torch.allclose(found, distance(centers.flip(0), headings.flip(0), sizes.flip(0)), atol=1e-9)
    angle = torch.tensor(0.7, dtype=torch.float64)
    assert torch.allclose(found, distance(turned(centers, angle) + 30, headings + angle, sizes), atol=1e-9)
    assert torch.allclose(found, distance(centers, headings + 2 * math.pi * double([1], [-2]), sizes))


@pytest.mark.parametrize("spread", [6, 60])
def test_the_search_finds_the_least_of_all_pairs(spread):
    agents, count = 14, 90
    centers, headings = place(agents, count, 2, low=-spread, high=spread), place(agents, count, low=-4, high=4)
    sizes = torch.stack((place(agents, low=0.6, high=12), place(agents, low=0.5, high=2.6)), -1)
    valid = torch.rand(agents, count) < 0.8
    scored = torch.tensor([3, 0, 9])
    found = nearest_object(centers, headings, sizes, valid, scored)
    for row, ego in enumerate(scored.tolist()):
        others = [other for other in range(agents) if other != ego]
        every = torch.stack(
            [
                torch.where(
                    valid[ego] & valid[other],
                    rounded_box_distance(
                        centers[other] - centers[ego], headings[ego], headings[other], sizes[ego], sizes[other]
                    ),
                    FAR,
                )
                for other in others
            ]
        )
        assert torch.allclose(found[row], every.amin(0), atol=1e-9, rtol=0)


def test_alone_or_invalid_it_is_far():
    centers, headings, sizes = torch.zeros(2, 3, 2), torch.zeros(2, 3), torch.tensor([[4.0, 2.0]] * 2)
    valid = torch.tensor([[True, True, False], [True, False, True]])
    found = nearest_object(centers, headings, sizes, valid, torch.tensor([0]))
    assert found[0, 0] < 0
    assert found[0, 1:].tolist() == [FAR, FAR]
