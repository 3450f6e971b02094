"""Samples to batches: stacked as they are, or mixed by mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from timm.data.mixup import Mixup
from torch import Tensor

from datamodules.batches import ImageBatch


def collate(samples: Sequence[tuple[Tensor, int]]) -> ImageBatch:
    """Stack (3, H, W) images and their classes into (B, 3, H, W) float32 and (B,) int64."""
    images, classes = zip(*samples, strict=True)
    return ImageBatch(torch.stack(images), torch.tensor(classes, dtype=torch.int64))


class MixedCollate:
    """Stack, then blend the batch with its own reverse: one draw a batch, timm's "batch" mode.

    Runs in the loader's workers, whose random streams differ, so every rank and batch gets its own draw. The targets
    are class weights that sum to 1; a task that trains with binary cross-entropy binarises them itself.

    Args:
        num_classes: width of the soft targets.
        mixup_alpha: Beta parameter of mixup; 0 switches it off.
        cutmix_alpha: Beta parameter of CutMix; 0 switches it off.
        probability: of mixing a batch at all.
        switch_probability: of CutMix rather than mixup where both are on.
        label_smoothing: mass spread evenly over all classes.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        probability: float = 1.0,
        switch_probability: float = 0.5,
        label_smoothing: float = 0.0,
    ) -> None:
        if max(mixup_alpha, cutmix_alpha) <= 0:
            raise ValueError("mix: mixup_alpha and cutmix_alpha are both 0; set one above 0, or mix=null for no mixing")
        self.mixup = Mixup(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            prob=probability,
            switch_prob=switch_probability,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )

    def __call__(self, samples: Sequence[tuple[Tensor, int]]) -> ImageBatch:
        """Samples of (3, H, W) and class → (B, 3, H, W) float32 and (B, num_classes) float32; B even."""
        images, targets = self.mixup(*collate(samples))
        return ImageBatch(images, targets)


class Mixing(Protocol):
    """A mixing recipe that waits for the number of classes: `MixedCollate`, or a `functools.partial` of it."""

    def __call__(self, *, num_classes: int) -> MixedCollate: ...
