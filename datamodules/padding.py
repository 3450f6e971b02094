"""Images of different sizes as one batch, padded at the right and below with zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules.batches import Boxes, DetectionBatch


def pad_together(images: Sequence[Tensor], multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Stack images (c, h, w), at least one.

    Args:
        images: of one dtype and number of channels.
        multiple: the padded height and width are multiples of this many pixels.

    Returns:
        (b, c, H, W) with the smallest H and W that hold every image, and (b, 2) int64 height and width of each.
    """
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = (-(-int(side) // multiple) * multiple for side in sizes.amax(0))
    padded = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    for place, image in zip(padded, images, strict=True):
        place[:, : image.shape[-2], : image.shape[-1]] = image
    return padded, sizes


class DetectionCollate:
    """(image, boxes) items → `DetectionBatch`.

    Args:
        multiple: see `pad_together`.
    """

    def __init__(self, multiple: int = 1) -> None:
        self.multiple = multiple

    def __call__(self, items: Sequence[tuple[Tensor, Boxes]]) -> DetectionBatch:
        images, sizes = pad_together([image for image, _ in items], self.multiple)
        return DetectionBatch(images, sizes, tuple(boxes for _, boxes in items))
