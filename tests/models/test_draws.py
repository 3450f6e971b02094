"""Draws from logits by uniform numbers: frequencies, restriction and the ends of the unit interval."""

import math

import pytest
import torch

from models.motion_head import draw


def test_draws_have_the_frequencies_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -50.0], dtype=torch.float64)
    n = 20_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (0.7, 1.0):
        expected = n * (logits / temperature).softmax(-1)[:4]
        found = draw(logits.expand(n, 5), uniform, temperature=temperature).bincount(minlength=5)
        assert found[4] == 0
        chi_square = ((found[:4] - expected).square() / expected).sum()
        assert chi_square < 16.27  # 99.9 % of the distribution with three degrees of freedom


def test_draws_from_the_top_k_keep_their_proportions():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 1.5])
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    found = draw(logits.expand(20_000, 5), uniform, top_k=2).bincount(minlength=5)
    assert set(found.nonzero().flatten().tolist()) == {3, 4}
    assert found[3] / 20_000 == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.012)


@pytest.mark.parametrize("top_k", [None, 3])
def test_the_ends_of_the_unit_interval_draw_only_what_is_possible(top_k):
    logits = torch.full((2, 300), torch.finfo(torch.float32).min)
    logits[:, 3:5] = 0.0
    uniform = torch.tensor([0.0, 1.0])
    assert set(draw(logits, uniform, top_k).tolist()) == {3, 4}
