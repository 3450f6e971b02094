"""Worked numbers of each scaling, and what holds for all of them."""

import math

import pytest
import torch

from rotary import Rotary, rotate
from rotary.frequencies import Assigned, Axial, Geometric, Mixed, sections
from rotary.scaling import (
    NTK,
    DynamicNTK,
    Identity,
    Interpolate,
    Llama3,
    LongRoPE,
    Reversed,
    Scaling,
    Truncate,
    YaRN,
)

LENGTH = torch.tensor(1000)
ALL = [
    Identity(),
    Interpolate(4),
    NTK(4),
    DynamicNTK(1, 256),
    YaRN(4, 256),
    Llama3(4, 256, 1, 4),
    LongRoPE((1.0,) * 8, (4.0,) * 8, 256, 4),
    Truncate(0.5),
    Reversed(0.5),
]


def scaled(scaling, width=16, base=1e4, length=LENGTH):
    return scaling(Geometric(base)(width // 2, 1), length)[0, 0]


def near(actual, expected, rel=1e-6):
    assert actual.tolist() == pytest.approx(expected, rel=rel, abs=1e-12)


@pytest.mark.parametrize("scaling", ALL, ids=lambda s: type(s).__name__)
def test_every_scaling_keeps_shape_dtype_and_rest(scaling):
    assert isinstance(scaling, Scaling)
    f = Geometric(1e4)(8, 1)
    for frequencies in (f, f.float(), f.expand(3, 1, 8).clone()):
        out = scaling(frequencies, LENGTH)
        assert out.shape == frequencies.shape
        assert out.dtype == frequencies.dtype
    resting = f.clone()
    resting[..., -2:] = 0
    assert not scaling(resting, LENGTH)[..., -2:].any()


@pytest.mark.parametrize(
    "scaling", [Interpolate(1), NTK(1), DynamicNTK(1, 1000), YaRN(1, 256), Truncate(1), Reversed(1)]
)
def test_an_extension_of_one_changes_nothing(scaling):
    near(scaled(scaling), scaled(Identity()).tolist(), rel=1e-12)
    assert scaling.logit_gain == 1


def test_yarn_of_llama():
    """d = 128, base 1e4, 4096 to 65536 positions (arXiv 2309.00071)."""
    f = scaled(YaRN(16, 4096), 128)
    near(
        f[[0, 20, 21, 30, 33, 45, 46, 63]],
        [1, 5.623413e-2, 4.694086e-2, 8.526844e-3, 4.600435e-3, 1.517716e-4, 8.334509e-5, 7.217387e-6],
    )
    assert YaRN(16, 4096).attention_factor == pytest.approx(1.2772588722, abs=1e-10)
    assert YaRN(16, 4096).logit_gain == pytest.approx(1.2772588722**2)
    plain = scaled(Identity(), 128)
    near(f[:21], plain[:21].tolist(), rel=1e-12)
    near(f[46:], (plain[46:] / 16).tolist())
    assert ((plain / 16 <= f * (1 + 1e-12)) & (f <= plain)).all()


def test_yarn_of_a_small_head():
    end = [2.5e-3, 7.905694e-4, 2.5e-4, 7.905694e-5]
    near(scaled(YaRN(4, 256)), [1, 2.569351e-1, 6.25e-2, 1.383496e-2, *end])
    near(scaled(YaRN(4, 256, truncate=False)), [1, 2.539723e-1, 5.539864e-2, 9.639943e-3, *end])
    assert YaRN(4, 256).attention_factor == pytest.approx(1.1386294361, abs=1e-10)


def test_yarn_gain():
    for factor, gain in ((2, 1.069315), (4, 1.138629), (8, 1.207944), (16, 1.277259), (32, 1.346574), (0.5, 1)):
        assert YaRN(factor, 256).attention_factor == pytest.approx(gain, abs=5e-7)
    assert YaRN(4, 256, gain=1.5).logit_gain == 2.25


def test_ntk():
    end = [0.2594128, 0.06729501, 0.01745719, 4.528618e-3, 1.174782e-3, 3.047534e-4, 7.905694e-5]
    near(scaled(NTK(4)), [1, *end])
    near(scaled(NTK(4)), scaled(Identity(), base=48760.546168).tolist())


def test_dynamic_ntk_follows_the_length():
    for length, base in ((100, 1e4), (256, 1e4), (512, 35097.924383), (1024, 92432.847343)):
        near(scaled(DynamicNTK(2, 256), length=torch.tensor(length)), scaled(Identity(), base=base).tolist())
    near(scaled(DynamicNTK(1, 256), length=torch.tensor(1024)), scaled(NTK(4)).tolist())


def test_dynamic_ntk_reads_the_length_off_the_positions():
    layer = Rotary(Geometric(1e4), DynamicNTK(1, 256), head_dim=16)
    positions = torch.arange(1000)[:, None]
    assert torch.equal(layer(positions), layer(positions, 1000))
    assert torch.equal(layer(positions), layer(positions, LENGTH))
    assert not torch.equal(layer(positions), layer(positions, 300))
    assert torch.equal(layer(positions[:200]), Rotary(Geometric(1e4), head_dim=16)(positions[:200]))


def test_llama3():
    """d = 128, base 5e5, factor 8, low 1, high 4, 8192 positions (Llama 3.1)."""
    plain, f = scaled(Identity(), 128, 5e5), scaled(Llama3(8, 8192, 1, 4), 128, 5e5)
    assert torch.equal(f[:29], plain[:29])
    near(f[35:], (plain[35:] / 8).tolist())
    near(f[[29, 34]], [2.166571e-3, 1.785078e-4])
    assert ((f[29:35] < plain[29:35]) & (f[29:35] > plain[29:35] / 8)).all()


def test_longrope():
    scaling = LongRoPE(tuple(range(1, 9)), tuple(range(11, 19)), 256, 4)
    plain = scaled(Identity())
    for length, first in ((256, 1), (257, 11)):
        near(scaled(scaling, length=torch.tensor(length)), (plain / torch.arange(first, first + 8)).tolist())
    assert scaling.attention_factor == pytest.approx(1.1180339887, abs=1e-10)
    assert LongRoPE((1,), (1,), 256, 4, gain=2.0).logit_gain == 4
    assert LongRoPE((1,), (1,), 256, 1).logit_gain == 1


def test_truncate_and_its_relatives():
    """d = 8: the fast part of the full ladder, a whole ladder squeezed into it, and the slow part (arXiv 2410.06205)."""
    near(scaled(Truncate(0.75), 8), [1, 0.1, 0.01, 0])
    near(scaled(Truncate(0.5), 8), [1, 0.1, 0, 0])
    near(scaled(Truncate(0.5, factor=2), 8), [0.5, 0.05, 0, 0])
    near(scaled(Reversed(0.75), 8), [0, 0.1, 0.01, 0.001])
    near(scaled(Truncate(0), 8), [0] * 4)
    near(scaled(Reversed(0), 8), [0] * 4)
    partial = Rotary(Geometric(1e4), head_dim=8, fraction=0.75)
    near(partial.frequencies[0, 0], [1, 0.04641589, 0.002154435])


def test_truncation_counts_the_pairs_that_turn(build):
    """A heading's pairs, which no scaling sees, don't count; pairs of equal speed go together."""
    layer = build("drope_intra", "truncate")
    x, y, heading = layer.scaled()[0]
    assert (heading[:16] == 1).all()
    assert [(row != 0).sum().item() for row in (x, y)] == [6, 6]
    slow = build("drope_intra", "reversed").scaled()[0]
    assert [(row != 0).sum().item() for row in slow[:2]] == [6, 6]
    assert torch.equal((slow[0] != 0).nonzero().flatten(), torch.arange(18, 24))
    mixed = Mixed(10)(32, 3)
    kept = Truncate(0.75)(mixed).norm(dim=1) > 0
    assert torch.equal(kept[:, :16], kept[:, 16:])
    assert (kept.sum(-1) == 24).all()


@pytest.mark.parametrize("scaling", [NTK(4), YaRN(4, 64), Llama3(4, 64, 1, 4), DynamicNTK(1, 256)])
def test_two_axes_scale_as_one_ladder_each(scaling):
    """Axial and mixed frequencies are scaled by speed, so each axis gets what a sequence of that ladder gets."""
    alone = scaling(Geometric(100)(8, 1), LENGTH)[0, 0]
    both = scaling(Axial(100)(16, 1), LENGTH)[0]
    torch.testing.assert_close(both[0, :8], alone)
    torch.testing.assert_close(both[1, 8:], alone)
    turned = scaling(Mixed(100)(16, 3), LENGTH)
    torch.testing.assert_close(turned.norm(dim=1), alone.repeat(2).expand(3, -1))


def test_one_ladder_cut_in_sections_scales_as_a_whole():
    plain = YaRN(4, 256)(Geometric(1e4)(8, 1))[0, 0]
    torch.testing.assert_close(YaRN(4, 256)(Assigned(sections((2, 3, 3)), 1e4, 3)(8, 1))[0].sum(0), plain)


def test_gain_belongs_to_the_softmax(build):
    """Cosines and sines times a, or logits times a²: the same weights."""
    layer = build("sequence", "yarn")
    gain = layer.scaling.attention_factor
    assert gain == pytest.approx(0.1 * math.log(4) + 1)
    q, k = torch.randn(2, 9, 64, dtype=torch.float64).unbind(0)
    phase = layer(torch.arange(9)[:, None].double())[0]
    theirs = [
        torch.stack(
            (a * phase.cos() * gain - b * phase.sin() * gain, a * phase.sin() * gain + b * phase.cos() * gain), -1
        )
        for a, b in (x.unflatten(-1, (-1, 2)).unbind(-1) for x in (q, k))
    ]
    scaled_tables = (theirs[0].flatten(-2) @ theirs[1].flatten(-2).T / 8).softmax(-1)
    scaled_logits = rotate(q, phase) @ rotate(k, phase).T * layer.logit_gain / 8
    torch.testing.assert_close(scaled_logits.softmax(-1), scaled_tables)


def test_learned_frequencies_get_gradients_through_scaling():
    for scaling in (Interpolate(4), NTK(4), YaRN(4, 64), Llama3(4, 64, 1, 4), DynamicNTK(1, 64), Truncate(1)):
        layer = Rotary(Mixed(10), scaling, head_dim=16, heads=2, learnable=True)
        out = layer(torch.randint(1, 90, (5, 2)).float(), 300)
        (slope,) = torch.autograd.grad(out.sum(), layer.frequencies)
        assert slope.isfinite().all()
        assert (slope != 0).all()


def test_checkpoints_load_under_any_scaling():
    for learnable in (False, True):
        plain = Rotary(Mixed(10), head_dim=16, heads=2, learnable=learnable)
        other = Rotary(Mixed(10), YaRN(4, 64), head_dim=16, heads=2, learnable=learnable)
        assert not other.load_state_dict(plain.state_dict(), strict=True).missing_keys
        assert torch.equal(other.frequencies, plain.frequencies) == learnable


def test_what_is_refused():
    cases = [
        (lambda: Interpolate(0), "Interpolate: factor must be positive, got 0"),
        (lambda: NTK(-1), "NTK: factor"),
        (lambda: DynamicNTK(1, 0), "DynamicNTK: original"),
        (lambda: YaRN(4, 0), "YaRN: original"),
        (lambda: YaRN(4, 64, fast=0), "YaRN: fast"),
        (lambda: Llama3(4, 64, 4, 1), "high .* must exceed low"),
        (lambda: Truncate(1.5), "fraction must lie"),
        (lambda: Truncate(0.5, factor=0), "Truncate: factor"),
        (lambda: Reversed(-0.5), "fraction must lie"),
        (lambda: DynamicNTK(1, 64)(torch.ones(1, 1, 2)), "needs the length"),
        (lambda: LongRoPE((1,), (1,), 64, 4)(torch.ones(1, 1, 1)), "needs the length"),
        (lambda: LongRoPE((1,), (1,), 64, 4)(torch.ones(1, 1, 2), LENGTH), "1 short and 1 long factors for 2 pairs"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
