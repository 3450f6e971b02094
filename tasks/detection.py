"""Object detection: the model brings its losses and its detections, this task the training and COCO's average precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.batches import DetectionBatch
from models.dense import Detections
from tasks.base import Task
from tasks.metrics.average_precision import AveragePrecision


def in_file_pixels(boxes: Tensor, size: Tensor, original: tuple[int, int]) -> Tensor:
    """Boxes (n, 4) of an image that has `size` (2,), height and width, in the pixels of its file, `original`; float64."""
    height, width = (have / float(now) for have, now in zip(original, size, strict=True))
    return boxes.double() * boxes.new_tensor([width, height, width, height], dtype=torch.float64)


class Detection(Task[DetectionBatch]):
    """Trains a detector.

    Args:
        model: images (b, 3, h, w), sizes (b, 2) and targets → its losses; without targets → detections.
        num_classes: of the data; must be what the model answers with.
        others: of `Task`.

    Attributes:
        last_detections: of the batch measured last, in pixels of its images.
        class_scores: AP of every class after an evaluation, NaN where the data has none of it.

    Raises:
        ValueError: the model has another number of classes.
    """

    class_score = "ap"

    def __init__(self, model: nn.Module, *args: Any, num_classes: int, **others: Any) -> None:
        answers = getattr(model, "num_classes", num_classes)
        if answers != num_classes:
            raise ValueError(f"the model tells {answers} classes, the data has {num_classes}: set model.num_classes")
        super().__init__(model, *args, **others)
        self.average_precision = AveragePrecision(num_classes)
        self.last_detections: list[Detections] = []
        self.class_scores: list[float] = []

    def loss(self, batch: DetectionBatch) -> Mapping[str, Tensor]:
        return self.model(batch.images, batch.sizes, batch.targets)

    def measure(self, batch: DetectionBatch) -> Mapping[str, Any]:
        self.last_detections = self.model(batch.images, batch.sizes)
        for found, size, target in zip(self.last_detections, batch.sizes, batch.targets, strict=True):
            self.average_precision.update(
                found._replace(boxes=in_file_pixels(found.boxes, size, target.original)),
                target._replace(boxes=in_file_pixels(target.boxes, size, target.original)),
            )
        return {}

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        scores = self.average_precision.compute()
        self.class_scores = self.average_precision.class_precisions
        self.log_dict(
            {f"{stage}/{name}": torch.as_tensor(value).float() for name, value in scores.items()}, prog_bar=True
        )
        self.average_precision.reset()
