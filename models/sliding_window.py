"""Pixel classes of images of any size: windows of the size trained at, slid over the image, and means over scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

Scores = Callable[[Tensor], Tensor]  # images (b, 3, h, w) → (b, classes, h, w)


def sliding_window(
    scores_of: Scores, images: Tensor, crop: tuple[int, int], stride: tuple[int, int], batch: int = 8
) -> Tensor:
    """Scores of windows, averaged where windows overlap.

    Args:
        scores_of: the model, which only ever sees images of the size of `crop`.
        images: (b, 3, H, W); what is smaller than the crop is padded with zeros at the right and below.
        crop: height and width of a window, pixels.
        stride: pixels from one window to the next, down and right; the last one lies flush with the border.
        batch: windows times images that the model is given at once, at most; but all images of one window together.

    Returns:
        (b, classes, H, W), float32 or wider.

    Raises:
        ValueError: a stride isn't in 1 … crop, which would leave pixels without scores.
    """
    for axis, step, side in zip(("height", "width"), stride, crop, strict=True):
        if not 1 <= step <= side:
            raise ValueError(f"sliding_window: stride {step} of the {axis} isn't in 1 … {side}, the side of the crop")
    (b, _, height, width), (h, w) = images.shape, crop
    padded = pad(images, (0, max(0, w - width), 0, max(0, h - height)))
    corners = list(product(_starts(height, h, stride[0]), _starts(width, w, stride[1])))
    at_once = max(1, batch // b)
    total: Tensor | None = None
    count = torch.zeros(padded.shape[2:], device=images.device)
    for first in range(0, len(corners), at_once):
        some = corners[first : first + at_once]
        scores = scores_of(torch.cat([padded[:, :, y : y + h, x : x + w] for y, x in some]))
        if total is None:
            kind = torch.promote_types(scores.dtype, torch.float32)
            total = scores.new_zeros(b, scores.shape[1], *padded.shape[2:], dtype=kind)
        for (y, x), of_window in zip(some, scores.split(b), strict=True):
            total[:, :, y : y + h, x : x + w] += of_window
            count[y : y + h, x : x + w] += 1
    assert total is not None  # there is always a window
    return (total / count)[:, :, :height, :width]


def _starts(length: int, crop: int, stride: int) -> Iterator[int]:
    last = max(0, length - crop)
    return (min(start, last) for start in range(0, last + stride, stride))


def multi_scale(
    scores_of: Scores, images: Tensor, ratios: Sequence[float], flip: bool, activate: Callable[[Tensor], Tensor]
) -> Tensor:
    """Activated scores, averaged over sizes of the image and, if asked, over the image and its mirror image.

    Args:
        scores_of: the model, or a sliding window over it.
        images: (b, 3, H, W).
        ratios: of the sides of the images given to the model to those of `images`.
        flip: whether mirror images count too, left and right exchanged.
        activate: what makes scores (b, classes, H, W) comparable over sizes, as softmax.

    Returns:
        (b, classes, H, W).

    Raises:
        ValueError: there is no ratio, or one isn't above 0.
    """
    if not ratios or min(ratios) <= 0:
        raise ValueError(f"multi_scale: ratios {list(ratios)} must be one or more numbers above 0")
    size = images.shape[2:]
    total: Tensor | None = None
    for ratio in ratios:
        resized = _resize(images, (max(1, round(size[0] * ratio)), max(1, round(size[1] * ratio))))
        for mirrored in (False, True) if flip else (False,):
            scores = scores_of(resized.flip(-1)).flip(-1) if mirrored else scores_of(resized)
            activated = activate(_resize(scores, (size[0], size[1])))
            total = activated if total is None else total + activated
    assert total is not None  # ratios aren't empty
    return total / (len(ratios) * (1 + flip))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else interpolate(x, size=size, mode="bilinear", align_corners=False)
