"""Rotary attention over poses: linear memory, masks, and agreement with the softmax written out."""

import math

import pytest
import torch
from agent_cases import config
from hydra.utils import instantiate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.pairwise_attention import PairwiseAttention
from models.pose_attention import PosePhases, RotaryAttention, visible, within
from rotary import Rotary, rotate_reference
from rotary.frequencies import Axial, Directional

WIDTH, HEADS, DIM = 128, 8, 16


def phases(pos="drope_intra", heads=HEADS, head_dim=DIM, temporal=False):
    node = config("ci", pos)["temporal_phases" if temporal else "phases"]
    return instantiate(node, _convert_="all")(heads=heads, head_dim=head_dim)


def layer(dtype=torch.float64):
    torch.manual_seed(0)
    return RotaryAttention(width=WIDTH, heads=HEADS, head_dim=DIM).to(dtype)


def tokens(n, dtype=torch.float64, lead=(1,), spread=40.0):
    pose = torch.cat((spread * torch.randn(*lead, n, 2), 3 * torch.randn(*lead, n, 1)), -1).to(dtype)
    return torch.randn(*lead, n, WIDTH, dtype=dtype), pose


def attend(attention, x, place, seen=None):
    return attention(x, place, attention.keys(x, place), seen)


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("pos", ["drope_intra", "drope_head", "drope_harmonic", "rope"])
@pytest.mark.parametrize("lead", [(2,), (2, 3)])
def test_agrees_with_the_softmax_written_out(pos, lead):
    attention, (x, pose) = layer(), tokens(7, lead=lead)
    mask = torch.rand(*lead, 7, 7) > 0.4
    mask[..., 2, :] = False
    turn = phases(pos)
    angle = turn.rotary(pose)  # radians
    query = attention.query(x).unflatten(-1, (HEADS, DIM)).transpose(-3, -2)
    key, value = (f(x).unflatten(-1, (HEADS, DIM)).transpose(-3, -2) for f in (attention.key, attention.value))
    logits = rotate_reference(query, angle) @ rotate_reference(key, angle).mT / 4
    weights = logits.masked_fill(~mask.unsqueeze(-3), -math.inf).softmax(-1).nan_to_num(0.0)
    expected = attention.out((weights @ value).transpose(-3, -2).flatten(-2))
    expected[..., 2, :] = 0
    for dtype in (None, torch.float64):
        close(attend(attention, x, turn(pose), visible(mask, dtype)), expected)
    everything = attend(attention, x, turn(pose), visible(torch.ones_like(mask)))
    close(attend(attention, x, turn(pose)), everything)
    assert not torch.allclose(everything, expected, atol=1e-2)


def test_a_query_that_sees_nothing_answers_zero_and_passes_finite_gradients():
    attention, (x, pose) = layer(), tokens(5)
    x.requires_grad_()
    mask = torch.ones(1, 5, 5, dtype=torch.bool)
    mask[0, 3] = False
    out = attend(attention, x, phases()(pose), visible(mask))
    assert not out[0, 3].any()
    assert out[0, [0, 1, 2, 4]].abs().min() > 0
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    nothing = attend(attention, x, phases()(pose), visible(mask[:, 3:4]))
    assert not nothing.any()


def test_the_radius_is_part_of_what_is_within():
    query = torch.zeros(1, 1, 3, dtype=torch.float64)
    key = torch.tensor([[[3, 4, 9], [3, 4 + 1e-9, 9], [-5, 0, 9], [0, 5.1, 9]]], dtype=torch.float64)
    assert within(query, key, 5.0).tolist() == [[[True, False, True, False]]]
    query, key = 30 * torch.randn(2, 300, 3), 30 * torch.randn(2, 500, 3)  # in parts
    here, there = (p[..., 0].double() + 1j * p[..., 1].double() for p in (query, key))
    apart = (here[:, :, None] - there[:, None]).abs()
    clear = (apart - 40).abs() > 1e-4  # metres: rounding in float32
    assert torch.equal(within(query, key, 40.0)[clear], (apart <= 40)[clear])


def saved(function):
    """Bytes and element counts of the tensors that autograd keeps of `function()`, each storage once."""
    storages, sizes = {}, []

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function()
    assert out.requires_grad
    return sum(storages.values()), max(sizes)


def rotary_case(n, masked=False):
    attention, (x, pose) = layer(torch.float32), tokens(n, torch.float32)
    seen = visible(within(pose, pose, 60.0)) if masked else None
    place = phases()(pose)
    return lambda: attend(attention, x, place, seen)


