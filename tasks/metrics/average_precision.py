"""COCO's average precision of boxes (arXiv 1405.0312), over all processes, with faster-coco-eval as the judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.batches import Boxes
from models.dense import Detections

try:
    from faster_coco_eval import COCO, COCOeval_faster
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"COCO's average precision needs {missing.name}: pip install -c constraints.txt -e '.[coco]'", name=missing.name
    ) from missing

FOUND = 7  # columns: image, label, x, y, width, height, score
TRUE = 8  # columns: image, label, x, y, width, height, area, crowd
AREAS = ("all", "small", "medium", "large")  # as COCOeval orders them; small is below 32², large above 96² pixels


class AveragePrecision(Metric):
    """Accumulates images; sharding and order don't change the result.

    `compute` returns float64 scalars: `ap`, the mean over ten thresholds of IoU (0.5 … 0.95) and the classes; `ap50` and
    `ap75`; `ap_small`, `ap_medium` and `ap_large` by area; and `ar_100`, the recall with 100 detections an image and class.
    What there was nothing to find for is NaN, and in no mean. `by_class` then tells the classes apart.

    torchmetrics' own MeanAveragePrecision over the same library rounds thresholds and results to float32, takes an area
    of 0 as none given, and waits forever where processes saw unequal numbers of images; hence the rows of float64 here.

    Args:
        num_classes: labels are 0 … num_classes − 1.
        kwargs: of torchmetrics.Metric.

    Attributes:
        class_precisions: `ap` of each class as the last `compute` saw it, in label order; empty before, and not reset.

    Raises:
        ValueError: num_classes is not at least 1.
    """

    higher_is_better = True
    full_state_update = False
    images: list[Tensor]
    found: list[Tensor]
    truths: list[Tensor]

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: needs at least 1")
        self.num_classes = num_classes
        self.class_precisions: list[float] = []
        # The lists are flat and the metric float64, for such is what torchmetrics gathers from a process without data.
        for name in ("images", "found", "truths"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.set_dtype(torch.float64)

    @torch.no_grad()
    def update(self, found: Detections, truth: Boxes) -> None:
        """Adds one image, with what was found in it and what is there, both in pixels of its file.

        Raises:
            ValueError: what was found has unequal numbers of boxes, scores and labels.
        """
        if not len(found.boxes) == len(found.scores) == len(found.labels):
            counts = ", ".join(str(len(each)) for each in found)
            raise ValueError(f"image {truth.image_id}: found {counts} boxes, scores and labels; give one each")
        self.images.append(torch.tensor([truth.image_id], dtype=torch.float64, device=self.device))
        self.found.append(self._rows(truth.image_id, found.labels, found.boxes, found.scores))
        self.truths.append(self._rows(truth.image_id, truth.labels, truth.boxes, truth.areas, truth.crowd))

    def _rows(self, image_id: int, labels: Tensor, boxes: Tensor, *columns: Tensor) -> Tensor:
        labels, boxes, *columns = (each.to(self.device, torch.float64) for each in (labels, boxes, *columns))  # type: ignore[assignment]
        images = torch.full_like(labels, image_id)
        extents = boxes[:, 2:] - boxes[:, :2]
        return torch.cat(
            (images[:, None], labels[:, None], boxes[:, :2], extents, *(c[:, None] for c in columns)), 1
        ).flatten()

    def compute(self) -> dict[str, Tensor]:
        """The scores so far; see the class.

        Raises:
            ValueError: an image was added twice, a label is no class, or a detection isn't finite.
        """
        images, found, truths = self._table("images", 1), self._table("found", FOUND), self._table("truths", TRUE)
        ids, counts = np.unique(images.astype(np.int64), return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"image {ids[counts > 1][0]} was added {counts.max()} times; evaluate each image once")
        for rows in (found, truths):
            wrong = ~np.isfinite(rows).all(1) | (rows[:, 1] < 0) | (rows[:, 1] >= self.num_classes)
            if wrong.any():
                row = rows[wrong][0]
                raise ValueError(
                    f"image {row[0]:.0f}: label {row[1]:g} with box (x, y, width, height) {row[2:6].tolist()} and "
                    f"{row[6]:g}; labels are 0 … {self.num_classes - 1}, and all is finite"
                )
        precisions, recalls = self._judge(ids, found, truths)
        every, fifty, seventy_five = slice(None), 0, 5  # indices of thresholds
        scores = {
            "ap": precisions[every, ..., 0],
            "ap50": precisions[fifty, ..., 0],
            "ap75": precisions[seventy_five, ..., 0],
            **{f"ap_{name}": precisions[..., index] for index, name in enumerate(AREAS) if index},
            "ar_100": recalls[..., 0],
        }
        self.class_precisions = [_mean(precisions[:, :, label, 0]) for label in range(self.num_classes)]
        return {name: torch.tensor(_mean(values), dtype=torch.float64) for name, values in scores.items()}

    def by_class(self, names: Sequence[str]) -> dict[str, float]:
        """`class_precisions` by name.

        Args:
            names: of the classes, in label order.

        Raises:
            RuntimeError: before the first `compute`.
            ValueError: the names aren't one a class.
        """
        if not self.class_precisions:
            raise RuntimeError("call compute() before by_class()")
        if len(names) != self.num_classes:
            raise ValueError(f"{len(names)} names for num_classes={self.num_classes}")
        return dict(zip(names, self.class_precisions, strict=True))

    def _table(self, name: str, columns: int) -> np.ndarray:
        state = getattr(self, name)  # a list; gathered from several processes, a tensor
        flat = torch.cat(state) if isinstance(state, list) and state else torch.as_tensor(state)
        return flat.detach().cpu().numpy().astype(np.float64).reshape(-1, columns)

    def _judge(self, ids: np.ndarray, found: np.ndarray, truths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Precisions (thresholds, recalls, classes, areas) and recalls (thresholds, classes, areas); −1 is nothing there."""
        if not len(truths):
            return np.full((10, 101, self.num_classes, len(AREAS)), -1.0), np.full(
                (10, self.num_classes, len(AREAS)), -1.0
            )
        common = {
            "images": [{"id": int(each)} for each in ids],
            "categories": [{"id": i} for i in range(self.num_classes)],
        }
        sides = []
        for rows, names in ((truths, ("area", "iscrowd")), (found, ("score",))):
            side = COCO()
            side.dataset = common | {"annotations": _annotations(rows, names)}
            side.createIndex()
            sides.append(side)
        judge = COCOeval_faster(*sides, iouType="bbox")
        judge.evaluate()
        judge.accumulate()
        return judge.eval["precision"][..., -1], judge.eval["recall"][..., -1]  # with at most 100 detections


def _annotations(rows: np.ndarray, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """COCO's annotations of rows with image, label, box and what `names` call; ids count from 1, as 0 means unmatched."""
    annotations = []
    for number, (image, label, x, y, width, height, *others) in enumerate(rows.tolist(), 1):
        annotation = {"id": number, "image_id": int(image), "category_id": int(label), "bbox": [x, y, width, height]}
        annotations.append({"area": width * height, "iscrowd": 0} | annotation | dict(zip(names, others, strict=True)))
    return annotations


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")
