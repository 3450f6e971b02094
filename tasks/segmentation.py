"""Semantic segmentation: a class for every pixel, in sliding windows and over several scales on demand; mIoU over the set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from datamodules.batches import SegmentationBatch
from models.sliding_window import multi_scale, sliding_window
from tasks.base import Task
from tasks.metrics.intersection_over_union import IntersectionOverUnion


class Segmentation(Task[SegmentationBatch]):
    """Trains a segmenter.

    Args:
        model: images (b, 3, h, w) and targets (b, h, w) → its losses; without targets → scores (b, classes, h, w).
        num_classes: of the data; must be what the model answers with.
        crop: side in pixels of the windows that a test image is read in, or (height, width); None reads it whole.
        stride: pixels from window to window.
        ratios: of the image's size, whose answers are averaged.
        flip: average with the mirrored image, too.
        others: of `Task`.

    Attributes:
        last_prediction: class (h, w) of every pixel, int64, in the pixels of the files, of the batch measured last.
        class_scores: IoU of every class after an evaluation, NaN where neither data nor answers have it.

    Raises:
        ValueError: the model has another number of classes, or a crop comes without its stride.
    """

    class_score = "iou"

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        num_classes: int,
        crop: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
        ratios: Sequence[float] = (1.0,),
        flip: bool = False,
        **others: Any,
    ) -> None:
        answers = getattr(model, "num_classes", num_classes)
        if answers != num_classes:
            raise ValueError(f"the model tells {answers} classes, the data has {num_classes}: set model.num_classes")
        if (crop is None) != (stride is None):
            raise ValueError(f"task.crop={crop} and task.stride={stride} go together: give both or neither")
        super().__init__(model, *args, **others)
        self.crop, self.stride, self.ratios, self.flip = _pair(crop), _pair(stride), tuple(ratios), flip
        self.intersection_over_union = IntersectionOverUnion(num_classes)
        self.last_prediction: list[Tensor] = []
        self.class_scores: list[float] = []

    def loss(self, batch: SegmentationBatch) -> Mapping[str, Tensor]:
        return self.model(batch.images, batch.targets)

    def scores(self, images: Tensor) -> Tensor:
        """Scores (b, classes, h, w) of images, each alike in size, by windows and scales as the task is set."""
        once: Callable[[Tensor], Tensor] = self.model
        if self.crop is not None and self.stride is not None:
            once = partial(sliding_window, self.model, crop=self.crop, stride=self.stride)
        if self.ratios == (1.0,) and not self.flip:
            return once(images)
        return multi_scale(once, images, ratios=self.ratios, flip=self.flip, activate=cast(Any, self.model).activate)

    def measure(self, batch: SegmentationBatch) -> Mapping[str, Any]:
        self.last_prediction = []
        for at, (size, target_size) in enumerate(zip(batch.sizes.tolist(), batch.target_sizes.tolist(), strict=True)):
            scores = self.scores(batch.images[at : at + 1, :, : size[0], : size[1]])
            if target_size != size:
                scores = interpolate(scores.float(), size=target_size, mode="bilinear", align_corners=False)
            predicted = scores[0].argmax(0)
            self.intersection_over_union.update(predicted, batch.targets[at, : target_size[0], : target_size[1]])
            self.last_prediction.append(predicted)
        return {}

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        scores = self.intersection_over_union.compute()
        self.class_scores = self.intersection_over_union.per_class().tolist()
        self.log_dict(
            {f"{stage}/{name}": torch.as_tensor(value).float() for name, value in scores.items()}, prog_bar=True
        )
        self.intersection_over_union.reset()


def _pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None or isinstance(size, int):
        return None if size is None else (size, size)
    return size[0], size[1]
