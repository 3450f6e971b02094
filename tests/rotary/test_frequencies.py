"""Worked frequencies and rotations of the papers, and the properties of each family."""

import math

import pytest
import torch

from rotary import Rotary, rotate
from rotary.frequencies import (
    Assigned,
    Axial,
    Directional,
    Frequencies,
    Geometric,
    Mixed,
    Subset,
    cycle,
    ladder,
    sections,
)
from rotary.positions import grid, hierarchy, normalised_grid, poses


def close(actual, expected, atol=1e-6):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double().squeeze(0), expected, rtol=0, atol=atol)


def scores(layer, q, k, positions):
    phase = layer(positions.double())[0]
    return rotate(q.expand(len(positions), -1), phase) @ rotate(k.expand(len(positions), -1), phase).mT


def doubles(*values):
    return torch.tensor([values], dtype=torch.float64)


V = doubles(1, 2, 3, 4, 5, 6, 7, 8)
Q, K = doubles(1, 0, 0.5, -1, 2, 1, 0, 3), doubles(0.5, 1, -1, 0, 1, 1, 2, -0.5)
GRID = grid(2, 3)


def test_every_family_is_a_law_of_frequencies():
    laws = [
        Geometric(1e4),
        Axial(100),
        Mixed(10),
        Assigned([0, 0, 0, 0], 10, 1),
        Directional(base=10),
        Subset(10, 4, [range(4)] * 2),
    ]
    for law in laws:
        assert isinstance(law, Frequencies)
        matrix = law(4, 2)
        assert matrix.dtype == torch.float64
        assert matrix.shape[0] in (1, 2)
        assert matrix.shape[1:] == (law.axes, 4)


def test_ladder_ends():
    """First and last rung of 2D heads: width 64 in base 100 and 10, width 32 in base 50 (arXiv 2403.13298)."""
    for base, rungs, last in ((100, 16, 0.013335), (10, 16, 0.115478), (50, 8, 0.032614)):
        assert ladder(base, rungs)[0] == 1
        assert ladder(base, rungs)[-1].item() == pytest.approx(last, abs=5e-7)


def test_one_axis():
    """d = 4, base 1e4: rotations by positions 1 and 3, and a score that knows only the distance (arXiv 2104.09864)."""
    layer = Rotary(Geometric(1e4), head_dim=4)
    x = doubles(1, 2, 3, 4)
    close(layer.frequencies[0, 0], [1, 0.01])
    for position, expected in (
        (1, [-1.14263966, 1.9220756, 2.95985067, 4.0297995]),
        (3, [-1.27223251, -1.83886499, 2.8786681, 4.08818664]),
    ):
        close(rotate(x, layer(torch.tensor([[float(position)]]).double())[0]), expected, 1e-8)
    for offset in (0, 100):
        q, k = (rotate(v, layer(doubles(p + offset))[0]) for v, p in ((x, 5), (torch.ones_like(x), 3)))
        assert (q @ k.T).item() == pytest.approx(4.820863443505602, abs=1e-12)


def test_axial():
    """The 2 × 3 grid, base 100: angles, rotations and first row of scores."""
    layer = Rotary(Axial(100), head_dim=8)
    phase = layer(GRID)
    close(phase[0, 3:], [[0, 0, 1, 0.1], [1, 0.1, 1, 0.1], [2, 0.2, 1, 0.1]])
    turned = rotate(V.expand(6, -1), layer(GRID.double())[0])
    close(turned[5], [-2.234742, 0.077004, 2.145522, 4.516274, -2.347314, 7.449169, 6.166362, 8.658867])
    close(turned[4], [-1.142640, 1.922076, 2.585679, 4.279517, -2.347314, 7.449169, 6.166362, 8.658867])
    table = scores(layer, Q, K, GRID)
    close(table[0], [1.5, 0.531012, 0.091265, -0.114070, -1.083058, -1.522805])
    close(torch.stack((table[0, 4], table[1, 5])), [-1.083058] * 2)
    close(torch.stack((table[3, 1], table[4, 2])), [-0.598117] * 2)


