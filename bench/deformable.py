"""Deformable attention, plain against mmcv's operator, and a step of DINO: `python -m bench.deformable --json PATH`.

"plain" is mmcv's PyTorch. The operator is `compiled` where mmcv's compiled code is installed, which is for CUDA alone; else
it is our `stand_in`, which computes the forward again in the backward pass. Forward and backward, 8 heads of 32 channels, 4
levels of strides 8 … 64, 4 points a level: the encoder's attention (as many queries as cells) and the decoder's (900 and 200
noised). On a CPU one thread. The losses of the first step of DINO are told too, to compare installations by.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import compat  # noqa: F401  isort: skip

import torch
from torch import Tensor

from bench.harness import Row, interleave, one_thread, parser, report, rows_of
from models.mmdet_bridge import MMDetDino, compiled_operators, deformable_attentions, register
from models.pyramids import SimplePyramid
from models.vit import mixed
from models.windowed_vit import WindowedViT

STRIDES, HEADS, WIDTH, POINTS = (8, 16, 32, 64), 8, 32, 4


class Objects(NamedTuple):
    """Boxes (n, 4) in pixels and labels (n,)."""

    boxes: Tensor
    labels: Tensor


def inputs(size: tuple[int, int], queries: int | None, batch: int, device: torch.device) -> list[Tensor]:
    """Value, shapes, locations and weights for images of `size`; as many queries as cells where None."""
    shapes = torch.tensor([[-(-side // stride) for side in size] for stride in STRIDES], device=device)
    cells = int(shapes.prod(1).sum())
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    places = (batch, cells if queries is None else queries, HEADS, len(STRIDES), POINTS)
    value, locations = draw(batch, cells, HEADS, WIDTH), draw(*places, 2).mul(0.3).add(0.5)
    weights = draw(*places).flatten(3).softmax(-1).view(places)
    return [value.requires_grad_(), shapes, locations.requires_grad_(), weights.requires_grad_()]


def step(attention: Callable[..., Tensor], given: list[Tensor]) -> None:
    value, _, locations, weights = given
    torch.autograd.grad(attention(*given).sum(), (value, locations, weights))
    if value.is_cuda:
        torch.cuda.synchronize()


def dino(device: torch.device) -> tuple[MMDetDino, Tensor, Tensor, list[Objects]]:
    """A small DINO on a small ViT, and two images of 128 pixels with two objects and none."""
    torch.manual_seed(0)
    trunk = WindowedViT(rotary=mixed, img_size=128, patch_size=8, embed_dim=96, depth=6, num_heads=3, window=8)
    model = MMDetDino(SimplePyramid(trunk, channels=96, strides=(8, 16, 32)), 80, queries=100).to(device)
    boxes = torch.tensor([[10.0, 20.0, 60.0, 90.0], [70.0, 30.0, 120.0, 64.0]], device=device)
    objects = [
        Objects(boxes[:count], torch.tensor([3, 40], dtype=torch.int64, device=device)[:count]) for count in (2, 0)
    ]
    return model, torch.randn(2, 3, 128, 128, device=device), torch.full((2, 2), 128, device=device), objects


def losses(model: MMDetDino, images: Tensor, sizes: Tensor, objects: list[Objects]) -> dict[str, float]:
    torch.manual_seed(1)
    told = model(images, sizes, objects)
    assert not isinstance(told, list)
    model.zero_grad()
    sum(told.values(), images.new_zeros(())).backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return {name: value.item() for name, value in told.items()}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--rounds", type=int, default=5, help="how often each is timed")
    given = arguments.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        one_thread()
    register()
    compiled = compiled_operators()
    attentions = deformable_attentions()
    operator = attentions.pop("operator")
    if gpu or not compiled:
        attentions["compiled" if compiled else "stand_in"] = operator
    rows: list[Row] = []
    batch = 2 if gpu else 1
    for size in ((800, 1333), (128, 128)):
        for name, queries in (("encoder", None), ("decoder", 1100 if size[0] > 128 else 300)):
            made = inputs(size, queries, batch, device)
            case = f"{name} {size[0]}x{size[1]} batch {batch} {device.type}"
            seconds = interleave(
                {kind: partial(step, call, made) for kind, call in attentions.items()}, rounds=given.rounds, least=0.0
            )
            rows += rows_of("deformable", case, seconds, "plain")
            if gpu:
                for kind, call in attentions.items():
                    torch.cuda.reset_peak_memory_stats()
                    step(call, made)
                    peak = torch.cuda.max_memory_allocated() / 2**20
                    rows.append(Row("deformable", case, kind, "peak", peak, "MiB"))
    step_of = dino(device)
    case, provider = f"dino 128x128 batch 2 {device.type}", "compiled" if compiled else "stand_in"
    rows += [
        Row("deformable", case, provider, name, value, "weighted loss") for name, value in losses(*step_of).items()
    ]
    rows += rows_of(
        "deformable", case, interleave({provider: partial(losses, *step_of)}, rounds=given.rounds, least=0.0)
    )
    report(rows, given.json)


if __name__ == "__main__":
    main()
