"""Linear attention with RoPE: a worked example, the recurrence against the definition, and what positions may change."""

import pytest
import torch

from rotary import Rotary, phase_of, rotate
from rotary.frequencies import Geometric
from rotary.linear_attention import linear_attention, positive, recurrent_linear_attention
from rotary.positions import sequence

B, H, N, D, V = 2, 3, 11, 8, 5


def inputs(dtype=torch.float64, n=N):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, B, H, n, D, generator=generator, dtype=dtype)
    return q, k, torch.randn(B, H, n, V, generator=generator, dtype=dtype)


def phase(n=N, offset=0, dtype=torch.float64):
    return Rotary(Geometric(100.0), head_dim=D)(sequence(n, offset).to(dtype))


def worked():
    q = torch.tensor([[1, 0], [0, 1], [-1, 0.5]], dtype=torch.float64)
    k = torch.tensor([[0.5, -0.5], [1, 1], [0, -1]], dtype=torch.float64)
    v = torch.tensor([[1.0], [2], [4]], dtype=torch.float64)
    turn = phase_of(sequence(3).double(), torch.ones(1, 1, 1, dtype=torch.float64))
    return q[None], k[None], v[None], turn


def test_worked_example():
    q, k, v, turn = worked()
    whole = linear_attention(q, k, v, turn, causal=False)
    assert whole.flatten().tolist() == pytest.approx([0.312652, 1.98077, 0.237665], abs=1e-5)
    past = [1.0, 1.31433, 0.237665]
    assert linear_attention(q, k, v, turn).flatten().tolist() == pytest.approx(past, abs=1e-5)
    assert recurrent_linear_attention(q, k, v, turn)[0].flatten().tolist() == pytest.approx(past, abs=1e-5)
    sums = linear_attention(q, k, torch.ones_like(v), turn).flatten().tolist()
    assert sums == pytest.approx([1, 0.625709, -0.23188], abs=1e-5)  # weights may be negative


def test_recurrent_equals_parallel_at_any_split():
    q, k, v = inputs()
    expected = linear_attention(q, k, v, phase())
    for sizes in ([N], [1] * N, [4, 0, 6, 1]):
        state, out = None, []
        pieces = (x.split(sizes, dim=-2) for x in (q, k, v, phase()))
        for part in zip(*pieces, strict=True):
            o, state = recurrent_linear_attention(*part, state)
            out.append(o)
        torch.testing.assert_close(torch.cat(out, dim=-2), expected, rtol=0, atol=1e-10)
        # the state is of one size, however much was read
        assert state.numerator.shape == (B, H, D, V)
        assert state.denominator.shape == (B, H, D)


def test_gradients_of_both_forms_agree():
    grads = []
    for form in (linear_attention, lambda *x: recurrent_linear_attention(*x)[0]):
        leaves = [x.requires_grad_() for x in inputs()]
        grads.append(torch.autograd.grad(form(*leaves, phase()).square().sum(), leaves))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


def test_without_rotation_weights_are_positive_and_sum_to_one():
    q, k, _ = inputs()
    still, ones = torch.zeros_like(phase()), torch.ones(B, H, N, 1, dtype=torch.float64)
    torch.testing.assert_close(linear_attention(q, k, ones, still), ones)
    torch.testing.assert_close(recurrent_linear_attention(q, k, ones, still)[0], ones)
    assert (linear_attention(q, k, torch.eye(N, dtype=torch.float64).expand(B, H, N, N), still) >= 0).all()


def test_positions_change_the_numerator_alone():
    q, k, v = inputs()
    numerators, denominators = [], []
    for turn in (phase(), 3 * phase()):
        state = recurrent_linear_attention(q, k, v, turn)[1]
        numerators.append(state.numerator)
        denominators.append(state.denominator)
    torch.testing.assert_close(denominators[0], positive(k).sum(-2))
    assert torch.equal(*denominators)
    assert not torch.allclose(*numerators)
    expected = rotate(positive(k), 3 * phase()).mT @ v
    torch.testing.assert_close(numerators[1], expected)


def test_positions_are_relative():
    q, k, v = inputs()
    torch.testing.assert_close(linear_attention(q, k, v, phase(offset=4096)), linear_attention(q, k, v, phase()))


def test_a_token_sees_none_that_follow():
    q, k, v = inputs()
    changed = [x.index_fill(-2, torch.tensor([7]), 9.0) for x in (q, k, v)]
    for form in (linear_attention, lambda *x: recurrent_linear_attention(*x)[0]):
        before, after = form(q, k, v, phase()), form(*changed, phase())
        assert torch.equal(before[..., :7, :], after[..., :7, :])
        assert not torch.isclose(before[..., 7:, :], after[..., 7:, :]).all(-1).any()


def test_half_precision_keeps_its_dtype_and_a_wide_state():
    q, k, v = (x.bfloat16() for x in inputs(torch.float32))
    out, state = recurrent_linear_attention(q, k, v, phase(dtype=torch.float32))
    assert out.dtype == torch.bfloat16
    assert state.numerator.dtype == state.denominator.dtype == torch.float32
    exact = linear_attention(q.double(), k.double(), v.double(), phase())
    # the state is float32, so only the result is rounded: half a unit in the eighth bit
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-3)