def test_mixed():
    """One head turned by π/6, base 10, on the same grid."""
    layer = Rotary(Mixed(10, angles=(math.pi / 6,)), head_dim=8)
    close(layer.frequencies, [[0.866025, 0.273861, -0.5, -0.158114], [0.5, 0.158114, 0.866025, 0.273861]])
    close(layer(GRID)[0, 5], [2.232051, 0.705836, -0.133975, -0.042366])
    turned = rotate(V.expand(6, -1), layer(GRID.double())[0])
    close(turned[5], [-2.192552, -0.438992, -0.311475, 4.990289, 5.756639, 5.278362, 7.332549, 7.696345])
    table = scores(layer, Q, K, GRID)
    close(table[0], [1.5, 0.037402, -1.802564, 0.983481, 0.733495, 0.525774])
    close(torch.stack((table[0, 4], table[1, 5])), [0.733495] * 2)
    close(torch.stack((table[3, 1], table[4, 2])), [-2.557260] * 2)


def test_angles_follow_the_shape_of_the_grid_not_its_size():
    layer = Rotary(Axial(100), head_dim=8)
    close(layer(grid(2, 3))[0, 3], [0, 0, 1, 0.1])
    close(layer(grid(3, 2))[0, 3], [1, 0.1, 1, 0.1])


def test_transposing_the_grid_swaps_the_blocks_of_pairs():
    layer = Rotary(Axial(100), head_dim=8)
    wide, tall = (layer(grid(*size)).unflatten(-2, size) for size in ((2, 3), (3, 2)))
    assert torch.equal(tall.transpose(1, 2), wide.roll(2, dims=-1))


def test_mixed_unturned_is_axial():
    torch.testing.assert_close(Mixed(100, angles=(0.0,))(16, 1), Axial(100)(16, 1), rtol=0, atol=1e-15)


def test_mixed_initialisation():
    """Speeds are the ladder's in every head, the two halves stand at right angles, and heads and layers differ by one angle."""
    frequencies = Mixed(10)(16, 6)
    rungs = ladder(10, 8)
    torch.testing.assert_close(frequencies.norm(dim=1), rungs.repeat(2).expand(6, -1))
    first, second = frequencies.split(8, dim=-1)
    torch.testing.assert_close((first * second).sum(1), torch.zeros(6, 8, dtype=torch.float64), rtol=0, atol=1e-15)
    directions = torch.atan2(first[:, 1], first[:, 0])
    torch.testing.assert_close(directions, directions[:, :1].expand(-1, 8), rtol=0, atol=1e-12)
    assert len(directions[:, 0].unique()) == 6
    assert not torch.equal(Mixed(10)(16, 6), frequencies)


def test_mixed_draws_are_seeded_and_uniform():
    tables = []
    for _ in range(2):
        torch.manual_seed(3)
        tables.append(Mixed(10)(16, 6))
    assert torch.equal(*tables)
    drawn = Mixed(10)(2, 4000)[:, :, 0]
    turns = torch.atan2(drawn[:, 1], drawn[:, 0]) % (2 * math.pi)
    shares = turns.histc(bins=4, min=0, max=2 * math.pi) / 4000
    assert (shares - 0.25).abs().max() < 0.03  # four standard deviations: 4 · sqrt(3/16 / 4000)


def test_gradients_reach_learned_frequencies():
    layer = Rotary(Mixed(10), head_dim=16, heads=2, learnable=True)
    x, target = torch.randn(2, 2, 6, 16).unbind(0)

    def loss():
        return (rotate(x, layer(GRID)) * target).sum()

    (slope,) = torch.autograd.grad(loss(), layer.frequencies)
    for index in ((0, 0, 0), (1, 1, 7), (1, 0, 3)):
        ends = []
        for step in (-1e-2, 1e-2):
            with torch.no_grad():
                layer.frequencies[index] += step
                ends.append(loss().item())
                layer.frequencies[index] -= step
        assert slope[index].item() == pytest.approx(
            (ends[1] - ends[0]) / 2e-2, rel=1e-2, abs=1e-2
        )  # central difference


