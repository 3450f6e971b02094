"""Mean intersection over union (mIoU) of classes over a whole data set, not over its images (arXiv 1608.05442)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class IntersectionOverUnion(Metric):
    """Counts pixels by true and predicted class, and compares over all of them.

    `compute()` gives float64 scalars:

    - `miou`: mean over classes of true positives / (true or predicted), of those classes that occur, true or predicted;
    - `pixel_accuracy`: share of the pixels that are right;
    - `mean_accuracy`: mean over the classes that occur, of the share of their pixels that are right.

    They are NaN where nothing was counted.

    Args:
        num_classes: that predictions and targets may name.
        ignored: target of the pixels that don't count.
        kwargs: of torchmetrics.Metric.
    """

    higher_is_better = True
    full_state_update = False
    pixels: Tensor

    def __init__(self, num_classes: int, ignored: int = 255, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.ignored = num_classes, ignored
        self.add_state("pixels", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add an image, or several.

        Args:
            predictions: classes, any shape, integers; whatever stands on ignored pixels.
            targets: true classes, same shape, `ignored` where they don't count.

        Raises:
            ValueError: shapes differ, predictions aren't integers, or a class outside 0 … num_classes − 1 is counted.
        """
        if predictions.shape != targets.shape:
            raise ValueError(
                f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} must have one shape"
            )
        if predictions.is_floating_point() or targets.is_floating_point():
            raise ValueError(f"classes must be integers, not {predictions.dtype} and {targets.dtype}")
        targets = targets.to(self.pixels.device)
        counted = targets != self.ignored
        true, found = targets[counted].long(), predictions.to(self.pixels.device)[counted].long()
        for name, classes in (("predictions", found), ("targets", true)):
            if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_classes:
                raise ValueError(
                    f"{name} lie in {int(classes.min())} … {int(classes.max())}, there are {self.num_classes} classes"
                )
        pairs = torch.bincount(true * self.num_classes + found, minlength=self.num_classes**2)
        self.pixels += pairs.view(self.num_classes, self.num_classes)

    def per_class(self) -> Tensor:
        """(num_classes,) float64 intersection over union over all ranks, NaN for absent classes; all ranks must call it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._ratios()

    def _ratios(self) -> Tensor:
        right = self.pixels.diagonal().double()
        return right / (self.pixels.sum(0) + self.pixels.sum(1) - right)

    def compute(self) -> dict[str, Tensor]:
        right, true = self.pixels.diagonal().double(), self.pixels.sum(1)
        return {
            "miou": self._ratios().nanmean(),
            "pixel_accuracy": right.sum() / true.sum(),
            "mean_accuracy": (right / true).nanmean(),
        }
