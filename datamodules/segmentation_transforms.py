"""Recipes for images with a class for every pixel: those of UperNet and Mask2Former on ADE20k, and of evaluation.

An image and its classes move together; classes are never blended.
"""

from __future__ import annotations

from typing import Protocol

import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from datamodules.segmentation_folder import IGNORED


class SegmentationTransform(Protocol):
    """From a colour image and its classes (h, w) uint8, 255 for none, to a normalised float32 image (3, H, W) and its
    classes."""

    def __call__(self, image: Image.Image, classes: Tensor) -> tuple[Tensor, Tensor]: ...


def _uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))


def _integer(below: int) -> int:
    return int(torch.randint(below, ()))


def _normalised(image: Tensor) -> Tensor:
    return functional.normalize(image, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))


def resized(height: int, width: int, short_side: float) -> tuple[int, int]:
    """Height and width with the aspect kept: the short side as asked for, the long side at most 4 times that."""
    factor = min(short_side / min(height, width), 4 * short_side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, averaging where it shrinks."""
    return functional.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)


class CappedCrop:
    """A random crop in which no class covers more than a share of what has a class.

    An image smaller than the crop is taken whole on that side. A crop that holds a single class, or more than the share of
    one, is drawn again; the last of `tries` + 1 draws is taken as it is.

    Args:
        size: height and width, pixels.
        cap: the share; 1 takes the first crop.
        tries: how often to draw again.
    """

    def __init__(self, size: tuple[int, int], cap: float = 0.75, tries: int = 10) -> None:
        self.size, self.cap, self.tries = size, cap, tries

    def varied(self, classes: Tensor) -> bool:
        """Whether classes (h, w) are several, none above the cap."""
        pixels = torch.bincount(classes.flatten().long(), minlength=IGNORED + 1)[:IGNORED]
        return int((pixels > 0).sum()) > 1 and float(pixels.max()) < self.cap * float(pixels.sum())

    def __call__(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        height, width = classes.shape
        rows, columns = min(self.size[0], height), min(self.size[1], width)
        for _ in range(self.tries + 1):
            top, left = _integer(height - rows + 1), _integer(width - columns + 1)
            kept = classes[top : top + rows, left : left + columns]
            if self.cap >= 1 or self.varied(kept):
                break
        return image[:, top : top + rows, left : left + columns], kept


class PhotometricDistortion:
    """Brightness, contrast, saturation and hue, each changed half the time, as SSD does it (arXiv 1512.02325).

    Contrast comes before saturation and hue or after them, with equal chance. Colours are cut to [0, 1] after each.

    Args:
        brightness: greatest shift, where white is 1.
        contrast: least and greatest factor on all colours.
        saturation: least and greatest factor on the saturation of HSV.
        hue: greatest shift, in turns of the colour circle.
    """

    def __init__(
        self,
        brightness: float = 32 / 255,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: float = 0.1,
    ) -> None:
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    @staticmethod
    def saturated(image: Tensor, factor: float) -> Tensor:
        """The image (3, h, w) with the saturation of HSV multiplied and cut at 1; hue and value stay."""
        value, least = image.amax(0, keepdim=True), image.amin(0, keepdim=True)
        most = value / (value - least).clamp(min=1e-12)  # a saturation of 1 puts the least channel at 0
        return (value - (value - image) * most.clamp(max=factor)).clamp(0, 1)

    def __call__(self, image: Tensor) -> Tensor:
        """Distort a float image (3, h, w) in [0, 1]."""
        shifts, scales, saturates, turns, scales_first = (torch.rand(5) < 0.5).tolist()
        if shifts:
            image = (image + _uniform(-self.brightness, self.brightness)).clamp(0, 1)
        if scales and scales_first:
            image = (image * _uniform(*self.contrast)).clamp(0, 1)
        if saturates:
            image = self.saturated(image, _uniform(*self.saturation))
        if turns:
            image = functional.adjust_hue(image, _uniform(-self.hue, self.hue))
        if scales and not scales_first:
            image = (image * _uniform(*self.contrast)).clamp(0, 1)
        return image


class TrainTransform:
    """Random size, crop, flip and colours.

    Images smaller than the crop stay so: batches pad them.

    Args:
        short_side: pixels that `scales` multiply, the factor drawn uniformly; the long side stays within 4 times it.
        crop_size: height and width of the crop, or one number for both.
        scales: least and greatest factor.
        category_cap: as `CappedCrop`.
        flip: chance of a mirror image.
        distortion: of the colours, float (3, h, w) in [0, 1] → the same; None for none.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        *,
        short_side: int,
        crop_size: int | tuple[int, int],
        scales: tuple[float, float] = (0.5, 2.0),
        category_cap: float = 0.75,
        flip: float = 0.5,
        distortion: PhotometricDistortion | None = None,
    ) -> None:
        crop = (crop_size, crop_size) if isinstance(crop_size, int) else (crop_size[0], crop_size[1])
        if min(short_side, *crop) < 1:
            raise ValueError(f"train_short_side={short_side} and crop_size={crop_size} must be at least 1")
        if not 0 < scales[0] <= scales[1]:
            raise ValueError(f"scales={scales}: give the least and the greatest factor, both above 0")
        if not 0 < category_cap <= 1:
            raise ValueError(f"category_cap={category_cap}: give a share in (0, 1]")
        self.short_side, self.scales, self.flip, self.distortion = short_side, scales, flip, distortion
        self.crop = CappedCrop(crop, category_cap)

    def __call__(self, image: Image.Image, classes: Tensor) -> tuple[Tensor, Tensor]:
        size = resized(*image.size[::-1], self.short_side * _uniform(*self.scales))
        mask = functional.resize(classes[None], list(size), InterpolationMode.NEAREST_EXACT)[0]
        pixels, mask = self.crop(resize_image(functional.pil_to_tensor(image), size), mask)
        if float(torch.rand(())) < self.flip:
            pixels, mask = pixels.flip(-1), mask.flip(-1)
        pixels = functional.to_dtype(pixels, torch.float32, scale=True)
        if self.distortion is not None:
            pixels = self.distortion(pixels)
        return _normalised(pixels), mask


class EvalTransform:
    """The whole image with its short side at one size, its long side within 4 times that; classes stay as they are.

    Args:
        image_size: of the short side, pixels.
    """

    def __init__(self, *, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, image: Image.Image, classes: Tensor) -> tuple[Tensor, Tensor]:
        pixels = resize_image(functional.pil_to_tensor(image), resized(*image.size[::-1], self.image_size))
        return _normalised(functional.to_dtype(pixels, torch.float32, scale=True)), classes