def test_normalised_grid_with_periods():
    """2 × 2 patches, width 8, base 100: y before x, periods 1 and 10 (arXiv 2508.10104)."""
    layer = Rotary(Assigned([1, 1, 0, 0], 100, 2, ladder_per_axis=True, periods=True), head_dim=8)
    angle = layer(normalised_grid(2, 2).double())[0]
    expected = [
        [-math.pi, -0.314159, -math.pi, -0.314159],
        [-math.pi, -0.314159, math.pi, 0.314159],
        [math.pi, 0.314159, -math.pi, -0.314159],
        [math.pi, 0.314159, math.pi, 0.314159],
    ]
    for part in (torch.cos, torch.sin):  # π and −π are one angle
        close(part(angle), part(torch.tensor(expected, dtype=torch.float64)))


def test_layouts_of_pairs():
    assert sections((2, 3, 3)) == [0, 0, 1, 1, 1, 2, 2, 2]
    assert cycle((0, 1, 2, 3), 8) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert cycle((1, 2), 8, (0, 0)) == [1, 2, 1, 2, 1, 2, 0, 0]


def test_one_ladder_or_one_for_each_axis():
    one = Assigned(sections((2, 2)), 1e4, 2)(4, 1)[0]
    own = Assigned(sections((2, 2)), 1e4, 2, ladder_per_axis=True)(4, 1)[0]
    close(one, [[1, 0.1, 0, 0], [0, 0, 0.01, 0.001]], 1e-15)
    close(own, [[1, 0.01, 0, 0], [0, 0, 1, 0.01]], 1e-15)


def test_axes_at_rest_keep_their_rungs():
    close(Assigned([0, 1, 0, -1], 1e4, 2, still=(1,))(4, 1)[0], [[1, 0, 0.01, 0], [0, 0, 0, 0]], 1e-15)


def test_flux_angles(build):
    """Text at the origin isn't turned; at (row 1, column 2) the first pairs of each block turn by 1 and 2 (2503.16153)."""
    phase = build("flux")(torch.tensor([[0, 0, 0], [0, 1, 2]]))[0]
    assert not phase[0].any()
    assert not phase[1, :8].any()
    close(phase[1, [8, 36]].cos(), [0.5403, -0.4161], 5e-5)
    close(phase[1, [8, 36]].sin(), [0.8415, 0.9093], 5e-5)


@pytest.mark.parametrize(
    ("layout", "position", "expected"),
    [
        ((sections((2, 3, 3)), 3), (4, 4, 5), [4, 1.264911, 0.4, 0.126491, 0.04, 0.015811, 0.005, 0.001581]),
        ((cycle((0, 1, 2, 3), 8), 4), (10, 9, 7, 8), [10, 2.846050, 0.7, 0.252982, 0.1, 0.028460, 0.007, 0.002530]),
        ((cycle((0, 1, 2, 3), 8), 4), (10, 8, 9, 7), [10, 2.529822, 0.9, 0.221359, 0.1, 0.025298, 0.009, 0.002214]),
        ((cycle((1, 2), 8, (0, 0)), 3), (5, 6, 6), [6, 1.897367, 0.6, 0.189737, 0.06, 0.018974, 0.005, 0.001581]),
    ],
    ids=["mrope", "vrope", "vrope released", "video_rope"],
)
def test_video_angles(layout, position, expected):
    """Token 14 of the worked stream, width 16, base 1e4."""
    layer = Rotary(Assigned(layout[0], 1e4, layout[1]), head_dim=16)
    expected = torch.tensor(expected, dtype=torch.float64)
    close(layer(torch.tensor([position]))[0, 0], (expected + math.pi) % (2 * math.pi) - math.pi)


