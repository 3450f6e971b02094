"""What a rotation costs beside a copy, and beside other libraries: `python -m bench.rotary --json PATH`. One thread.

Each provider turns one tensor (b, h, n, d) by angles of its positions. Tables that a library keeps between calls (sines and
cosines, unit numbers) are made outside the timing; `ours_phase` starts from radians and `rotary_embedding_torch` takes sines
of the angles it caches, as that library does. transformers turns q and k in one call, so its time is halved. The floor
`copy` is one clone, and in `both` (forward and backward) one clone each way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import compat  # noqa: F401 - lets timm import torchvision beside a CPU torch
from bench.harness import Row, interleave, one_thread, parser, report, rows_of
from rotary import phase_of, rotate, rotate_reference, unit
from rotary.frequencies import Geometric
from rotary.positions import sequence


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    compiled: bool = False
    """Whether the compiled providers run too."""

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}".replace(" ", "", 3)


CASES = (
    Case((1, 16, 2048, 128), compiled=True),
    Case((1, 16, 2048, 128), torch.bfloat16, compiled=True),
    Case((8, 6, 197, 64)),
    Case((1, 32, 1, 128)),
    Case((2, 12, 577, 64)),
    Case((1, 8, 8192, 64)),
)
HALVED = ("transformers", "transformers_compiled")  # they turn two tensors a call


def providers(case: Case) -> dict[str, Callable[[Tensor], Tensor | tuple[Tensor, ...]]]:
    """name → the rotation of one tensor (of two for those in HALVED)."""
    from rotary_embedding_torch import RotaryEmbedding
    from timm.layers.pos_embed_sincos import apply_rot_embed_cat
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    width, length = case.shape[-1], case.shape[-2]
    offset = 1000 if length == 1 else 0  # decoding: one token behind a cache
    phase = phase_of(sequence(length, offset), Geometric(1e4)(width // 2, 1))[0]  # (n, r)
    turn = unit(phase)
    halves = torch.cat((phase, phase), dim=-1)
    cosine, sine = (table.to(case.dtype)[None] for table in (halves.cos(), halves.sin()))
    twice = phase.repeat_interleave(2, dim=-1)
    concatenated = torch.cat((twice.sin(), twice.cos()), dim=-1).to(case.dtype)
    embedding = RotaryEmbedding(width, theta=1e4, cache_if_possible=True)

    def ours(x: Tensor) -> Tensor:
        return rotate(x, turn)

    def transformers(x: Tensor) -> tuple[Tensor, ...]:
        return apply_rotary_pos_emb(x, x, cosine, sine)

    def complex_product(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)

    eager: dict[str, Callable[[Tensor], Tensor | tuple[Tensor, ...]]] = {
        "copy": torch.clone,
        "ours": ours,
        "ours_phase": lambda x: rotate(x, phase),
        "ours_reference": lambda x: rotate_reference(x, turn),
        "complex": complex_product,
        "transformers": transformers,
        "timm": lambda x: apply_rot_embed_cat(x, concatenated),
        "rotary_embedding_torch": lambda x: embedding.rotate_queries_or_keys(x, offset=offset),
    }
    if case.compiled:
        eager["copy_compiled"] = torch.compile(torch.clone)
        eager["ours_compiled"] = torch.compile(ours)
        eager["transformers_compiled"] = torch.compile(transformers)
    return eager


def forward_calls(case: Case) -> dict[str, Callable[[], object]]:
    """To be timed under no_grad."""
    x = torch.randn(case.shape, dtype=case.dtype)
    return {name: partial(function, x) for name, function in providers(case).items()}


def both_calls(case: Case) -> dict[str, Callable[[], object]]:
    x = torch.randn(case.shape, dtype=case.dtype, requires_grad=True)
    plain, gradient = x.detach(), torch.randn(case.shape, dtype=case.dtype)

    def copies(clone: Callable[[Tensor], object]) -> object:
        return clone(plain), clone(gradient)  # the gradient of a clone is no copy, so the floor makes one

    def differentiate(function: Callable[[Tensor], Tensor | tuple[Tensor, ...]]) -> object:
        out = function(x)
        outs = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(outs, x, (gradient,) * len(outs))

    return {
        name: partial(copies if name.startswith("copy") else differentiate, function)
        for name, function in providers(case).items()
    }


def measure(rounds: int) -> list[Row]:
    rows = []
    for case in CASES:
        for passes, make in (("forward", forward_calls), ("both", both_calls)):
            with torch.set_grad_enabled(passes == "both"):
                seconds = interleave(make(case), rounds=rounds)
            for name in HALVED:
                if name in seconds:
                    seconds[name] = [s / 2 for s in seconds[name]]
            rows += rows_of("rotary", f"{case} {passes}", seconds, floor="copy")
    return rows


def main() -> None:
    arguments = parser("Rotation beside a copy and other libraries.")
    arguments.add_argument("--rounds", type=int, default=21)
    options = arguments.parse_args()
    one_thread()
    torch.manual_seed(0)
    report(measure(options.rounds), options.json)


if __name__ == "__main__":
    main()
