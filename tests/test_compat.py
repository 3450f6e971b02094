"""compat: torchvision and timm import after it, whatever the builds, and its suppression is the greedy one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compat

ROOT = Path(compat.__file__).parent


def brute_force(boxes: list[list[float]], scores: list[float], threshold: float) -> list[int]:
    def overlap(a: list[float], b: list[float]) -> float:
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
        return width * height / (area_a + area_b - width * height)

    kept: list[int] = []
    for index in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(overlap(boxes[index], boxes[other]) <= threshold for other in kept):
            kept.append(index)
    return kept


def random_boxes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    size = 0.05 + 0.3 * torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return torch.cat((corner, corner + size), dim=-1), torch.rand(count, generator=generator, dtype=torch.float64)


def test_a_fresh_process_imports_torchvision_and_timm() -> None:
    script = (
        "import compat, torch, torchvision, timm\n"
        "boxes = torch.tensor([[0., 0., 2., 2.], [0., 0., 2., 1.9], [5., 5., 6., 6.]])\n"
        "print(torchvision.ops.nms(boxes, torch.tensor([.5, .9, .1]), 0.5).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "[1, 2]"


@pytest.mark.parametrize("count", [0, 1, 7, 120])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_suppression_equals_brute_force(count: int, threshold: float) -> None:
    from torchvision.ops import nms

    boxes, scores = random_boxes(count)
    expected = brute_force(boxes.tolist(), scores.tolist(), threshold)
    assert compat.non_maximum_suppression(boxes, scores, threshold).tolist() == expected
    assert nms(boxes, scores, threshold).tolist() == expected


def test_an_operator_that_is_not_there_names_the_remedy() -> None:
    if not hasattr(compat, "_operators"):
        pytest.skip("torchvision's own operators are there")
    with pytest.raises(NotImplementedError, match="matches this torch build"):
        torch.ops.torchvision.roi_align(torch.rand(1, 1, 4, 4), torch.zeros(1, 5), 1.0, 2, 2, 2, True)
