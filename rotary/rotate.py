"""The group action: `rotate(x, phase)` turns each pair of channels (2t, 2t + 1) of `x` by its phase (arXiv 2104.09864).

A phase is an angle in radians (real) or the unit complex number e^{iφ} (complex), which is worth keeping when the same
phase turns many tensors. `rotate_reference` is the definition; `rotate` is the spelling that measured fastest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def unit(phase: Tensor) -> Tensor:
    """e^{iφ} of a real phase, (…, r) radians → (…, r) complex64 (complex128 for float64); a complex phase is returned."""
    if phase.is_complex():
        return phase
    if torch.compiler.is_compiling():
        return torch.view_as_complex(torch.stack((phase.cos(), phase.sin()), dim=-1))
    return torch.polar(torch.ones_like(phase), phase)


def cosine_sine(phase: Tensor) -> tuple[Tensor, Tensor]:
    """(cos φ, sin φ) of a phase given as radians or as unit complex numbers."""
    if phase.is_complex():
        cosine, sine = torch.view_as_real(phase).unbind(-1)
        return cosine, sine
    return phase.cos(), phase.sin()


def rotate_reference(x: Tensor, phase: Tensor) -> Tensor:
    """The definition, in real arithmetic at float32 or better.

    (x₀, x₁) → (x₀ cos φ − x₁ sin φ, x₀ sin φ + x₁ cos φ) on the pairs (2t, 2t + 1), t < r; the last d − 2r channels pass.

    Args:
        x: (*b, h, n, d), any floating dtype, which is kept.
        phase: (*#b, #h, n, r) radians or unit complex numbers, 2r ≤ d, broadcast to x.
    """
    _check(x, phase)
    cosine, sine = cosine_sine(phase)
    turned, passed = x.split((2 * phase.shape[-1], x.shape[-1] - 2 * phase.shape[-1]), dim=-1)
    first, second = turned.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return torch.cat((pairs.flatten(-2).to(x.dtype), passed), dim=-1)


def rotate(x: Tensor, phase: Tensor) -> Tensor:
    """Turn the channel pairs of x by phase: the same values and gradients as `rotate_reference`.

    In eager mode a pair is one complex number, so the turn is one product that reads and writes x once; half precision
    is widened for that product and narrowed once. Under `torch.compile` the CPU keeps this product behind one operator,
    since Inductor generates no complex code, and other devices fuse the definition into one kernel.

    Args:
        x: (*b, h, n, d), any floating dtype, which is kept. Any axes may stand before the last, as long as the phase
            broadcasts to them: (b, n, 2, h, d) with a phase of (n, 1, 1, r) turns queries and keys in one call.
        phase: (*#b, #h, n, r) radians or unit complex numbers (`unit`), 2r ≤ d.

    Raises:
        ValueError: the phase has more pairs than x has, or doesn't broadcast to x.
        TypeError: the phase is in half precision, where angles lose their meaning (arXiv 2411.13476).
    """
    if torch.compiler.is_compiling():
        if x.device.type != "cpu":
            return rotate_reference(x, phase)
        _check(x, phase)
        return _whole(x, phase, torch.ops.rotary.turn)
    _check(x, phase)
    return _whole(x, phase, _turn)


def _check(x: Tensor, phase: Tensor) -> None:
    if phase.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(f"rotate: phase is {phase.dtype}; angles need float32 or float64")
    if 2 * phase.shape[-1] > x.shape[-1]:
        raise ValueError(f"rotate: phase has {phase.shape[-1]} pairs, x has only {x.shape[-1]} channels")
    lead, own = x.shape[:-1], phase.shape[:-1]
    if len(own) > len(lead) or any(a != 1 and a != b for a, b in zip(reversed(own), reversed(lead), strict=False)):
        raise ValueError(
            f"rotate: phase of shape {tuple(phase.shape)} doesn't broadcast to x of shape {tuple(x.shape)}"
        )


def _whole(x: Tensor, phase: Tensor, turn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    rotated = 2 * phase.shape[-1]
    phase = unit(phase)
    if rotated == x.shape[-1]:
        return turn(x, phase)
    return torch.cat((turn(x[..., :rotated], phase), x[..., rotated:]), dim=-1)


def _complex(x: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    if pairs.stride(-1) != 1 or any(stride % 2 for stride in pairs.stride()[:-1]) or x.storage_offset() % 2:
        pairs = pairs.contiguous()
    return torch.view_as_complex(pairs)


def _turn(x: Tensor, phase: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    phase = phase.to(torch.complex128 if wide.dtype == torch.float64 else torch.complex64)
    return torch.view_as_real(_complex(wide) * phase).flatten(-2).to(x.dtype)


@torch.library.custom_op("rotary::turn", mutates_args=(), device_types="cpu")
def _turn_operator(x: Tensor, phase: Tensor) -> Tensor:
    return _turn(x, phase).contiguous()


@_turn_operator.register_fake
def _(x: Tensor, phase: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:  # noqa: ANN001 - torch's own calling convention
    x, phase = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, phase)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # noqa: ANN001
    x, phase = ctx.saved_tensors
    to_x = torch.ops.rotary.turn(gradient, phase.conj().resolve_conj()) if ctx.needs_input_grad[0] else None
    to_phase = None
    if ctx.needs_input_grad[1]:
        wide = torch.promote_types(x.dtype, torch.float32)
        product = _complex(gradient.to(wide)) * _complex(x.to(wide)).conj()
        to_phase = product.sum_to_size(phase.shape).to(phase.dtype)
    return to_x, to_phase


_turn_operator.register_autograd(_backward, setup_context=_save)
