"""What every rotary encoding must obey, for every config there is; and `rotate` against its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from rotary import Rotary, rotate, rotate_reference, unit
from rotary.frequencies import Axial, Geometric

LENGTH = 300  # of dynamic scalings, past ORIGINAL, the same for all positions of a test


def draw(layer, n, dtype=torch.float64):
    x = torch.randn(2, layer.heads, n, layer.head_dim, dtype=dtype)
    positions = torch.randint(-40, 40, (2, n, layer.axes)).to(dtype)
    return x, positions


def scores(layer, q, k, positions):
    phase = layer(positions, LENGTH)
    return rotate(q, phase) @ rotate(k, phase).mT / math.sqrt(layer.head_dim)


def check_laws(layer):
    x, a = draw(layer, 9)
    _, b = draw(layer, 9)
    first, second = layer(a, LENGTH), layer(b, LENGTH)
    assert torch.equal(rotate(x, layer(torch.zeros_like(a), LENGTH)), x)
    torch.testing.assert_close(rotate(x, first).norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    twice = rotate(rotate(x, first), second)
    torch.testing.assert_close(twice, rotate(x, first + second), rtol=0, atol=1e-10)
    torch.testing.assert_close(twice, rotate(x, layer(a + b, LENGTH)), rtol=0, atol=1e-10)
    assert not torch.allclose(twice, x, atol=0.1)


def check_shift(layer, dtype, atol):
    q, positions = draw(layer, 9, dtype)
    k, _ = draw(layer, 9, dtype)
    here = scores(layer, q, k, positions)
    for shift in (1.0, 17.0, 4096.0):
        moved = positions + shift * torch.arange(1, layer.axes + 1, dtype=dtype)
        torch.testing.assert_close(scores(layer, q, k, moved), here, rtol=0, atol=atol)
    scrambled = positions.flip(-2)
    assert not torch.allclose(scores(layer, q, k, scrambled), here, atol=0.01)


def test_config_obeys_the_laws(build, config):
    check_laws(build(config))


def test_scaling_obeys_the_laws(build, scaling_config):
    check_laws(build("sequence", scaling_config))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_config_is_relative(build, config, dtype, atol):
    check_shift(build(config), dtype, atol)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_scaling_is_relative(build, scaling_config, dtype, atol):
    check_shift(build("sequence", scaling_config), dtype, atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_the_input_is_kept(build, config, dtype):
    layer = build(config)
    x, positions = draw(layer, 5)
    out = rotate(x.to(dtype), layer(positions.long()))
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert layer(positions.long()).dtype == torch.float32


def test_config_takes_every_scaling_that_fits_any_width(build, config):
    for scaling in ("interpolate", "ntk", "dynamic_ntk", "yarn", "llama3", "truncate", "reversed"):
        plain_layer = build(config)
        stretch = build("sequence", scaling).scaling
        layer = Rotary(
            plain_layer.law,
            stretch,
            head_dim=plain_layer.head_dim,
            heads=plain_layer.heads,
            fraction=2 * plain_layer.pairs / plain_layer.head_dim,
        )
        plain, scaled = layer.frequencies.abs(), layer.scaled(torch.tensor(LENGTH)).abs()
        assert scaled.shape == plain.shape
        assert (scaled <= plain * (1 + 1e-6)).all(), f"{scaling} speeds a pair up"  # 1e-6: rounding


def test_channels_past_the_rotated_ones_pass_bit_for_bit(build):
    layer = build("partial")
    x, positions = draw(layer, 5)
    out = rotate(x, layer(positions))
    assert torch.equal(out[..., 16:], x[..., 16:])
    assert not torch.equal(out[..., :16], x[..., :16])


TOLERANCE = {  # one rounding to x.dtype: a unit in the last place; phases sum over rows, so a few more in wide precision
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5},
    torch.float16: {"rtol": 2**-10, "atol": 1e-5},
}


def angles(shape, dtype):
    """Radians up to a few turns, in float64 for float64 tensors as `Rotary` gives them, else float32."""
    return (4 * torch.randn(shape, dtype=torch.float64)).to(dtype if dtype == torch.float64 else torch.float32)


def contiguous(shape, dtype):
    return torch.randn(shape).to(dtype)


def transposed(shape, dtype):
    """The (b, n, h, d) memory of a projection, seen as (b, h, n, d)."""
    b, h, n, d = shape
    return torch.randn(b, n, h, d).to(dtype).transpose(1, 2)


def odd_offset(shape, dtype):
    """Starts at an odd element, so that a pair isn't aligned as one complex number."""
    return torch.randn(math.prod(shape) + 1).to(dtype)[1:].view(shape)


