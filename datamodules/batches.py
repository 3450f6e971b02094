"""The batch that every image classification datamodule hands to a task."""

from typing import NamedTuple

from torch import Tensor


class ImageBatch(NamedTuple):
    """Images with one class each.

    Attributes:
        images: normalised colour images, float32, shape (B, 3, H, W).
        targets: class indices, int64, shape (B,); or class weights, float32, shape (B, classes), where images are mixed.
    """

    images: Tensor
    targets: Tensor
