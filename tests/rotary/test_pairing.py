"""Interleaved and half pairs: one permutation, lossless in both directions, and equal scores."""

import pytest
import torch

from rotary import Rotary, rotate
from rotary.frequencies import Geometric
from rotary.pairing import (
    halves_from_interleaved,
    interleaved_from_halves,
    rows_to_halves,
    rows_to_interleaved,
    to_halves,
    to_interleaved,
)

X = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)


def turn_halves(x, phase):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * phase.cos() - second * phase.sin(), first * phase.sin() + second * phase.cos()), dim=-1)


def test_order_of_eight_channels():
    assert halves_from_interleaved(8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert interleaved_from_halves(8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert halves_from_interleaved(8, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert halves_from_interleaved(3, 0).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (1, [-1.98411065, 1.95990067, 2.4623779, 4.01979967]),
        (3, [-1.41335252, 1.87911807, -2.82885748, 4.05819114]),
    ],
)
def test_worked_half_rotation(position, expected):
    """d = 4, base 1e4, in half pairs (arXiv 2104.09864 with the layout of GPT-NeoX)."""
    phase = Rotary(Geometric(1e4), head_dim=4)(torch.tensor([[position]]).double())[0]
    ours = to_halves(rotate(to_interleaved(X)[None], phase))
    torch.testing.assert_close(ours[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("rotated", [None, 0, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips_are_exact(rotated, dtype):
    x, rows, bias = torch.randn(3, 5, 16, dtype=dtype), torch.randn(48, 7, dtype=dtype), torch.randn(48, dtype=dtype)
    assert torch.equal(to_halves(to_interleaved(x, rotated), rotated), x)
    assert torch.equal(to_interleaved(to_halves(x, rotated), rotated), x)
    for tensor in (rows, bias):
        assert torch.equal(rows_to_halves(rows_to_interleaved(tensor, 16, rotated), 16, rotated), tensor)
        assert torch.equal(rows_to_interleaved(rows_to_halves(tensor, 16, rotated), 16, rotated), tensor)
    moved = to_halves(x, rotated)
    assert torch.equal(moved, x) == (rotated == 0)
    if rotated == 8:
        assert torch.equal(moved[..., 8:], x[..., 8:])


def test_permuted_projections_give_equal_scores():
    """Weights of half pairs, moved once, score in our pairing as they scored in theirs."""
    phase = Rotary(Geometric(1e4), head_dim=8)(torch.arange(6.0)[:, None].double())[0]
    tokens = torch.randn(6, 5, dtype=torch.float64)
    weights = torch.randn(2, 16, 5, dtype=torch.float64)  # of q and k, two heads of eight

    def project(weight):
        return (tokens @ weight.T).unflatten(-1, (2, 8)).transpose(0, 1)

    theirs = [turn_halves(project(w), phase) for w in weights]
    ours = [rotate(project(rows_to_interleaved(w, 8)), phase) for w in weights]
    torch.testing.assert_close(ours[0] @ ours[1].mT, theirs[0] @ theirs[1].mT, rtol=0, atol=1e-12)
    mixed = ours[0] @ theirs[1].mT
    assert not torch.allclose(mixed, ours[0] @ ours[1].mT, atol=0.1)


def test_what_is_refused():
    for rotated in (3, 10, -2):
        with pytest.raises(ValueError, match=f"rotated={rotated}"):
            halves_from_interleaved(8, rotated)
    with pytest.raises(ValueError, match="12 rows don't divide by head_dim=8"):
        rows_to_halves(torch.zeros(12, 3), 8)
