"""Which keys a token sees, as tables written out by hand, and both spellings of the attention over them."""

import pytest
import torch

from models.chunk_attention import fused, shared_logits
from models.stream import advance, begin


def table(mask):
    return ["".join("1" if seen else "." for seen in row) for row in mask.tolist()]


def second_chunk(carry=True, blocks=False, window=2, starts=()):
    """The masks of the second chunk of four tokens."""
    begins = torch.zeros(1, 8, dtype=torch.bool)
    begins[0, list(starts)] = True
    stream = begin(1, 4, carry)
    _, stream = advance(stream, begins[:, :4], 4, window=window, blocks=blocks)
    span, _ = advance(stream, begins[:, 4:], 4, window=window, blocks=blocks)
    return span


def test_full_and_sliding_masks():
    span = second_chunk()
    assert table(span.seen[0, 0]) == ["11111...", "111111..", "1111111.", "11111111"]
    assert table(span.near[0, 0]) == ["11...", ".11..", "..11.", "...11"]  # of the last five keys


def test_blocks_do_not_cross_the_border_of_a_chunk():
    assert table(second_chunk(blocks=True).near[0, 0]) == [".1...", ".11..", "...1.", "...11"]
    three = second_chunk(blocks=True, window=3).near[
        0, 0
    ]  # block borders lie at multiples of 3 from the chunk's own start
    assert table(three) == ["..1...", "..11..", "..111.", ".....1"]


def test_without_carry_a_chunk_stands_alone():
    span = second_chunk(carry=False)
    assert table(span.seen[0, 0]) == ["1...", "11..", "111.", "1111"]
    assert span.position.flatten().tolist() == [0, 1, 2, 3]


def test_the_first_chunk_has_nothing_carried():
    span, _ = advance(begin(1, 4, True), torch.zeros(1, 4, dtype=torch.bool), 4, window=None, blocks=False)
    assert table(span.seen[0, 0]) == ["....1...", "....11..", "....111.", "....1111"]
    assert span.near is None


def test_documents_divide_all_masks():
    span = second_chunk(starts=(2, 5))
    assert table(span.seen[0, 0]) == ["..111...", ".....1..", ".....11.", ".....111"]
    assert table(span.near[0, 0]) == ["11...", "..1..", "..11.", "...11"]
    assert span.pooled[0, 0].tolist() == [False, True, True, True]
    assert span.recalls[0, 0].tolist() == [True, False, False, False]
    assert span.continues.tolist() == [[False]]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("width", [8, 16])  # of a head: no more than a chunk's tokens, or more
def test_fused_is_shared_logits(window, width):
    """Also where keys and values come in parts."""
    span, _ = advance(begin(2, 8, True), torch.rand(2, 24) < 0.1, 8, window=window, blocks=False)
    queries, keys, values = (torch.randn(6, 4, length, width, requires_grad=True) for length in (8, 16, 16))
    weights = torch.rand(6, 4, 1, 2, requires_grad=True)
    results = []
    for attend, cuts in ((shared_logits, 16), (shared_logits, 5), (fused, 16), (fused, 5)):
        parts = keys.split(cuts, -2), values.split(cuts, -2)
        out = attend(queries, *parts, span.seen, span.near, weights, 0.3)
        results.append((out, *torch.autograd.grad(out.square().sum(), (queries, keys, values, weights))))
    for found in results[1:]:
        for plain, other in zip(results[0], found, strict=True):
            torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-5)
