"""Lets torchvision, and so timm and Lightning, import beside a torch whose build its compiled operators don't match.

A CUDA build of torchvision next to a CPU build of torch fails at import with "operator torchvision::nms does not exist".
Import this module before them: where torchvision imports, nothing happens; upon that error alone, the operators its
import needs are declared, with a CPU `nms`. Transforms, models and `torchvision.ops.nms` then work (`ops.roi_align` too,
through torch.compile); other compiled operators and the image codecs don't. Delete this file once the package index
installs matching builds, that is, once `python -c "import torchvision"` succeeds wherever the tests run.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_ABSENT = "operator torchvision::nms does not exist"
_REMEDY = "install the torchvision build that matches this torch build (both CPU, or both the same CUDA version)"


def non_maximum_suppression(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy suppression in plain PyTorch, with the contract of `torchvision.ops.nms`.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: a box is dropped when it overlaps a better one by more than this.

    Returns:
        (K,) int64: the boxes kept, best first.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    candidates = scores.argsort(descending=True, stable=True)
    kept: list[Tensor] = []
    while len(candidates):
        best, candidates = candidates[0], candidates[1:]
        kept.append(best)
        corner = torch.maximum(boxes[best, :2], boxes[candidates, :2])
        opposite = torch.minimum(boxes[best, 2:], boxes[candidates, 2:])
        intersection = (opposite - corner).clamp(min=0).prod(-1)
        union = areas[best] + areas[candidates] - intersection
        candidates = candidates[~(intersection / union > iou_threshold)]  # two empty boxes give nan: both stay
    return torch.stack(kept) if kept else candidates


def _absent(*_: object) -> Tensor:
    raise NotImplementedError(f"this operator needs torchvision's compiled code: {_REMEDY}")


def _declare_operators() -> torch.library.Library:
    """Declare what `import torchvision` looks up; the declarations live as long as the returned object."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width,"
        " int sampling_ratio, bool aligned) -> Tensor"
    )
    library.impl("nms", non_maximum_suppression, "CPU")
    library.impl("qnms", _absent, "CPU")
    library.impl("roi_align", _absent, "CPU")
    return library


try:
    import torchvision
except ModuleNotFoundError:  # the rotary core and the language tasks do without torchvision
    pass
except RuntimeError as error:
    if _ABSENT not in str(error):
        raise
    for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[_name]  # what the failed import left behind would be bound to a dead package
    _operators = _declare_operators()
    import torchvision
    import torchvision.extension

    torchvision.extension._has_ops = lambda: True  # only now: during its import this would promise every operator
