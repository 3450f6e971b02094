"""Headings that turn pairs by themselves (DRoPE, arXiv 2503.15029): closed form, wrap, invariances of heads and layer."""

import math

import pytest
import torch

from rotary import Rotary, rotate
from rotary.frequencies import Directional
from rotary.positions import poses

HEADING = {"wavelengths": (4, 800), "heading_share": 1.0}
POSITION = {"wavelengths": (4, 800), "heading_share": 0.0}
INTRA = {"wavelengths": (4, 800)}
BY_HEAD = {"wavelengths": (4, 800), "heading_heads": 0.5}
HARMONIC = {"wavelengths": (4, 800), "harmonics": (1, 2, 3)}
LADDER = {"wavelengths": (4, 800), "heading_base": 1e4}
ALL = {
    "heading": HEADING,
    "position": POSITION,
    "intra": INTRA,
    "by head": BY_HEAD,
    "harmonic": HARMONIC,
    "ladder": LADDER,
}


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def logits(law, pose, q, k):
    layer = Rotary(Directional(**law), head_dim=q.shape[-1], heads=q.shape[-3])
    phase = layer(pose)
    return rotate(q, phase) @ rotate(k, phase).mT / math.sqrt(q.shape[-1])


def attended(law, pose, q, k, v):
    return logits(law, pose, q, k).softmax(-1) @ v


def scene(n=12):
    pose = torch.cat((30 * doubles(n, 2), 3 * doubles(n, 1)), -1)
    return pose, doubles(4, n, 16), doubles(4, n, 16), doubles(4, n, 16)


def shifted(pose, x, y):
    return pose + torch.tensor([x, y, 0.0], dtype=torch.float64)


def turned(pose, angle):
    c, s = math.cos(angle), math.sin(angle)
    return torch.stack((c * pose[:, 0] - s * pose[:, 1], s * pose[:, 0] + c * pose[:, 1], pose[:, 2] + angle), -1)


def difference(law, pose, other, q, k, v=None):
    if v is None:
        return (logits(law, pose, q, k) - logits(law, other, q, k)).abs().max().item()
    return (attended(law, pose, q, k, v) - attended(law, other, q, k, v)).abs().max().item()