def test_hope_is_video_rope_with_a_resting_tail(build):
    hope, video = build("hope"), build("video_rope")
    assert torch.equal(hope.frequencies[..., :48], video.frequencies[..., :48])
    assert not hope.frequencies[..., 48:].any()
    assert video.frequencies[..., 48:].any()
    positions = torch.randint(0, 90, (7, 3)).float()
    other_times = positions.clone()
    other_times[:, 0] += 1000
    assert torch.equal(hope(positions), hope(other_times))
    text = torch.arange(7.0)[:, None].expand(-1, 3)
    plain = Rotary(Geometric(1e6), head_dim=128)(text[:, :1])
    assert torch.equal(video(text), plain)
    assert torch.equal(hope(text)[..., :48], plain[..., :48])
    assert not torch.equal(hope(text), plain)


@pytest.mark.parametrize("layout", ["mrope", "vrope", "video_rope"])
def test_text_alone_is_one_axis(build, layout):
    layer = build(layout)
    text = torch.arange(50)[:, None]
    plain = Rotary(Geometric(layer.law.base), head_dim=128)(text)
    assert torch.equal(layer(text.expand(-1, layer.axes)), plain)


S_TABLE = [  # mean cosine over the temporal pairs at distances 1, 10, 50, 200, 1000, 3000, 6000 (arXiv 2502.05173)
    (1e6, slice(0, 16), [0.9153, 0.1108, -0.1050, -0.1612, 0.0670, -0.0021, -0.2282]),
    (1e6, slice(48, 64), [1.0, 1.0, 1.0, 1.0, 0.9999, 0.9992, 0.9968]),
    (1e4, slice(0, 16), [0.8821, -0.2046, 0.2356, -0.2107, -0.2741, -0.0701, 0.3318]),
    (1e4, slice(48, 64), [1.0, 1.0, 0.9997, 0.9951, 0.8821, 0.2728, -0.0141]),
]


@pytest.mark.parametrize(("base", "pairs", "expected"), S_TABLE)
def test_time_on_fast_pairs_collides_and_on_slow_pairs_does_not(base, pairs, expected):
    layer = Rotary(Geometric(base), head_dim=128)

    def similarity(distances):
        return layer(distances[:, None])[0, :, pairs].cos().mean(-1)

    close(similarity(torch.tensor([1, 10, 50, 200, 1000, 3000, 6000])), expected, 5.1e-5)  # four digits are printed
    curve = similarity(torch.arange(21, 3001).double())
    if pairs.start == 48:
        assert (curve.diff() < 0).all()
    else:
        peaks = (curve[1:-1] > curve[:-2]) & (curve[1:-1] > curve[2:])
        assert peaks.sum() == (373 if base == 1e6 else 368)
        highest, at = curve[1:-1][peaks].max(0)
        assert highest.item() == pytest.approx(0.5556 if base == 1e6 else 0.5622, abs=1e-4)
        assert peaks.nonzero()[at].item() + 22 == (2846 if base == 1e6 else 2940)


def test_hierarchy_scores():
    """d = 8, q = k = ones on the first of each pair: HiRoPE's scores at a distance (arXiv 2403.19115)."""
    layer = Rotary(Assigned(sections((2, 2)), 1e4, 2), head_dim=8)
    x = doubles(1, 0, 1, 0, 1, 0, 1, 0)

    def score(distance, segments):
        phase = layer(hierarchy(torch.tensor([0, segments]), torch.tensor([0, distance])).double())[0]
        return (rotate(x, phase[:1]) @ rotate(x, phase[1:]).T).item()

    assert score(1000, 1000) == pytest.approx(1.125929, abs=1e-6)
    assert score(511, 511) == pytest.approx(1.459329, abs=1e-6)