def odd_stride(shape, dtype):
    """Rows lie an odd number of elements apart."""
    return torch.randn(*shape[:-1], shape[-1] + 1).to(dtype)[..., :-1]


def strided(shape, dtype):
    """Channels are not neighbours in memory."""
    return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]


def compare(x, phase):
    """Values and both gradients of rotate and rotate_reference."""
    weight = torch.randn(x.shape).to(x.dtype)
    results = []
    for function in (rotate, rotate_reference):
        own, angle = x.detach().requires_grad_(), phase.detach().clone().requires_grad_()
        out = function(own, angle)
        assert out.dtype == x.dtype
        results.append((out.detach(), *torch.autograd.grad(out, (own, angle), weight)))
    for ours, definition in zip(*results, strict=True):
        torch.testing.assert_close(ours, definition, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("memory", [contiguous, transposed, odd_offset, odd_stride, strided])
@pytest.mark.parametrize("passing", [0, 2, 5])
def test_rotate_is_its_definition(memory, passing, dtype):
    for n in (1, 7, 33):
        for lead in ((2, 3), (2, 1), (1, 3), (1, 1), (3,), ()):
            compare(memory((2, 3, n, 8 + passing), dtype), angles((*lead, n, 4), dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_queries_and_keys_turn_in_one_call(dtype):
    """(b, n, 2, h, d) straight from a projection, the phase broadcast over the two and the heads."""
    phase = angles((7, 1, 1, 4), dtype)
    projected = torch.randn(2, 7, 3, 3, 8).to(dtype)
    both = projected[:, :, :2]
    compare(both, phase)
    out = rotate(both, phase)
    apart = rotate(projected[:, :, 1].transpose(1, 2), phase[:, 0, 0])
    torch.testing.assert_close(out[:, :, 1].transpose(1, 2), apart, rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    pairs=st.integers(1, 6),
    passing=st.integers(0, 3),
    heads=st.integers(1, 3),
    shared=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_rotate_is_its_definition_over_ragged_shapes(n, pairs, passing, heads, shared, dtype):
    compare(torch.randn(2, heads, n, 2 * pairs + passing).to(dtype), angles((1 if shared else heads, n, pairs), dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_unit_numbers_turn_like_radians(dtype):
    x, phase = torch.randn(2, 3, 7, 10).to(dtype), angles((7, 4), dtype)
    torch.testing.assert_close(rotate(x, unit(phase)), rotate(x, phase), rtol=0, atol=0)
    torch.testing.assert_close(rotate_reference(x, unit(phase)), rotate_reference(x, phase), **TOLERANCE[dtype])


@pytest.mark.parametrize("function", [rotate, rotate_reference])
@pytest.mark.parametrize("lead", [(), (2, 1), (1, 3)])
def test_first_and_second_derivatives(function, lead):
    x = torch.randn(2, 3, 4, 10, dtype=torch.float64, requires_grad=True)
    phase = torch.randn(*lead, 4, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(function, (x, phase), check_forward_ad=True)
    assert gradgradcheck(function, (x, phase))


@pytest.mark.parametrize("back", [False, True])
def test_the_operator_of_the_compiled_path_keeps_torchs_rules(back):
    """Schema, fake tensor, autograd registration and dynamic shapes, as torch.library checks them; then derivatives."""
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    phase = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.rotary.turn.default, (x, phase, back))

    def turn(x, phase):
        return torch.ops.rotary.turn(x, phase, back)

    assert gradcheck(turn, (x, phase))
    assert gradgradcheck(turn, (x, phase))
    torch.testing.assert_close(turn(x, phase), rotate_reference(x, -phase if back else phase))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_operator_of_the_compiled_path_is_the_eager_one(dtype):
    x, phase = odd_offset((2, 3, 7, 8), dtype), angles((7, 4), dtype)
    results = []
    for function in (rotate, lambda x, phase: torch.ops.rotary.turn(x, phase, False)):
        own, angle = x.detach().requires_grad_(), phase.clone().requires_grad_()
        out = function(own, angle)
        results.append((out.detach(), *torch.autograd.grad(out, (own, angle), torch.ones_like(out))))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], **TOLERANCE[torch.float32])
    assert torch.equal(torch.ops.rotary.turn(x, unit(phase), False), results[0][0])


@pytest.mark.parametrize("shape", [(2, 3, 700, 128), (1, 1, 5000, 64), (3, 1, 2, 90000), (300000,)])
def test_the_operator_turns_large_half_tensors_slice_by_slice(shape):
    """Shapes on either side of a slice's size, split at any axis."""
    x = torch.randn(shape).bfloat16()
    phase = angles((*shape[-2:-1], shape[-1] // 2), torch.float32)
    assert torch.equal(torch.ops.rotary.turn(x, phase, False), rotate(x, phase))


def test_derivative_by_phase_is_the_quarter_turn():
    """d/dφ of (y₁, y₂) is (−y₂, y₁)."""
    x, phase = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    _, slope = torch.func.jvp(lambda p: rotate(x, p), (phase,), (torch.ones_like(phase),))
    y = rotate(x, phase)
    torch.testing.assert_close(slope, torch.stack((-y[:, 1], y[:, 0]), dim=-1))


def test_vmap_is_a_loop():
    x, phase = torch.randn(4, 3, 5, 8), torch.randn(4, 5, 4)
    together = torch.func.vmap(rotate)(x, phase)
    torch.testing.assert_close(together, torch.stack([rotate(a, b) for a, b in zip(x, phase, strict=True)]))


def test_what_rotate_refuses():
    x = torch.randn(2, 3, 5, 8)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match="angles need float32"):
            rotate(x, torch.zeros(5, 4, dtype=dtype))
    with pytest.raises(ValueError, match="5 pairs, x has only 8 channels"):
        rotate(x, torch.zeros(5, 5))
    for shape in ((6, 4), (2, 5, 4), (4, 3, 5, 4), (2, 2, 3, 5, 4)):
        with pytest.raises(ValueError, match="doesn't broadcast"):
            rotate(x, torch.zeros(shape))
    with pytest.raises(ValueError, match="doesn't broadcast"):  # it may not widen x either
        rotate(x[:1], torch.zeros(2, 1, 5, 4))


def test_module_turns_queries_and_keys_alike():
    layer = Rotary(Axial(100), head_dim=8)
    q, k, positions = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8), torch.randn(5, 2)
    turned = layer.rotate(q, k, positions=positions)
    for ours, x in zip(turned, (q, k), strict=True):
        torch.testing.assert_close(ours, rotate_reference(x, layer(positions)), rtol=1e-6, atol=1e-6)


def test_what_the_module_refuses():
    for arguments in (
        {"head_dim": 7},
        {"head_dim": 0},
        {"head_dim": 8, "fraction": 1.5},
        {"head_dim": 8, "fraction": 0},
    ):
        with pytest.raises(ValueError, match=f"head_dim={arguments['head_dim']}"):
            Rotary(Geometric(1e4), **arguments)
    with pytest.raises(ValueError, match="positions have 1 axes, the frequencies have 2"):
        Rotary(Axial(100), head_dim=8)(torch.zeros(3, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cuda_is_the_definition_too(dtype):
    phase = angles((7, 4), dtype).cuda()
    for memory in (contiguous, transposed, odd_offset):
        x = memory((2, 3, 7, 10), dtype).cuda()
        for function in (rotate, torch.compile(rotate)):
            torch.testing.assert_close(function(x, phase), rotate_reference(x, phase), **TOLERANCE[dtype])
