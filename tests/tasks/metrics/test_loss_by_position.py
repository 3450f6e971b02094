"""Loss by position: bins that double, equal to means by hand, whole over any cut of the stream."""

import pytest
import torch

from tasks.metrics.loss_by_position import LossByPosition


def measured(losses, targets, position):
    metric = LossByPosition()
    metric.update(losses, targets, position)
    return {name: value.item() for name, value in metric.compute().items()}


def test_a_loss_that_is_its_position_shows_where_bins_begin_and_end():
    position = torch.arange(16)[None]
    means = measured(position.float(), torch.zeros_like(position), position)
    assert means == {"0": 0, "1": 1, "2-3": 2.5, "4-7": 5.5, "8-15": 11.5}
    assert list(means) == ["0", "1", "2-3", "4-7", "8-15"]


def test_bins_nobody_reached_are_left_out():
    position = torch.tensor([[4, 5, 1_000_000, 9]])
    targets = torch.tensor([[1, 1, 1, -100]])
    means = measured(torch.tensor([[1.0, 3.0, 7.0, 100.0]]), targets, position)
    assert means == {"4-7": 2, "524288-1048575": 7}


def test_the_greatest_position_has_a_bin():
    means = measured(torch.ones(1, 1), torch.ones(1, 1).long(), torch.full((1, 1), torch.iinfo(torch.int64).max))
    assert means == {f"{2**62}-{2**63 - 1}": 1}


def test_any_cut_of_a_stream_gives_the_same_means():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(2, 300, generator=generator, dtype=torch.float64)
    targets = torch.randint(-1, 2, (2, 300), generator=generator)
    targets[targets < 0] = -100
    position = torch.stack((torch.arange(300), torch.arange(300) % 70))  # the second has documents
    metric = LossByPosition()
    for low, high in ((0, 1), (1, 64), (64, 299), (299, 300)):
        part = slice(low, high)
        metric.update(losses[:, part], targets[:, part], position[:, part])
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(
        measured(losses, targets, position), rel=1e-12
    )


def test_reset_forgets():
    metric, one = LossByPosition(), torch.ones(1, 1)
    metric.update(one, one.long(), one.long())
    metric.reset()
    metric.update(5 * one, one.long(), 2 * one.long())
    assert metric.compute() == {"2-3": 5}


def test_a_position_below_zero_is_refused():
    with pytest.raises(ValueError, match="position -3 is below 0"):
        LossByPosition().update(torch.ones(1, 2), torch.ones(1, 2).long(), torch.tensor([[1, -3]]))