def agents(**arguments):
    """Score of a query and a key at two poses."""

    def score(q, k, a, b):
        layer = Rotary(Directional(**arguments), head_dim=q.shape[-1])
        phase = layer(torch.tensor([a, b], dtype=torch.float64))[0]
        return (rotate(q, phase[:1]) @ rotate(k, phase[1:]).T).item()

    return score


Q4, K4 = doubles(1, 2, -1, 0.5), doubles(0.5, -1, 2, 1)
Q8, K8 = doubles(1, 2, -1, 0.5, 0.25, -0.75, 1.5, 0), doubles(0.5, -1, 2, 1, -0.5, 0.25, 1, 1)


def test_headings():
    """Worked scores of pure headings, equal under any number of whole turns (arXiv 2503.15029)."""
    score = agents(base=1e4, heading_share=1.0)
    for a, b in ((0.3, 1.1), (0.3 + 2 * math.pi, 1.1), (0.3, 1.1 - 4 * math.pi), (2.3, 3.1)):
        assert score(Q4, K4, (9, 9, a), (5, 4, b)) == pytest.approx(0.7793042356, abs=1e-9)
    for a, b in ((3.13, -3.13), (0, 2 * math.pi - 6.26)):
        assert score(Q4, K4, (0, 0, a), (0, 0, b)) == pytest.approx(-2.9064607784, abs=1e-9)


def test_plain_rotary_is_wrong_for_headings():
    """The same scores by an ordinary ladder jump at a whole turn: why headings need the angle itself."""
    layer = Rotary(Geometric(1e4), head_dim=4)

    def score(a, b):
        phase = layer(torch.tensor([[a], [b]], dtype=torch.float64))[0]
        return (rotate(Q4, phase[:1]) @ rotate(K4, phase[1:]).T).item()

    assert score(3.0, 7.0) == pytest.approx(-1.9519610509, abs=1e-9)
    assert score(103.0, 107.0) == pytest.approx(-1.9519610509, abs=1e-9)
    assert score(0.3, 1.1) == pytest.approx(-1.0943000531, abs=1e-9)
    assert score(0.3 + 2 * math.pi, 1.1) == pytest.approx(-1.2177023112, abs=1e-9)
    assert score(3.13, -3.13) == pytest.approx(-3.0754105235, abs=1e-9)
    assert score(3.13, -3.13 + 2 * math.pi) == pytest.approx(-2.9527666428, abs=1e-9)


def test_agents_on_the_plane():
    """Positions alone: equal under translation, not under rotation."""
    score = agents(base=1e4, heading_share=0.0)
    assert score(Q8, K8, (3, -2, 0), (7, 1, 0)) == pytest.approx(-0.1441565929, abs=1e-9)
    assert score(Q8, K8, (103, -52, 0), (107, -49, 0)) == pytest.approx(-0.1441565929, abs=1e-9)
    assert score(Q8, K8, (2, 3, 0), (-1, 7, 0)) == pytest.approx(1.0500116882, abs=1e-9)


def test_heading_and_position_within_a_head():
    score = agents(base=1e4, heading_share=1 / 3)
    q, k = torch.cat((Q4, Q8), -1), torch.cat((K4, K8), -1)
    for a, b in (
        ((3, -2, 0.3), (7, 1, 1.1)),
        ((103, -52, 0.3 + 2 * math.pi), (107, -49, 1.1 - 4 * math.pi)),
    ):
        assert score(q, k, a, b) == pytest.approx(0.6351476426, abs=1e-9)
    turned = score(q, k, (2, 3, 0.3 + math.pi / 2), (-1, 7, 1.1 + math.pi / 2))
    assert turned == pytest.approx(1.8293159238, abs=1e-9)


def test_headings_weigh_keys():
    """One query and three keys through the softmax."""
    layer = Rotary(Directional(base=1e4, heading_share=1.0), head_dim=4)
    keys = torch.cat((K4, doubles(1, 0, 0, 1), doubles(-1, 1, 0.5, 0.5)))
    phase = layer(poses(torch.zeros(4, 2), torch.tensor([0.3, 1.1, -2.0, 3.0], dtype=torch.float64)).double())[0]
    logits = rotate(Q4, phase[:1]) @ rotate(keys, phase[1:]).T / 2
    # 1e-7: `poses` gives float32 headings
    close(logits, [0.3896521178, -1.6182648342, -0.8198294185], 1e-7)
    close(logits.softmax(-1), [0.6980218089, 0.0937220414, 0.2082561497], 1e-7)


