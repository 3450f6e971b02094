"""Diagnostics of heads: hand-made queries and keys whose frequencies are known, and the constructed positional heads."""

import math

import pytest
import torch

from rotary import Rotary, first_negative, phase_of, rotate
from rotary.bound import similarity_margin
from rotary.diagnostics import (
    bound_ratio,
    decay_bound,
    frequency_centroid,
    frequency_contributions,
    frequency_norms,
    frequency_share,
    positional_score,
)
from rotary.frequencies import Geometric, ladder
from rotary.positions import sequence

B, H, N, D = 2, 3, 12, 16


def captured(seed=0, n=N, d=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, B, H, n, d, generator=generator, dtype=torch.float64).unbind(0)


def phases(head_dim=D, n=N, **options):
    return Rotary(Geometric(1e4), head_dim=head_dim, **options)(sequence(n).double())


def causal(n=N):
    return torch.ones(n, n, dtype=torch.bool).tril()


def test_norms_of_one_pair_are_one_hot():
    q = torch.zeros(B, H, N, D)
    q[..., 6:8] = torch.randn(B, H, N, 2, generator=torch.Generator().manual_seed(0))
    norms = frequency_norms(q)
    torch.testing.assert_close(norms, torch.eye(D // 2)[3].expand(H, -1))
    assert frequency_norms(torch.zeros(B, H, N, D)).eq(0).all()


def test_norms_do_not_change_with_rotation():
    q, _ = captured()
    torch.testing.assert_close(frequency_norms(rotate(q, phases())), frequency_norms(q))
    for row in frequency_norms(q).sum(-1):
        assert float(row) == pytest.approx(1)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_contributions_add_up_to_the_logit_of_a_pair_of_tokens(fraction):
    q, k = captured()
    phase = phases(fraction=fraction)
    logits = rotate(q, phase) @ rotate(k, phase).mT
    for m, n in ((5, 2), (3, 3)):
        seen = torch.zeros(N, N, dtype=torch.bool)
        seen[m, n] = True
        # with one channel pair alone the logit is what that pair adds
        for pair in range(D // 2):
            alone = torch.zeros(D, dtype=torch.float64)
            alone[2 * pair : 2 * pair + 2] = 1
            logit = (rotate(q * alone, phase) @ rotate(k, phase).mT)[..., m, n]
            found = frequency_contributions(q, k, phase, phase, seen)[:, pair]
            torch.testing.assert_close(found, logit.abs().mean(0))
        total = frequency_contributions(q, k, phase, phase, seen).sum(-1)
        assert (total >= logits[..., m, n].abs().mean(0) - 1e-12).all()


def test_share_of_one_pair_is_one_hot_and_needs_both():
    q, k = captured()
    only = torch.zeros(D, dtype=torch.float64)
    only[4:6] = 1
    share = frequency_share(q * only, k, phases(), phases(), causal())
    torch.testing.assert_close(share, torch.eye(D // 2, dtype=torch.float64)[2].expand(H, -1))
    assert frequency_share(q * only, k * (1 - only), phases(), phases(), causal()).eq(0).all()


def test_share_looks_at_what_is_seen_alone():
    q, k = captured()
    later = k.clone()
    later[..., -1, :] *= 100  # seen by the last query only
    seen = causal()
    seen[-1, -1] = False
    one, other = (frequency_share(q, x, phases(), phases(), seen) for x in (k, later))
    torch.testing.assert_close(one, other)
    assert not torch.allclose(frequency_share(q, later, phases(), phases(), causal()), one)
    assert frequency_share(q, k, phases(), phases(), torch.zeros_like(seen)).eq(0).all()


def test_share_is_relative():
    q, k = captured()
    moved = Rotary(Geometric(1e4), head_dim=D)(sequence(N, offset=1000).double())
    torch.testing.assert_close(
        frequency_share(q, k, moved, moved, causal()), frequency_share(q, k, phases(), phases(), causal())
    )


def test_centroid():
    eye = torch.eye(8)
    torch.testing.assert_close(frequency_centroid(eye), torch.arange(8) / 8)
    assert float(frequency_centroid(torch.full((8,), 1 / 8))) == pytest.approx(3.5 / 8)


def test_weighted_bound_of_a_head_that_uses_one_frequency():
    frequencies = ladder(1e4, 64)
    for pair in (0, 20, 40):
        weights = torch.eye(64)[pair]
        assert first_negative(frequencies, 10_000, weights) == math.floor(math.pi / 2 / float(frequencies[pair])) + 1
    both = torch.stack((torch.full((64,), 1 / 64), torch.eye(64)[40]))
    margins = similarity_margin(frequencies, torch.arange(1800), both)
    torch.testing.assert_close(margins[0] * 64, similarity_margin(frequencies, torch.arange(1800)))
    assert first_negative(frequencies, 10_000, both[0]) == 1707


def test_positional_score_averages_what_exists():
    attention = torch.zeros(1, 2, 4, 4)
    attention[0, 0] = torch.eye(4)
    attention[0, 1] = torch.eye(4).roll(-1, dims=1).tril(-1)
    score = positional_score(attention, 3)
    torch.testing.assert_close(score, torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
    with pytest.raises(ValueError, match="distances=5"):
        positional_score(attention, 5)


@pytest.mark.parametrize("back", [0, 1])
def test_a_head_on_the_highest_frequencies_is_positional(back):
    """Theorem 5.3 of 2410.06205 with 8 of 64 pairs and ‖ψ‖² = 400: equal queries, keys moved by `back` tokens."""
    n, width, pairs = 128, 128, 8
    psi = torch.zeros(width, dtype=torch.float64)
    psi[0 : 2 * pairs : 2] = math.sqrt(400 / pairs)
    q = psi.expand(1, 1, n, width)
    rotary = Rotary(Geometric(1e4), head_dim=width)
    k = rotate(q, rotary(torch.full((n, 1), float(back), dtype=torch.float64)))
    phase = rotary(sequence(n).double())
    logits = rotate(q, phase) @ rotate(k, phase).mT / math.sqrt(width)
    attention = logits.masked_fill(~causal(n), -math.inf).softmax(-1)
    assert float(attention.diagonal(-back, dim1=-2, dim2=-1).amin()) > 0.99
    assert float(positional_score(attention, 2)[0, back]) > 0.99
    share = frequency_share(q, k, phase, phase, causal(n))
    assert float(share[0, :pairs].sum()) == pytest.approx(1)
    assert float(frequency_centroid(share)) < pairs / 64
    if not back:
        assert float(bound_ratio(q, k)) == pytest.approx(1)


def test_without_positions_equal_tokens_get_equal_scores():
    generator = torch.Generator().manual_seed(0)
    bos, x = torch.randn(2, 32, generator=generator, dtype=torch.float64)
    tokens = torch.stack((bos, x, x))
    w = torch.randn(2, 32, 32, generator=generator, dtype=torch.float64)
    logits = (tokens @ w[0]) @ (tokens @ w[1]).mT
    assert torch.equal(logits[2, 1], logits[2, 2])
    attention = logits.masked_fill(~causal(3), -math.inf).softmax(-1)
    assert float(attention[2, 2]) < 0.5
    turned = (
        rotate(x_[None], phase_of(sequence(3).double(), ladder(1e4, 16)[None, None]))
        for x_ in (tokens @ w[0], tokens @ w[1])
    )
    first, second = turned
    rotated = (first @ second.mT)[0]
    assert not torch.isclose(rotated[2, 1], rotated[2, 2])


@pytest.mark.parametrize(
    ("top", "within", "worst", "distance"),
    [
        (1, 127, 0.999843, 44),
        (2, 127, 0.965152, 94),
        (1, 8191, 1.0, 710),
        (2, 8191, 0.999805, 5391),
        (8, 127, 0.786581, 1),
        (64, 8191, 0.970214, 1),
    ],
)
def test_sharpness_of_the_highest_frequencies(top, within, worst, distance):
    similarity = similarity_margin(ladder(1e4, 64)[:top], torch.arange(1, within + 1)) / top
    assert float(similarity.amax()) == pytest.approx(worst, abs=1e-4)
    assert int(similarity.argmax()) + 1 == distance


def test_decay_bound():
    distances = torch.tensor([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 50, 100])
    expected = [
        32.5,
        31.538,
        28.956,
        22.604,
        19.817,
        15.775,
        13.384,
        10.090,
        9.273,
        6.543,
        5.311,
        4.024,
        12.629,
        10.227,
    ]
    assert decay_bound(ladder(1e4, 64), distances).tolist() == pytest.approx(expected, abs=1e-3)


def test_decay_bound_bounds_the_logit():
    q, k = captured(n=1, d=128)
    frequencies = ladder(1e4, 64)
    h = torch.view_as_complex(q.unflatten(-1, (-1, 2))) * torch.view_as_complex(k.unflatten(-1, (-1, 2))).conj()
    steps = torch.cat((h, torch.zeros_like(h[..., :1])), dim=-1).diff(dim=-1).abs().amax(-1)
    for distance in (1, 30, 900):
        rotary = Rotary(Geometric(1e4), head_dim=128)
        logit = rotate(q, rotary(torch.tensor([[float(distance)]], dtype=torch.float64))) @ k.mT
        bound = steps * decay_bound(frequencies, torch.tensor([distance])) * 64
        assert (logit.abs().flatten() <= bound.flatten()).all()
