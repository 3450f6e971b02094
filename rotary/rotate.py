"""The group action: `rotate(x, phase)` turns each pair of channels (2t, 2t + 1) of `x` by its phase (arXiv 2104.09864).

A phase is an angle in radians (real) or the unit complex number e^{iφ} (complex), which is worth keeping when the same
phase turns many tensors. `rotate_reference` is the definition; `rotate` is the spelling that measured fastest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
_SLICE = 2**18  # channels: 1 MiB of float32


def unit(phase: Tensor) -> Tensor:
    """e^{iφ} of a real phase, (…, r) radians → (…, r) complex64 (complex128 for float64); a complex phase is returned.

    Under `torch.compile` radians stay radians: Inductor reuses the memory behind a complex view while it is still read.
    """
    if phase.is_complex() or torch.compiler.is_compiling():
        return phase
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
    since Inductor generates no complex code, and other devices fuse the definition into one kernel; a phase that is to be
    learned must then be given in radians.

    Args:
        x: (*b, h, n, d), any floating dtype, which is kept. Any axes may stand before the last, as long as the phase
            broadcasts to them: (b, n, 2, h, d) with a phase of (n, 1, 1, r) turns queries and keys in one call.
        phase: (*#b, #h, n, r) radians or unit complex numbers (`unit`), 2r ≤ d.

    Raises:
        ValueError: the phase has more pairs than x has, or doesn't broadcast to x.
        TypeError: the phase is in half precision, where angles lose their meaning (arXiv 2411.13476).
    """
    _check(x, phase)
    if not torch.compiler.is_compiling():
        return _whole(x, phase, _turn)
    if x.device.type != "cpu":
        return rotate_reference(x, phase)
    return _whole(x, phase, _forwards)


def _check(x: Tensor, phase: Tensor) -> None:
    if phase.dtype in _HALF:
        raise TypeError(f"rotate: phase is {phase.dtype}; angles need float32 or float64")
    lead, own = x.shape, phase.shape
    if 2 * own[-1] > lead[-1]:
        raise ValueError(f"rotate: phase has {own[-1]} pairs, x has only {lead[-1]} channels")
    if own[:-1] == lead[-len(own) : -1]:
        return
    fits = len(own) <= len(lead)
    if not fits or any(own[-axis] not in (1, lead[-axis]) for axis in range(2, len(own) + 1)):
        raise ValueError(f"rotate: phase of shape {tuple(own)} doesn't broadcast to x of shape {tuple(lead)}")


def _whole(x: Tensor, phase: Tensor, turn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    rotated = 2 * phase.shape[-1]
    if rotated == x.shape[-1]:
        return turn(x, phase)
    return torch.cat((turn(x[..., :rotated], phase), x[..., rotated:]), dim=-1)


def _complex(x: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    aligned = x.storage_offset() % 2 == 0
    if not (aligned and (x.is_contiguous() or _even(pairs.stride()))):
        pairs = pairs.clone(memory_format=torch.contiguous_format)  # contiguous() keeps an odd offset
    return torch.view_as_complex(pairs)


def _even(strides: tuple[int, ...]) -> bool:
    return strides[-1] == 1 and all(stride % 2 == 0 for stride in strides[:-1])


def _turn(x: Tensor, phase: Tensor) -> Tensor:
    phase = phase if phase.is_complex() else unit(phase)
    wide = x.float() if x.dtype in _HALF else x
    narrow = torch.complex128 if wide.dtype is torch.float64 else torch.complex64
    if phase.dtype is not narrow:
        phase = phase.to(narrow)
    turned = torch.view_as_real(_complex(wide) * phase).flatten(-2)
    return turned if wide is x else turned.to(x.dtype)


# Defined below `torch.library.custom_op`, whose wrappers cost as much as a small rotation.
_LIBRARY = torch.library.Library("rotary", "FRAGMENT")
_LIBRARY.define("turn(Tensor x, Tensor phase, bool back) -> Tensor")


@torch.library.impl(_LIBRARY, "turn", "CPU")
def _turn_operator(x: Tensor, phase: Tensor, back: bool) -> Tensor:
    phase = phase if phase.is_complex() else unit(phase)
    phase = phase.conj_physical() if back else phase  # AOTAutograd's runtime has lost a lazy conjugate here
    if x.dtype not in _HALF:
        return _turn(x, phase).contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _turn_slices(x, phase.to(torch.complex64).expand(*x.shape[:-1], -1), out)
    return out


def _turn_slices(x: Tensor, phase: Tensor, out: Tensor) -> None:
    """Half precision, by slices whose wide copy stays in cache: half the time of turning the whole at once."""
    if x.ndim > 1 and x.numel() > _SLICE:
        rows = _SLICE * len(x) // x.numel()  # of the first axis, that fit
        parts = (x.split(rows), phase.split(rows), out.split(rows)) if rows else (x, phase, out)
        for part in zip(*parts, strict=True):
            _turn_slices(*part)
        return
    wide = x.to(torch.float32, memory_format=torch.contiguous_format)  # this function's own, so turned in place
    _complex(wide).mul_(phase)
    out.copy_(wide)


@torch.library.register_fake("rotary::turn", lib=_LIBRARY)
def _(x: Tensor, phase: Tensor, back: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forwards(x: Tensor, phase: Tensor) -> Tensor:
    return torch.ops.rotary.turn(x, phase, False)


def _save(ctx, inputs, output) -> None:  # noqa: ANN001 - torch's own calling convention
    x, phase, ctx.back = inputs
    if ctx.needs_input_grad[1] and phase.is_complex():
        raise NotImplementedError(
            "rotate: under torch.compile a phase that needs a gradient must be radians, not units"
        )
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, phase)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # noqa: ANN001
    x, phase = ctx.saved_tensors
    to_x = torch.ops.rotary.turn(gradient, phase, not ctx.back) if ctx.needs_input_grad[0] else None
    to_phase = None
    if ctx.needs_input_grad[1]:
        sign = -1.0 if ctx.back else 1.0
        turned = rotate_reference(x.to(torch.promote_types(x.dtype, torch.float32)), sign * phase)
        across = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1)  # ∂ turned / ∂ φ, pair by pair
        slopes = (gradient.unflatten(-1, (-1, 2)).to(phase.dtype) * across.to(phase.dtype)).sum(-1)
        to_phase = sign * slopes.sum_to_size(phase.shape)
    return to_x, to_phase, None


torch.library.register_autograd("rotary::turn", _backward, setup_context=_save, lib=_LIBRARY)
