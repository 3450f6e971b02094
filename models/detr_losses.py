"""What a detection transformer learns from: one-to-one matching (arXiv 2005.12872) and losses, varifocal for the classes
(arXiv 2008.13367). All boxes here are (…, 4) centre x, centre y, width, height as parts of their image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss

try:
    from scipy.optimize import linear_sum_assignment
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"detection transformers need {missing.name}: pip install -c constraints.txt -e '.[coco]'", name=missing.name
    ) from missing


class MatchCosts(NamedTuple):
    """How much a term counts when objects are given to queries."""

    focal: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


class LossWeights(NamedTuple):
    """How much a term counts in the sum that is minimised; `denoising` multiplies the other three."""

    classes: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    denoising: float = 1.0


class Objects(NamedTuple):
    """Objects of an image: boxes (n, 4), labels (n,) int64."""

    boxes: Tensor
    labels: Tensor


class Matches(NamedTuple):
    """Which prediction answers for which object: four (m,) int64; `target` counts through the objects of the batch."""

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor


class Terms(NamedTuple):
    """Scalars, each summed over layers and divided by the number of objects; not weighted yet."""

    classes: Tensor
    l1: Tensor
    giou: Tensor


def to_corners(boxes: Tensor) -> Tensor:
    """(…, 4) centre x, centre y, width, height → left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def to_centres(boxes: Tensor) -> Tensor:
    """(…, 4) left, top, right, bottom → centre x, centre y, width, height."""
    start, end = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((start + end) / 2, end - start), dim=-1)


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv 1902.09630) of boxes (…, 4) that broadcast; two empty boxes overlap by 0."""
    smallest = torch.finfo(a.dtype).tiny
    a, b = to_corners(a), to_corners(b)
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared
    around = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    iou = shared / union.clamp(min=smallest)
    return iou, iou - (around - union) / around.clamp(min=smallest)


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    objects: Sequence[Objects],
    costs: MatchCosts,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Matches:
    """Gives every object of an image a query of its own, in each layer for itself, at the least cost.

    Args:
        logits: (l, b, q, classes) float32.
        boxes: (l, b, q, 4) float32.
        objects: b of them; where there are more than q, the cheapest q are answered for.
        costs: weights of the terms.
        alpha, gamma: of the focal cost (arXiv 1708.02002).
    """
    layers, _, queries, _ = logits.shape
    tables = []
    for image, (wanted, labels) in enumerate(objects):
        chance = logits[:, image, :, labels].sigmoid()  # (l, q, n)
        hit = alpha * (1 - chance) ** gamma * -(chance + 1e-8).log()
        miss = (1 - alpha) * chance**gamma * -(1 - chance + 1e-8).log()
        found = boxes[:, image, :, None]
        distance = (found - wanted).abs().sum(-1)
        tables.append(costs.focal * (hit - miss) + costs.l1 * distance - costs.giou * overlap(found, wanted)[1])
    # A prediction that isn't finite goes to no object that can have another; and one copy brings all tables to the host.
    flat = torch.cat([table.flatten() for table in tables]).nan_to_num(nan=1e9, posinf=1e9, neginf=1e9).cpu()
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    first = 0
    for image, table in enumerate(flat.split([table.numel() for table in tables])):
        n = len(objects[image].labels)
        for layer, cost in enumerate(table.view(layers, queries, n)):
            query, target = (torch.from_numpy(index) for index in linear_sum_assignment(cost.numpy()))
            parts.append((torch.full_like(query, layer), torch.full_like(query, image), query, target + first))
        first += n
    return Matches(*(torch.cat(part).to(logits.device) for part in zip(*parts, strict=True)))


def match_noised(places: Sequence[Tensor], groups: int, objects: Sequence[Objects], layers: int) -> Matches:
    """Matches of noised objects, whose answers are known: the same in all layers.

    Args:
        places: b of (groups · n,) int64, the queries that were made of an image's n objects, group by group.
        groups: how often each object was noised.
        objects: b of them.
        layers: of the predictions.
    """
    device = places[0].device
    counts = [len(labels) for _, labels in objects]
    image = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device) * groups)
    numbers = torch.arange(sum(counts), device=device).split(counts)
    target = torch.cat([number.repeat(groups) for number in numbers])
    query = torch.cat(list(places))
    layer = torch.arange(layers, device=device).repeat_interleave(len(query))
    return Matches(layer, image.repeat(layers), query.repeat(layers), target.repeat(layers))


def terms(
    logits: Tensor,
    boxes: Tensor,
    matches: Matches,
    objects: Sequence[Objects],
    count: Tensor,
    matchability: float | None = None,
) -> Terms:
    """Losses of predictions: of the classes over all of them, L1 and 1 − GIoU over those that answer for an object.

    The classes' loss is varifocal, so a prediction that answers for an object learns the IoU that it has, the more the
    higher that is; or matchability-aware (arXiv 2412.04234), where a bad box too is told what it should have found.

    Args:
        logits: (l, b, q, classes) float32.
        boxes: (l, b, q, 4) float32.
        matches: which of them answer for which object.
        objects: b of them.
        count: what the sums are divided by, scalar.
        matchability: gamma of the matchability-aware loss, 1.5 in its paper; None for varifocal.
    """
    layer, image, query, target = matches
    wanted = torch.cat([boxes for boxes, _ in objects])[target]
    label = torch.cat([labels for _, labels in objects])[target]
    found = boxes[layer, image, query]
    iou, giou = overlap(found, wanted)
    chance, quality = logits.detach().sigmoid(), torch.zeros_like(logits)
    if matchability is None:
        quality[layer, image, query, label] = iou.detach()
        weight = 0.75 * chance**2
        weight[layer, image, query, label] = iou.detach()
    else:
        quality[layer, image, query, label] = iou.detach() ** matchability
        weight = chance**matchability
        weight[layer, image, query, label] = 1.0
    classes = binary_cross_entropy_with_logits(logits, quality, weight, reduction="sum")
    return Terms(classes / count, l1_loss(found, wanted, reduction="sum") / count, (1 - giou).sum() / count)


def mean_count(objects: Sequence[Objects], device: torch.device) -> Tensor:
    """Objects of the batch, the mean over processes and at least 1: scalar float32. All processes have to call it."""
    count = torch.tensor(float(sum(len(labels) for _, labels in objects)), device=device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(count)
        count /= distributed.get_world_size()
    return count.clamp(min=1)
