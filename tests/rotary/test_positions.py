"""Where tokens are: orders, origins, packing, and what augmentation may do."""

import math

import pytest
import torch

from rotary import Rotary, rotate
from rotary.frequencies import Axial, Directional
from rotary.positions import augment, documents, grid, hierarchy, normalised_grid, packed, poses, sequence


def test_sequence_goes_on_after_a_cache():
    assert sequence(3).tolist() == [[0], [1], [2]]
    assert torch.equal(sequence(8)[5:], sequence(3, offset=5))
    assert sequence(3).dtype == torch.int64


@pytest.mark.parametrize(
    ("restart", "shared_first", "expected"),
    [
        (True, False, [0, 1, 2, 0, 1]),
        (False, False, [0, 1, 2, 3, 4]),
        (True, True, [0, 1, 2, 3, 1, 2]),
        (False, True, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_packed(restart, shared_first, expected):
    positions = packed([3, 2], restart=restart, shared_first=shared_first)
    assert positions.squeeze(1).tolist() == expected
    assert positions.dtype == torch.int64
    owner = documents([3, 2], shared_first=shared_first)
    assert owner.tolist() == ([0] if shared_first else []) + [1, 1, 1, 2, 2]


def test_packed_refuses_empty_documents():
    with pytest.raises(ValueError, match="every document needs a token"):
        packed([3, 0], restart=True)


def test_hierarchy_of_functions():
    """Functions of 5, 4 and 3 tokens: distances (token, function) from the last token (arXiv 2403.19115)."""
    unit = torch.arange(3).repeat_interleave(torch.tensor([5, 4, 3]))
    positions = hierarchy(unit, torch.arange(12))
    far = (positions[-1] - positions).tolist()
    assert far == [[11, 2], [10, 2], [9, 2], [8, 2], [7, 2], [6, 1], [5, 1], [4, 1], [3, 1], [2, 0], [1, 0], [0, 0]]
    with pytest.raises(ValueError, match="differ in shape"):
        hierarchy(torch.arange(3), torch.arange(4))


def test_grid_is_row_major_and_counts_patches():
    assert grid(2, 3).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert grid(2, 3).dtype == torch.float32


def test_smaller_grids_are_corners_of_larger_ones():
    """Bit for bit, so an unchanged F meets an unchanged phase at a new resolution."""
    layer = Rotary(Axial(100), head_dim=64)
    large = layer(grid(32, 24)).unflatten(-2, (32, 24))
    for height, width in ((14, 14), (3, 5), (32, 1)):
        corner = large[..., :height, :width, :].flatten(-3, -2)
        assert torch.equal(layer(grid(height, width)), corner)


def test_windows_agree_with_the_whole_image():
    """Scores inside a window don't depend on whether positions are the window's own or the image's."""
    layer = Rotary(Axial(50), head_dim=32)
    inside = grid(7, 7).double()
    q, k = torch.randn(2, 49, 32, dtype=torch.float64).unbind(0)
    own, whole = (
        rotate(q, phase) @ rotate(k, phase).mT
        for phase in (layer(inside)[0], layer(inside + torch.tensor([14.0, 21.0]))[0])
    )
    torch.testing.assert_close(whole, own, rtol=0, atol=1e-10)


def test_normalised_grid():
    torch.testing.assert_close(
        normalised_grid(2, 2), torch.tensor([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]), rtol=0, atol=0
    )
    wide = normalised_grid(1, 4)
    assert wide[:, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert wide[:, 1].tolist() == [0, 0, 0, 0]
    kept = normalised_grid(1, 4, keep_aspect=True)
    assert kept[:, 1].tolist() == [-0.75] * 4
    assert kept[:, 0].tolist() == wide[:, 0].tolist()


def test_augmentation_is_one_map_of_all_positions_within_its_bounds():
    positions = torch.randn(2, 20, 2)
    for seed in range(40):
        moved = augment(positions, shift=0.3, jitter=2.0, rescale=1.5, generator=torch.Generator().manual_seed(seed))
        slope = (moved[0, 1:] - moved[0, :1]) / (positions[0, 1:] - positions[0, :1])  # same for all tokens
        torch.testing.assert_close(slope, slope[:1].expand(19, -1), rtol=1e-2, atol=1e-2)  # differences cancel digits
        assert (slope > 1 / 3 * 0.98).all()
        assert (slope < 3 * 1.02).all()
        assert ((moved / slope[:1] - positions).abs() < 0.3 + 0.1).all()
    assert torch.equal(augment(positions), positions)
    seeded = [augment(positions, shift=1, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*seeded)
    only_rescaled = augment(positions, rescale=4.0) / positions
    torch.testing.assert_close(only_rescaled, only_rescaled[:1, :1, :1].expand_as(positions))


def test_augmentation_refuses_bounds_that_bound_nothing():
    for wrong in ({"shift": -1}, {"jitter": 0.5}, {"rescale": 0.9}):
        with pytest.raises(ValueError, match="augment: need"):
            augment(torch.zeros(3, 2), **wrong)


def test_poses_forget_a_far_origin_before_float32():
    """10 km away, a metre's scene keeps its scores to float32's own error; without centring it loses three digits."""
    xy = torch.randn(20, 2, dtype=torch.float64) * 30
    heading = torch.randn(20, dtype=torch.float64)
    layer = Rotary(Directional(base=1e4, heading_share=0.0), head_dim=16)
    q, k = torch.randn(2, 20, 16).unbind(0)

    def scores(positions):
        phase = layer(positions)[0]
        return rotate(q, phase) @ rotate(k, phase).mT

    here, far = poses(xy, heading), poses(xy + 1e4, heading)
    assert here.dtype == torch.float32
    assert (scores(far) - scores(here)).abs().max() < 1e-4
    uncentred = torch.cat((xy + 1e4, heading[:, None]), dim=-1).float()
    assert (scores(uncentred) - scores(here)).abs().max() > 1e-3


def test_poses_columns_and_origin():
    xy = torch.tensor([[[3.0, 4], [5, 8]]])
    heading, time = torch.tensor([[0.5, -math.pi]]), torch.tensor([[0, 7]])
    assert poses(xy, heading).tolist() == [[[-1, -2, 0.5], [1, 2, pytest.approx(-math.pi)]]]
    placed = poses(xy, heading, time, origin=torch.tensor([[1.0, 1.0]]))
    assert placed.tolist() == [[[2, 3, 0.5, 0], [4, 7, pytest.approx(-math.pi), 7]]]
