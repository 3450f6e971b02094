"""Image classification: soft-target cross entropy or BCE on hardened mixtures, top-1 and top-5 (arXiv 2403.13298)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from datamodules.batches import ImageBatch
from tasks.base import Task


def soft_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of logits (b, c) against class indices (b,) or probabilities (b, c)."""
    return functional.cross_entropy(logits, targets, label_smoothing=smoothing)


def hard_binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """BCE where every class present in the mixture is a full positive, mean over classes and batch (arXiv 2204.07118).

    Args:
        logits: (b, c).
        targets: (b,) class indices, or (b, c) weights, of which those above zero count as one.
    """
    if targets.ndim == 1:
        targets = functional.one_hot(targets, logits.shape[-1])
    return functional.binary_cross_entropy_with_logits(logits, targets.gt(0).to(logits.dtype))


class Classification(Task[ImageBatch]):
    """Trains a classifier of images.

    Args:
        model: (b, 3, h, w) → logits (b, num_classes).
        num_classes: of the data; must be what the model answers with.
        criterion: logits (b, c), targets → scalar; targets are indices (b,), or weights (b, c) where the data mixes.
        others: of `Task`.

    Raises:
        ValueError: the model has another number of classes.
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        num_classes: int,
        criterion: Callable[[Tensor, Tensor], Tensor] = soft_cross_entropy,
        **others: Any,
    ) -> None:
        answers = getattr(model, "num_classes", num_classes)
        if answers != num_classes:
            raise ValueError(
                f"the model answers with {answers} classes, the data has {num_classes}: set model.num_classes"
            )
        super().__init__(model, *args, **others)
        self.criterion = criterion
        self.top1 = MulticlassAccuracy(num_classes, top_k=1, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro")

    def evaluate_at(self, resolution: int | Sequence[int]) -> None:  # type: ignore[override]
        """Let the model take images of another size: a side, or (height, width)."""
        size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        cast(Any, self.model).set_input_size(size)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def loss(self, batch: ImageBatch) -> Mapping[str, Tensor]:
        return {"loss": self.criterion(self(batch.images), batch.targets)}

    def measure(self, batch: ImageBatch) -> Mapping[str, Any]:
        logits = self(batch.images).float()
        self.top1(logits, batch.targets)
        self.top5(logits, batch.targets)
        loss = functional.cross_entropy(logits, batch.targets)
        return {"loss": loss, "top1": self.top1, "top5": self.top5}
