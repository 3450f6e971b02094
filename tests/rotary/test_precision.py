"""Where float32, and half precision, may and may not enter: phases are exact anywhere, whatever dtype surrounds them."""

import copy
import math

import mpmath
import pytest
import torch

from rotary import Rotary, phase_of, rotate, rotate_reference, unit
from rotary.frequencies import Axial, Geometric, Mixed
from rotary.positions import sequence

FAR = 2**20


def distance(angle, exact):
    """Largest distance of two angles on the circle."""
    return ((angle.double() - exact + math.pi) % (2 * math.pi) - math.pi).abs().max().item()


def exact_phases(positions, frequencies):
    """(h, n, r) angles in [0, 2π), from products in 40 digits."""
    heads, axes, pairs = frequencies.shape
    out = torch.empty(heads, len(positions), pairs, dtype=torch.float64)
    with mpmath.workdps(40):
        turn = 2 * mpmath.pi
        for h in range(heads):
            for n, row in enumerate(positions.tolist()):
                for r in range(pairs):
                    angle = mpmath.fsum(
                        mpmath.mpf(row[p]) * mpmath.mpf(frequencies[h, p, r].item()) for p in range(axes)
                    )
                    out[h, n, r] = float(angle % turn)
    return out


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_phases_are_exact_at_position_two_to_the_twenty(build, config, dtype):
    layer = build(config)
    positions = torch.tensor([0, FAR - 1, FAR])[:, None] - 3 * torch.arange(layer.axes)
    phase = layer(positions.to(dtype))
    exact = exact_phases(positions, layer.frequencies.detach().double())
    assert distance(phase, exact) < 5e-7  # half a unit in the last place of π in float32 is 1.2e-7; the target is 1e-4
    assert phase.abs().max() <= math.pi * (1 + 1e-7)


def test_ladder_is_exact_at_position_two_to_the_twenty():
    """From the base itself, not from our frequencies."""
    phase = Rotary(Geometric(1e4), head_dim=128)(torch.tensor([[FAR]]))[0, 0]
    with mpmath.workdps(40):
        exact = [float((FAR * mpmath.power(10000, -mpmath.mpf(i) / 64)) % (2 * mpmath.pi)) for i in range(64)]
    assert distance(phase, torch.tensor(exact)) < 1e-6  # float(mpf) then float32 list: two roundings near 2π


def test_the_naive_way_misses_what_is_tested_here():
    """Angles multiplied in float32, as most libraries do, are off by more than 1e-2 rad there: the bound isn't idle."""
    frequencies = Geometric(1e4)(64, 1)
    naive = torch.tensor([[FAR - 3]]).float() * frequencies[0].float()
    assert distance(naive, exact_phases(torch.tensor([[FAR - 3]]), frequencies)[0]) > 1e-2


def test_phases_survive_autocast_and_matmul_precision(build, config):
    layer = build(config)
    positions = torch.randint(0, 5000, (9, layer.axes))
    plain = layer(positions)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(positions)
        turned = layer.rotate(torch.ones(layer.heads, 9, layer.head_dim), positions=positions)[0]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)
    assert torch.equal(turned, rotate(torch.ones(layer.heads, 9, layer.head_dim), plain))
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(layer(positions), plain)
    finally:
        torch.set_float32_matmul_precision(before)


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "half and back": lambda m: m.half().float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_phases_survive_casts_of_the_module(build, config, cast):
    layer = build(config)
    positions = torch.randint(0, 5000, (9, layer.axes))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.rope = copy.deepcopy(layer)
    CASTS[cast](model)
    assert model.rope.frequencies.dtype == layer.frequencies.dtype
    assert torch.equal(model.rope(positions), layer(positions))


def test_module_still_moves_and_is_written_again_from_meta():
    layer = Rotary(Geometric(1e4), head_dim=64)
    with torch.device("meta"):
        built = Rotary(Geometric(1e4), head_dim=64)
    moved = copy.deepcopy(layer).to("meta")
    for rope in (built, moved):
        assert rope.frequencies.device.type == "meta"
        rope.to_empty(device="cpu").reset_parameters()
        assert torch.equal(rope.frequencies, layer.frequencies)


