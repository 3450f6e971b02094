"""Estimates against numbers of the official code."""

import math

import pytest
import torch

from tasks.metrics.likelihood import Bernoulli, Histogram, mean_where


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_histogram_and_its_edges(dtype):
    simulated = torch.tensor([[0, 1, 2.4, 2.5, 2.6, 7, 26, 12]], dtype=dtype)
    logged = torch.tensor([[2.0, 2.5, 30, 10]], dtype=dtype)
    found = Histogram(0, 25, 10).log_likelihood(logged, simulated)[0]
    expected = torch.tensor([-1.06582247, -1.45528723, -2.10191440, -2.10191440], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=1e-8, rtol=0)


def test_a_histogram_sums_to_one_and_is_of_each_object():
    simulated = torch.randn(3, 200) * 4
    middles = torch.linspace(-10, 10, 9)[:-1] + 1.25
    found = Histogram(-10, 10, 8).log_likelihood(middles.expand(3, 8), simulated)
    assert torch.allclose(found.exp().sum(1), torch.ones(3, dtype=torch.float64))
    alone = Histogram(-10, 10, 8).log_likelihood(middles[None], simulated[1:2])
    assert torch.equal(found[1:2], alone)


def test_undefined_values_count_as_the_greatest_or_not_at_all():
    simulated, logged = torch.tensor([[0.5, math.nan, 0.5]]), torch.tensor([[0.5, 9.5]])
    histogram = Histogram(0, 10, 10)
    counted = histogram.log_likelihood(logged, simulated)[0].exp()
    assert torch.allclose(counted, torch.tensor([2.1 / 4, 1.1 / 4], dtype=torch.float64))
    dropped = histogram.log_likelihood(logged, simulated, count_undefined=False)[0].exp()
    assert torch.allclose(dropped, torch.tensor([2.1 / 3, 0.1 / 3], dtype=torch.float64))


@pytest.mark.parametrize(
    ("true", "logged", "expected"), [(0, False, -3.1248535e-5), (0, True, -10.3735537), (8, True, -1.3862318670)]
)
def test_what_happens_or_not(true, logged, expected):
    simulated = (torch.arange(32) < true)[None]
    found = Bernoulli().log_likelihood(torch.tensor([logged]), simulated)
    # The first two were printed by float32 code: its log of nearly one is good to 6e-8.
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_one_step_never_seen_leaves_nothing():
    assert mean_where(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).isnan()
    assert mean_where(torch.tensor([[1.0, math.nan]]), torch.tensor([[True, False]])) == 1