def pairwise_case(n):
    attention = PairwiseAttention(width=WIDTH, heads=HEADS, head_dim=DIM)
    x, pose = tokens(n, torch.float32)
    return lambda: attend(attention, x, pose)


def test_memory_is_linear_and_that_of_pairs_is_not():
    linear = {n: saved(rotary_case(n))[0] for n in (128, 256, 512, 1024)}
    pairs = {n: saved(pairwise_case(n))[0] for n in (32, 64, 128)}
    for n in (128, 256, 512):
        assert linear[2 * n] / linear[n] < 2.05
    for n in (32, 64):
        assert pairs[2 * n] / pairs[n] > 3.5
    assert pairs[128] > 20 * linear[128]
    per_token = (linear[1024] - linear[512]) / 512
    # x, turned q and k, v, what was attended; a cosine and sine for each pair of each head; the softmax's normaliser
    assert per_token == 4 * (5 * WIDTH + WIDTH + HEADS)


@pytest.mark.parametrize("masked", [False, True])
def test_no_tensor_of_all_pairs_and_channels_is_saved(masked):
    n = 256
    bytes_saved, largest = saved(rotary_case(n, masked))
    assert largest < n * n * DIM
    plain, _ = saved(rotary_case(n))
    assert bytes_saved - plain <= 4 * n * n + n * WIDTH * 4 + n  # the mask, as floating point, and what `where` keeps
    assert saved(pairwise_case(64))[1] >= 64 * 64 * DIM


def test_fewer_operations_than_pairs():
    def operations(case):
        # the counter doesn't know the CPU's fused kernel, so attention is spelled out for both
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            case().sum().backward()
        return counter.get_total_flops()

    n = 256
    rotary, pairs = operations(rotary_case(n)), operations(pairwise_case(n))
    assert (
        3 * 4 * n * n * HEADS * DIM < rotary < pairs / 5
    )  # logits and sums, forwards and twice backwards, are counted


def test_a_bias_made_once_is_not_made_again():
    """Floating point masks are used as they are; a bool one is copied by every layer."""
    x, pose = tokens(64, torch.float32)
    mask = within(pose, pose, 60.0)
    first, second = layer(torch.float32), layer(torch.float32)
    place = phases()(pose)

    def both(seen):
        return saved(lambda: attend(first, x, place, seen) + attend(second, x, place, seen))[0]

    assert both(visible(mask)) - both(visible(mask, torch.float32)) >= 64 * 64 * 4


@pytest.mark.parametrize("pos", ["drope_intra", "drope_head", "drope_harmonic"])
def test_bfloat16_autocast_keeps_angles(pos):
    attention, (x, pose) = layer(torch.float32), tokens(32, torch.float32, spread=400.0)
    turn = phases(pos)
    expected = attend(attention, x, turn(pose))
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(attention, x, turn(pose))
    assert out.dtype == torch.bfloat16
    close(out.float(), expected, 2e-2)  # 8 bits of mantissa on numbers of order one
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 16), (4, 8), (8, 16)])
@pytest.mark.parametrize("pos", ["drope_intra", "drope_head", "drope_harmonic", "rope"])
@pytest.mark.parametrize("temporal", [False, True])
def test_narrow_heads_cover_all_wavelengths_between_them(pos, heads, head_dim, temporal):
    turn = phases(pos, heads, head_dim, temporal).rotary.frequencies  # (h, p, r)
    axes = 4 if temporal else 3
    assert turn.shape == (heads, axes, head_dim // 2)
    metres = 2 * math.pi / turn[:, 0][turn[:, 0] > 0]
    assert metres.min() == pytest.approx(4)
    assert metres.max() == pytest.approx(800 if len(metres) > 1 else 4)
    assert len(metres.unique()) == len(metres) == (turn[:, 1] > 0).sum() > 1
    assert ((turn != 0).sum(1) == 1).all()  # every pair turns with one axis
    for axis in range(axes):
        assert turn[:, axis].any()


def test_what_phases_refuse():
    def learnable(**shape):
        return Rotary(Directional(base=10), learnable=True, **shape)

    def scaled(**shape):
        from rotary.scaling import DynamicNTK

        return Rotary(Axial(100), DynamicNTK(4.0, 8), **shape)

    with pytest.raises(ValueError, match="learnable"):
        PosePhases(learnable, heads=2, head_dim=16)
    with pytest.raises(ValueError, match="no length to extend"):
        PosePhases(scaled, heads=2, head_dim=16)
    with pytest.raises(ValueError, match=r"columns \[0\] for a rotary of 2 axes"):
        PosePhases(lambda **shape: Rotary(Axial(100), **shape), heads=2, head_dim=16, columns=[0])
