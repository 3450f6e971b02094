"""What networks for dense tasks share: the feature maps of a backbone, boxes that are known, boxes that were found."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad


class Backbone(Protocol):
    """Images of any size → feature maps, finest first.

    Attributes:
        strides: pixels that a cell of each map spans.
        channels: of each map.
    """

    strides: tuple[int, ...]
    channels: tuple[int, ...]

    def __call__(self, images: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """Maps (b, channels, ceil(H / stride), ceil(W / stride)) of images (b, 3, H, W).

        `valid` (b, H, W) bool tells an image from its padding at the right and below; None means all is image. What is
        padding never changes what is image, and is zero in the maps.
        """
        ...


class Boxes(Protocol):
    """Objects of one image: `boxes` (n, 4) x1, y1, x2, y2 in pixels, `labels` (n,) int64."""

    @property
    def boxes(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


class Detections(NamedTuple):
    """Objects found in one image, best first.

    Attributes:
        boxes: (n, 4) float32 x1, y1, x2, y2 in pixels, inside the image.
        scores: (n,) float32, 0 … 1.
        labels: (n,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def valid_pixels(sizes: Tensor, height: int, width: int) -> Tensor:
    """(b, height, width) bool: the pixels of images of `sizes` (b, 2), height and width, padded right and below."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]  # (b, height)
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def whole_cells(images: Tensor, stride: int) -> tuple[Tensor, Tensor | None]:
    """Images (b, 3, H, W) padded with zeros at the right and below to multiples of `stride`, and which pixels were there.

    Then maps of strides that double have sizes that double, so that a coarse map enlarged lies where the finer one does;
    otherwise its last cells, which reach beyond the image, would be squeezed into it. The pixels are (b, H, W) bool, or
    None where nothing was added.
    """
    height, width = images.shape[-2:]
    added = (0, -width % stride, 0, -height % stride)
    if not any(added):
        return images, None
    there = torch.ones(len(images), height, width, dtype=torch.bool, device=images.device)
    return pad(images, added), pad(there, added)
