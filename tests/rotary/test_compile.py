"""torch.compile: one graph, no break, no new graph for new lengths, and the eager values and gradients."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from rotary import Rotary, rotate, unit
from rotary.frequencies import Axial, Geometric, Mixed
from rotary.scaling import DynamicNTK, LongRoPE, YaRN

LENGTHS = (5, 9, 16, 33)
LAYERS = {
    "sequence": lambda: Rotary(Geometric(1e4), head_dim=16, heads=2),
    "partial": lambda: Rotary(Geometric(1e4), head_dim=16, heads=2, fraction=0.5),
    "axial yarn": lambda: Rotary(Axial(100), YaRN(4, 14), head_dim=16, heads=2),
    "mixed": lambda: Rotary(Mixed(10), head_dim=16, heads=2, learnable=True),
    "dynamic": lambda: Rotary(Geometric(1e4), DynamicNTK(2, 10), head_dim=16, heads=2),
    "learned dynamic": lambda: Rotary(Mixed(10), DynamicNTK(2, 10), head_dim=16, heads=2, learnable=True),
    "longrope": lambda: Rotary(Geometric(1e4), LongRoPE((1.0,) * 8, (4.0,) * 8, 10, 4), head_dim=16, heads=2),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(function, layer, x, positions):
    x = x.clone().requires_grad_()
    out = function(x, positions)
    wanted = [x, *layer.parameters()]
    return [out, *torch.autograd.grad((out * torch.arange(out.numel()).view_as(out).cos()).sum(), wanted)]


def follow(name, backend, dtype=torch.float32):
    """One graph serves all lengths; values and gradients are eager's."""
    layer = LAYERS[name]()
    counter = CompileCounterWithBackend(backend)

    def turn(x, positions):
        return rotate(x, layer(positions))

    compiled = torch.compile(turn, backend=counter, fullgraph=True, dynamic=True)
    for length in LENGTHS:
        x = torch.randn(2, 2, length, 16).to(dtype)
        positions = torch.randint(0, 50, (length, layer.axes)) + torch.arange(length)[:, None]
        for ours, eager in zip(
            gradients(compiled, layer, x, positions), gradients(turn, layer, x, positions), strict=True
        ):
            # compiled cosines differ in the last place; a learned F sums them times positions up to 80
            scale = 1 + eager.abs().max().item()
            rounding = 1e-6 if dtype == torch.float32 else 2**-8
            torch.testing.assert_close(ours, eager, rtol=0, atol=4 * rounding * scale)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", LAYERS)
def test_one_graph_for_all_lengths(name):
    """Traced with the autograd of the compiled path, but run without generated code: seconds, not minutes."""
    follow(name, "aot_eager")


def test_lengths_become_dynamic_by_themselves():
    """Without `dynamic=True`, torch compiles twice: for the first length, then for all others."""
    layer = LAYERS["dynamic"]()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, p: rotate(x, layer(p)), backend=counter, fullgraph=True)
    for length in LENGTHS:
        x, positions = torch.randn(2, 2, length, 16), torch.arange(length)[:, None]
        torch.testing.assert_close(compiled(x, positions), rotate(x, layer(positions)))
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_the_length_is_a_tensor_in_the_graph(name):
    """Crossing the original length changes the phases of one and the same graph."""
    layer = LAYERS[name]()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    positions = torch.arange(8)[:, None]
    phases = []
    for length in (8, 10, 11, 500):
        phases.append(compiled(positions, torch.tensor(length)))
        torch.testing.assert_close(phases[-1], layer(positions, length), rtol=0, atol=1e-6)
    assert counter.frame_count == 1
    assert torch.equal(phases[0], phases[1])
    assert not torch.allclose(phases[1], phases[3])


def test_phase_travels_as_radians_or_as_unit_numbers():
    x, phase = torch.randn(2, 3, 7, 10), torch.randn(7, 4)
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)
    for turn in (phase, unit(phase)):
        torch.testing.assert_close(compiled(x, turn), rotate(x, turn))


def test_learned_unit_numbers_are_refused_not_miscompiled():
    turn = unit(torch.randn(7, 4)).requires_grad_()
    x = torch.randn(2, 3, 7, 8)
    with pytest.raises(NotImplementedError, match="must be radians"):
        torch.ops.rotary.turn(x, turn, False)
    with pytest.raises(Exception, match="must be radians"):  # dynamo wraps it in a type of its own
        torch.compile(rotate, backend="aot_eager", fullgraph=True)(x, turn)


def test_compiled_errors_are_the_eager_ones():
    compiled = torch.compile(rotate, backend="aot_eager")
    with pytest.raises(TypeError, match="angles need float32"):
        compiled(torch.zeros(2, 3, 8), torch.zeros(3, 4, dtype=torch.float16))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_generated_code(name):
    follow(name, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generated_code_in_half_precision(dtype):
    follow("sequence", "inductor", dtype)
