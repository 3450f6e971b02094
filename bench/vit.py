"""Images a second of a ViT without rope, with axial and with mixed, timm's and ours: `python -m bench.vit --json PATH`.

All models of a case run in one process, in shuffled rounds, without gradients; eager and compiled side by side. On a CPU one
thread, float32 and bfloat16, compiled for the first case alone; on a GPU bfloat16, with larger batches, compiled
throughout. `ours` shares its weights with `timm`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import compat  # noqa: F401  isort: skip

import timm
import torch
from torch import Tensor, nn

import models.vit  # noqa: F401 - registers our models
from bench.harness import Row, interleave, one_thread, parser, report

PAIRS = {
    "none": ("ape_vit_small_patch16_224", "deit3_small_patch16_224"),
    "axial": ("rope_axial_vit_small_patch16_224", "vit_small_patch16_rope_224"),
    "mixed": ("rope_mixed_vit_small_patch16_224", "vit_small_patch16_rope_mixed_224"),
}


def models_of(size: int, depth: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """provider → model, evaluating; rope models of a kind share their weights."""
    made: dict[str, nn.Module] = {}
    for kind, (ours, theirs) in PAIRS.items():
        own = timm.create_model(ours, img_size=size, depth=depth)
        other = timm.create_model(theirs, img_size=size, depth=depth)
        if kind != "none":
            other.load_state_dict(own.state_dict())
        made[f"ours_{kind}"], made[f"timm_{kind}"] = own, other
    return {name: model.to(device, dtype).eval() for name, model in made.items()}


def call(model: Callable[[Tensor], Tensor], images: Tensor) -> None:
    with torch.inference_mode():
        model(images)
    if images.is_cuda:
        torch.cuda.synchronize()


def measure(size: int, batch: int, depth: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> list[Row]:
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    providers: dict[str, Callable[[], object]] = {}
    for name, model in models_of(size, depth, device, dtype).items():
        providers[name] = partial(call, model, images)
        if compiled:
            providers[f"{name}_compiled"] = partial(call, torch.compile(model, fullgraph=True), images)
    seconds = interleave(providers, rounds=9, least=0.0)
    case = f"small depth {depth} {size}px batch {batch} {device.type} {str(dtype).removeprefix('torch.')}"
    rows = []
    for name, times in seconds.items():
        rows.append(Row("vit", case, name, "images_per_s", batch / statistics.median(times), "images/s"))
        if name.startswith("ours"):
            peer = seconds[name.replace("ours", "timm")]
            ratio = statistics.median(theirs / own for own, theirs in zip(times, peer, strict=True))
            rows.append(Row("vit", case, name, "x_timm", ratio, "ratio"))
    return rows


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--depth", type=int, default=12, help="blocks; fewer are quicker and tell the same")
    arguments.add_argument("--eager", action="store_true", help="leave out the compiled models")
    given = arguments.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu:
        one_thread()
    device = torch.device("cuda" if gpu else "cpu")
    cases = [(224, 256), (512, 48)] if gpu else [(224, 4), (384, 1)]
    rows: list[Row] = []
    for size, batch in cases:
        for dtype in (torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16):
            compiled = not given.eager and (gpu or (size == 224 and dtype == torch.float32))
            rows += measure(size, batch, given.depth, device, dtype, compiled)
            torch.compiler.reset()
    report(rows, given.json)


if __name__ == "__main__":
    main()