@pytest.mark.parametrize("kind", ["drope_intra", "drope_head", "drope_harmonic", "drope_time"])
def test_headings_are_periodic_and_never_scaled(build, kind):
    layer = build(kind)
    positions = torch.randn(6, layer.axes, dtype=torch.float64)
    turned = positions.clone()
    turned[:, 2] += 2 * math.pi * torch.randint(-3, 4, (6,)).double()
    x = torch.randn(layer.heads, 6, 64, dtype=torch.float64)
    assert not torch.equal(turned, positions)
    torch.testing.assert_close(rotate(x, layer(turned)), rotate(x, layer(positions)), rtol=0, atol=1e-12)
    for scaling in ("interpolate", "yarn", "truncate", "dynamic_ntk"):
        scaled = build(kind, scaling).scaled(torch.tensor(500))
        assert torch.equal(scaled[:, 2], layer.frequencies[:, 2])
        assert not torch.equal(scaled, layer.frequencies)


def test_shares_of_heads_and_pairs(build):
    heads = build("drope_head").frequencies
    assert torch.equal(heads[:4], torch.tensor([0.0, 0, 1])[None, :, None].double().expand(4, 3, 32))
    assert not heads[4:, 2].any()
    assert build("drope_harmonic").frequencies[0, 2, :16].tolist() == [1, 2, 3, 4] * 4
    assert not build("drope_harmonic").frequencies[0, 2, 16:].any()
    time = build("drope_time").frequencies[0]
    assert [(row != 0).sum().item() for row in time] == [8, 8, 8, 8]
    metres = 2 * math.pi / build("drope_intra").frequencies[0, 0, 16:24]
    assert metres[[0, -1]].tolist() == pytest.approx([4, 800])


def test_subset_rungs(build):
    layer = build("subset")
    rungs = ladder(1e4, 32)
    assert torch.equal(layer.frequencies[1, 0], rungs[::4])
    assert torch.equal(layer.frequencies[3, 0], rungs[[0, 1, 2, 3, 16, 17, 24, 31]])


def test_what_the_families_refuse():
    cases = [
        (lambda: Axial(100)(5, 1), "5 pairs .* don't divide by 2"),
        (lambda: Mixed(10)(5, 1), "5 pairs"),
        (lambda: Mixed(10, angles=(0.0,))(4, 2), "1 angles for 2 heads"),
        (lambda: ladder(0, 4), "base must be positive"),
        (lambda: Assigned([0, 0], 10, 1)(3, 1), "names 2 pairs, the head has 3"),
        (lambda: Assigned([0, 2], 10, 2)(2, 1), "axis_of_pair must lie in"),
        (lambda: Assigned([0, -2], 10, 2)(2, 1), "axis_of_pair must lie in"),
        (lambda: Directional()(8, 1), "either base or wavelengths"),
        (lambda: Directional(base=10, wavelengths=(4, 800))(8, 1), "either base or wavelengths"),
        (lambda: Directional(base=10, harmonics=(1.5,))(8, 1), "non-zero integers"),
        (lambda: Directional(base=10, harmonics=(0,))(8, 1), "non-zero integers"),
        (lambda: Directional(base=10, heading_heads=2)(8, 2), "leaves none"),
        (lambda: Directional(base=10, time_base=10)(8, 1), "4 pairs for 3 axes"),
        (lambda: Subset(10, 4, [[0, 1]])(2, 2), "2 heads of 2 pairs"),
        (lambda: Subset(10, 4, [[0, 4]])(2, 1), "chosen must lie in"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
