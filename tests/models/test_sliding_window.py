"""Sliding windows and means over scales, by laws that any way of cutting must keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.sliding_window import multi_scale, sliding_window

CUTS = [((8, 8), (8, 8)), ((8, 10), (5, 7)), ((16, 5), (1, 5)), ((64, 64), (40, 40)), ((30, 8), (30, 3))]


@pytest.mark.parametrize(("crop", "stride"), CUTS)
@pytest.mark.parametrize("size", [(21, 34), (8, 8), (5, 40), (3, 2)])
@pytest.mark.parametrize("batch", [1, 5])
def test_pixelwise_models_answer_as_on_the_whole(crop, stride, size, batch):
    model, images = nn.Conv2d(3, 4, 1).double(), torch.randn(2, 3, *size, dtype=torch.float64)
    seen = []

    def watched(windows):
        seen.append(windows.shape)
        return model(windows)

    with torch.no_grad():
        torch.testing.assert_close(
            sliding_window(watched, images, crop, stride, batch), model(images), atol=1e-12, rtol=0
        )
    assert all(shape[2:] == crop and shape[0] <= max(2, batch) for shape in seen)


@pytest.mark.parametrize(("crop", "stride"), CUTS)
def test_overlaps_are_means_and_windows_lie_flush(crop, stride):
    height, width = 21, 34
    rows, columns = ([*range(0, max(1, side - c), s)] for side, c, s in zip((height, width), crop, stride, strict=True))
    # mmseg's slide inference: windows start every stride; those that would pass the border are moved back to it
    rows = sorted({min(y, max(0, height - crop[0])) for y in [*rows, height]})
    columns = sorted({min(x, max(0, width - crop[1])) for x in [*columns, width]})
    numbered = iter(range(10_000))

    def constant(windows):  # the k-th window says k everywhere
        return torch.stack([torch.full((1, *crop), float(next(numbered))) for _ in windows])

    total, count = torch.zeros(height, width), torch.zeros(height, width)
    for k, (y, x) in enumerate((y, x) for y in rows for x in columns):
        total[y : y + crop[0], x : x + crop[1]] += k
        count[y : y + crop[0], x : x + crop[1]] += 1
    assert count.min() >= 1
    scores = sliding_window(constant, torch.zeros(1, 3, height, width), crop, stride)
    torch.testing.assert_close(scores[0, 0], total / count)
    assert next(numbered) == len(rows) * len(columns)


def test_half_precision_is_averaged_in_full():
    scores = sliding_window(lambda x: x.bfloat16(), torch.randn(1, 3, 20, 20), (8, 8), (3, 3))
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("stride", [(0, 4), (4, 9)])
def test_strides_that_leave_gaps_are_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        sliding_window(nn.Identity(), torch.zeros(1, 3, 9, 9), (8, 8), stride)


def softmax(x):
    return x.softmax(1)


def test_one_scale_is_the_model():
    model, images = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 9, 14)
    with torch.no_grad():
        assert torch.equal(multi_scale(model, images, (1.0,), False, softmax), softmax(model(images)))


def test_mirror_images_are_averaged():
    model, images = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 9, 14)
    with torch.no_grad():
        actual = multi_scale(model, images, (1,), True, softmax)
        expected = (softmax(model(images)) + softmax(model(images.flip(3))).flip(3)) / 2
        torch.testing.assert_close(actual, expected)
        flipped = multi_scale(model, images.flip(3), (1,), True, softmax)
        torch.testing.assert_close(flipped, actual.flip(3))


def test_scales_are_those_asked_for_and_their_mean_is_told():
    images, seen = torch.rand(2, 3, 20, 30), []

    def model(x):
        seen.append(tuple(x.shape[2:]))
        return x.new_full((2, 4, *x.shape[2:]), float(x.shape[2]))

    scores = multi_scale(model, images, (0.5, 1.0, 1.75), True, lambda x: x)
    assert seen == [(10, 15)] * 2 + [(20, 30)] * 2 + [(35, 52)] * 2
    torch.testing.assert_close(scores, torch.full((2, 4, 20, 30), (10 + 20 + 35) / 3))


def test_scores_sum_to_one_over_scales_and_windows():
    model, images = nn.Conv2d(3, 4, 3, padding=1), torch.randn(1, 3, 21, 34)
    with torch.no_grad():
        scores = multi_scale(
            lambda x: sliding_window(model, x, (16, 16), (10, 10)), images, (0.5, 1, 1.5), True, softmax
        )
    torch.testing.assert_close(scores.sum(1), torch.ones(1, 21, 34))


@pytest.mark.parametrize("ratios", [(), (1.0, 0.0)])
def test_ratios_that_are_none_are_refused(ratios):
    with pytest.raises(ValueError, match="ratios"):
        multi_scale(nn.Identity(), torch.zeros(1, 3, 9, 9), ratios, False, softmax)
