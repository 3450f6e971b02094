"""The image recipes of ImageNet training: 3-Augment (DeiT III, arXiv 2204.07118), RandAugment (Swin) and evaluation.

Each is a callable from a PIL image to a normalised float32 tensor of shape (3, height, width). Everything timm and
torchvision have is theirs; the blur with a random radius is what they lack, and `posterize_or_black` mends timm.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Protocol, cast

from PIL import Image, ImageFilter
from timm.data.auto_augment import posterize
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import transforms_imagenet_eval, transforms_imagenet_train
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode


class ImageTransform(Protocol):
    """From a colour image to a normalised float32 tensor of shape (3, height, width)."""

    def __call__(self, image: Image.Image) -> Tensor: ...


class TrainTransform(Protocol):
    """A training recipe that waits for its output size: a class of this file, or a `functools.partial` of one."""

    def __call__(self, *, image_size: tuple[int, int]) -> ImageTransform: ...


class RandomBlur:
    """PIL's Gaussian blur with a radius drawn uniformly for each image.

    Args:
        radius: smallest and largest radius, pixels.
    """

    def __init__(self, radius: tuple[float, float] = (0.1, 2.0)) -> None:
        self.radius = radius

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.radius)))


class ThreeAugment:
    """3-Augment: crop, flip, exactly one of {grey, solarise, blur} with equal chance, colour jitter.

    The recipe of DeiT III (arXiv 2204.07118), which RoPE-ViT (arXiv 2403.13298) trains its ViTs with.

    Args:
        image_size: (height, width) of the output, pixels.
        crop_scale: smallest and largest crop, as a fraction of the image's area.
        color_jitter: strength of the random brightness, contrast and saturation.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        crop_scale: tuple[float, float] = (0.08, 1.0),
        color_jitter: float = 0.3,
    ) -> None:
        self.choices = (
            transforms.Grayscale(num_output_channels=3),
            transforms.RandomSolarize(threshold=128, p=1.0),
            RandomBlur(),
        )
        self.steps: Callable[[Image.Image], Tensor] = transforms.Compose(
            [
                transforms.RandomResizedCrop(image_size, crop_scale, interpolation=InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.RandomChoice(self.choices),
                transforms.ColorJitter(color_jitter, color_jitter, color_jitter),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )

    def __call__(self, image: Image.Image) -> Tensor:
        return self.steps(image)


def posterize_or_black(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's posterize for 0 bits too, which strength 10 of 10 asks for: Pillow 13 refuses it, older ones gave black.

    At strength 9 with deviation 0.5 this meets about one image in 650.
    """
    return posterize(image, bits_to_keep, **options) if bits_to_keep > 0 else Image.new(image.mode, image.size)


class RandAugment:
    """Crop, flip, RandAugment and random erasing as timm composes them: Swin's recipe, and ViT's for finetuning.

    No colour jitter: Swin's configuration names 0.4, which RandAugment switches off.

    Args:
        image_size: (height, width) of the output, pixels.
        policy: RandAugment in timm's notation: 9 of 10 in strength, deviation 0.5, operations that grow with strength.
        erasing: probability of filling one rectangle with normal noise.
        crop_scale: smallest and largest crop, as a fraction of the image's area.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        policy: str = "rand-m9-mstd0.5-inc1",
        erasing: float = 0.25,
        crop_scale: tuple[float, float] = (0.08, 1.0),
    ) -> None:
        composed = transforms_imagenet_train(
            image_size,
            scale=crop_scale,
            auto_augment=policy,
            interpolation="bicubic",
            re_prob=erasing,
            re_mode="pixel",
            re_count=1,
        )
        steps = cast(transforms.Compose, composed)  # a tuple only if asked for in parts
        for operation in (operation for step in steps.transforms for operation in getattr(step, "ops", ())):
            if operation.aug_fn is posterize:
                operation.aug_fn = posterize_or_black
        self.steps: Callable[[Image.Image], Tensor] = steps

    def __call__(self, image: Image.Image) -> Tensor:
        return self.steps(image)


class EvalTransform:
    """Resize (bicubic, aspect kept) until the image covers int(size / crop_ratio), then cut out the centre.

    Args:
        image_size: (height, width) of the output, pixels.
        crop_ratio: 1.0 for the ViTs, 0.875 for Swin: the two papers differ, and so do their numbers.
    """

    def __init__(self, *, image_size: tuple[int, int], crop_ratio: float) -> None:
        self.steps: Callable[[Image.Image], Tensor] = transforms_imagenet_eval(
            image_size, crop_pct=crop_ratio, interpolation="bicubic"
        )

    def __call__(self, image: Image.Image) -> Tensor:
        return self.steps(image)