def test_fixed_frequencies_stay_out_of_the_state_dict_and_learned_ones_enter_it():
    assert not Rotary(Axial(100), head_dim=16).state_dict()
    state = Rotary(Mixed(10), head_dim=16, heads=2, learnable=True).state_dict()
    assert {key: (value.shape, value.dtype) for key, value in state.items()} == {
        "frequencies": ((2, 2, 8), torch.float32)
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_positions_are_refused(dtype):
    with pytest.raises(TypeError, match="can't tell 256 from 257"):
        phase_of(torch.zeros(3, 1, dtype=dtype), Geometric(1e4)(4, 1))


def test_half_precision_tensors_are_rounded_once():
    """In bfloat16 and float16 the turn is the float64 one, rounded: within half a unit, and float32's own error."""
    x = torch.randn(2, 3, 50, 64)
    phase = Rotary(Geometric(1e4), head_dim=64)(sequence(50, 10**6))
    for dtype, unit_in_last_place in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        narrow = x.to(dtype)
        exact = rotate_reference(narrow.double(), phase.double())
        bound = exact.abs() * unit_in_last_place * 1.001 + 1e-6
        assert ((rotate(narrow, phase).double() - exact).abs() <= bound).all()


POSITIONS = (0, 64, 256, 1024, 4096, 16384, 131072)


def drift(make):
    """Mean |logit − exact| of 512 random pairs 16 apart, at each of POSITIONS; `make(x, positions)` rotates (512, 128)."""
    torch.manual_seed(1)
    q, k = (torch.randn(512, 128).bfloat16() for _ in range(2))
    errors = []
    for position in POSITIONS:
        ends = torch.tensor([[position + 16]]), torch.tensor([[position]])
        exact, approximate = (
            (turn(q, ends[0]).double() * turn(k, ends[1]).double()).sum(-1) / math.sqrt(128)
            for turn in (in_float64, make)
        )
        errors.append((approximate - exact).abs().mean().item())
    return errors


def in_float64(x, positions):
    return rotate_reference(x.double(), positions.double() * Geometric(1e4)(64, 1)[0])


def as_here(x, positions):
    """Column B: phases of `Rotary`, q and k in bfloat16 before and after."""
    return rotate(x, Rotary(Geometric(1e4), head_dim=128)(positions)[0])


def half_tables(x, positions):
    """Column C: exact angles, but cosines, sines and products in bfloat16."""
    turn = unit(phase_of(positions, Geometric(1e4)(64, 1))[0])
    cosine, sine = turn.real.bfloat16(), turn.imag.bfloat16()
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1).flatten(-2)


def half_angles(x, positions):
    """Column D: the angle itself rounded to bfloat16."""
    return rotate(x, (positions.float() * Geometric(1e4)(64, 1)[0].float()).bfloat16().float())


def test_bfloat16_logits_do_not_drift_with_position():
    """After arXiv 2411.13476: rounding q, k or tables is flat in position; rounding the angle is not."""
    ours, tables = drift(as_here), drift(half_tables)
    for column in (ours, tables):
        assert max(column) < 0.005
        assert max(column) < 2 * min(column[1:])  # position 0 turns one end by nothing at all
    assert drift(half_angles)[POSITIONS.index(4096)] > 50 * ours[POSITIONS.index(4096)]


def test_a_bfloat16_model_keeps_its_phases_and_its_logits_when_shifted():
    layer = Rotary(Geometric(1e4), head_dim=128).to(torch.bfloat16)
    q, k = (torch.randn(1, 64, 128).bfloat16() for _ in range(2))

    def logits(shift):
        a, b = layer.rotate(q, k, positions=sequence(64, shift))
        return (a.float() @ b.float().mT) / math.sqrt(128)

    here = logits(0)
    assert 0.9 < here.std() < 1.1
    for shift in (16, 1024, 65536):
        assert (logits(shift) - here).abs().mean() < 0.01
