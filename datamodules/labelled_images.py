"""Encoded images with class labels as a dataset: decode, transform, and in training skip what can't be decoded."""

from __future__ import annotations

import io
import logging
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.augment import ImageTransform

logger = logging.getLogger(__name__)


class ImageSource(Protocol):
    """Where encoded images lie: a class-folder tree or tar shards.

    Attributes:
        folder: the split's folder, for messages.
        labels: (N,) int64 class of each image.
        class_names: one name a class, in label order.
    """

    folder: Path
    labels: np.ndarray
    class_names: list[str]

    def read(self, index: int) -> bytes: ...

    def name(self, index: int) -> str: ...


class UndecodableImageError(ValueError):
    """An image file that PIL can't decode; the message holds its path and PIL's reason."""


class CorruptBudgetError(ValueError):
    """Training met more undecodable images than `corrupt_budget` allows."""


class CorruptBudget:
    """How many different undecodable images one process and its loader workers may skip before training stops.

    A file counts once, however many epochs and repeats meet it. The marks lie in shared memory, so the workers count
    together and epochs add up; a resumed run starts at nought again.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._seen = torch.zeros(1 << 20, dtype=torch.uint8).share_memory_()

    @property
    def count(self) -> int:
        return int(self._seen.sum())

    def spend(self, error: UndecodableImageError, name: str) -> None:
        """Count and log an image; raises CorruptBudgetError past the limit."""
        slot = zlib.crc32(name.encode()) % len(self._seen)  # one mark a file: two writers can't lose a count
        first = not self._seen[slot]
        self._seen[slot] = 1
        count = self.count
        if first:
            logger.warning("%s; skipped, %d of at most %d", error, count, self.limit)
        if count > self.limit:  # also for a file seen before: the other workers have to stop too
            raise CorruptBudgetError(
                f"corrupt_budget={self.limit} is spent: {error}. Repair the files logged above, or raise corrupt_budget"
            )


def decode_image(data: bytes, name: str) -> Image.Image:
    """Encoded bytes to a colour (RGB) image; raises UndecodableImageError with the name, whatever PIL stumbles over."""
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, zlib.error and others by format
        raise UndecodableImageError(f"cannot decode {name}: {type(error).__name__}: {error}") from error


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Items are (transform(image), class).

    Args:
        source: the encoded images.
        transform: PIL image → (3, H, W) float32.
        budget: with one, an undecodable image is replaced by another drawn at random; without one it is an error.
    """

    def __init__(self, source: ImageSource, transform: ImageTransform, budget: CorruptBudget | None = None) -> None:
        self.source = source
        self.transform = transform
        self.budget = budget

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        while True:
            name = self.source.name(index)
            try:
                image = decode_image(self.source.read(index), name)
            except UndecodableImageError as error:
                if self.budget is None:
                    raise
                self.budget.spend(error, name)
                index = int(torch.randint(len(self), ()))
            else:
                return self.transform(image), int(self.source.labels[index])