def test_closed_form():
    """⟨g(q, a), g(k, b)⟩ = A cos(b − a) + B sin(b − a), A = Σ q·k, B = Σ q₁k₀ − q₀k₁, for a thousand pairs."""
    q, k, heading = doubles(1000, 1, 1, 8), doubles(1000, 1, 1, 8), 9 * doubles(1000, 2)
    layer = Rotary(Directional(**HEADING), head_dim=8)
    pose = torch.stack((doubles(1000, 2), doubles(1000, 2), heading), -1)
    phase = layer(pose)  # (1000, 1, 2, 4)
    score = (rotate(q, phase[:, :, :1]) * rotate(k, phase[:, :, 1:])).sum(-1).flatten()
    a = (q * k).sum(-1).flatten()
    b = (q[..., 1::2] * k[..., 0::2] - q[..., 0::2] * k[..., 1::2]).sum(-1).flatten()
    delta = heading[:, 1] - heading[:, 0]
    torch.testing.assert_close(score, a * delta.cos() + b * delta.sin(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_shifts_change_nothing(name):
    pose, *qkv = scene()
    assert difference(ALL[name], pose, shifted(pose, 100, -50), *qkv[:2]) < 1e-10
    assert difference(ALL[name], pose, shifted(pose, 100, -50), *qkv) < 1e-10


@pytest.mark.parametrize("name", ALL)
def test_a_common_offset_of_headings_changes_nothing(name):
    pose, *qkv = scene()
    offset = pose + torch.tensor([0, 0, 1.3], dtype=torch.float64)
    assert difference(ALL[name], pose, offset, *qkv) < 1e-10


@pytest.mark.parametrize("name", ALL)
def test_whole_turns_change_nothing_but_for_the_ladder(name):
    pose, *qkv = scene()
    wound = pose.clone()
    wound[:, 2] += 2 * math.pi * torch.randint(-2, 3, (12,)).double()
    change = difference(ALL[name], pose, wound, *qkv)
    assert change > 1e-3 if name == "ladder" else change < 1e-12


@pytest.mark.parametrize(
    ("name", "least", "most"), [("position", 1e-2, 1e3), ("intra", 1e-2, 1e3), ("heading", 0, 1e-12)]
)
def test_rigid_rotations_change_positions_alone(name, least, most):
    """Heads of headings see relative headings exactly; displacements are seen in the frame of the scene."""
    pose, q, k, _ = scene()
    assert least <= difference(ALL[name], pose, turned(pose, 0.7), q, k) < most


def test_rigid_rotations_head_by_head():
    pose, q, k, _ = scene()
    change = (logits(BY_HEAD, pose, q, k) - logits(BY_HEAD, turned(pose, 0.7), q, k)).abs().amax((1, 2))
    assert change[:2].max() < 1e-12
    assert change[2:].min() > 1e-2


@pytest.mark.parametrize("name", ["heading", "intra", "by head", "harmonic"])
def test_continuous_where_headings_wrap(name):
    """|s(π − ε) − s(−π + ε)| is of the order of ε; an ordinary ladder jumps."""
    pose, q, k, _ = scene()

    def jump(law, epsilon):
        below, above = pose.clone(), pose.clone()
        below[0, 2], above[0, 2] = math.pi - epsilon, -math.pi + epsilon
        return difference(law, below, above, q, k)

    first, second = jump(ALL[name], 1e-3), jump(ALL[name], 1e-6)
    assert 0 < first < 0.1
    assert second == pytest.approx(first / 1000, rel=0.1)
    assert jump(LADDER, 1e-6) > 0.1


def test_one_harmonic_is_the_paper():
    pose, q, k, _ = scene()
    assert difference({**HARMONIC, "harmonics": (1,)}, pose, pose, q, k) == 0
    assert torch.equal(logits({**HARMONIC, "harmonics": (1,)}, pose, q, k), logits(INTRA, pose, q, k))
    assert not torch.allclose(logits(HARMONIC, pose, q, k), logits(INTRA, pose, q, k), atol=1e-2)


def test_an_origin_far_away_costs_nothing_once_subtracted():
    """float32 scores 10 km off, recentred in float64, against float64 at the origin; without it, the same law fails."""
    pose, q, k, _ = scene()
    exact = logits(INTRA, pose, q, k)
    far = shifted(pose, 10_000, -10_000)
    centred = poses(far[:, :2], far[:, 2], origin=torch.tensor([10_000.0, -10_000.0], dtype=torch.float64))
    assert (logits(INTRA, centred, q.float(), k.float()) - exact).abs().max() < 1e-5
    assert (logits(INTRA, far.float(), q.float(), k.float()) - exact).abs().max() > 1e-4


def test_a_share_of_heads():
    for heads in (2, 4, 8):
        share, number = (Directional(base=10, heading_heads=x)(8, heads) for x in (0.5, heads // 2))
        assert torch.equal(share, number)
        assert (share[:, 2].abs().sum(-1) > 0).tolist() == [True] * (heads // 2) + [False] * (heads // 2)
    with pytest.raises(ValueError, match=r"heading_heads=0\.5 of 1 heads leaves none"):
        Directional(base=10, heading_heads=0.5)(8, 1)


def test_time_takes_its_share():
    law = Directional(base=10, heading_share=0.0, time_base=100, time_share=0.5)(8, 1)[0]
    assert [(row != 0).sum().item() for row in law] == [2, 2, 0, 4]
    assert law[3, 4:].tolist() == pytest.approx([1, 100**-0.25, 100**-0.5, 100**-0.75])
    with pytest.raises(ValueError, match="6 pairs for 3 axes"):
        Directional(base=10, heading_share=0.0, time_base=100, time_share=0.5)(6, 1)


def test_a_ladder_for_headings_is_open_to_scalings():
    law = Directional(base=10, heading_base=1e4)
    assert law.periodic == ()
    assert Directional(base=10).periodic == (2,)
    assert law(8, 1)[0, 2, :4].tolist() == pytest.approx([1, 0.1, 0.01, 0.001])


def test_one_ladder_dealt_out_to_heads():
    """Two rungs of each axis in each of four heads, and two harmonics: together a ladder of eight, and a cycle of three."""
    law = Directional(wavelengths=(4, 800), harmonics=(1, 2, 3), across_heads=True)(6 + 2, 4)
    whole = Directional(wavelengths=(4, 800), heading_share=0.0)(16, 1)[0, 0, :8]
    assert law.shape == (4, 3, 8)
    for axis, pairs in ((0, slice(4, 6)), (1, slice(6, 8))):
        assert torch.equal(law[:, axis, pairs].T.flatten(), whole)  # rung 4i + h stands in head h
    assert law[:, 2, :4].flatten().tolist() == [1, 2, 3] * 5 + [1]
