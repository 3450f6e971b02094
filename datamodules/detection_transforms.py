"""Images with boxes as detectors train on them and are tested: DETR's augmentation (arXiv 2005.12872), large-scale jitter
(arXiv 2012.07177) and the resize of evaluation, from torchvision's transforms. All draw from torch's generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from datamodules.batches import Boxes


class DetectionTransform(Protocol):
    """From a colour image and its boxes, in its pixels, to (3, height, width) float32, normalised, and the boxes there."""

    def __call__(self, image: Image.Image, boxes: Boxes) -> tuple[Tensor, Boxes]: ...


class DetectionEvalTransform(Protocol):
    """What evaluation does, waiting for its size: a class of this file, or a `functools.partial` of one."""

    def __call__(self, *, image_size: int) -> DetectionTransform: ...


class RandomCropWithin(v2.Transform):
    """Cuts out a window whose sides are drawn between two lengths, no longer than the image's, at a place drawn too.

    Args:
        shortest: side of the window, pixels.
        longest: the same.

    Raises:
        ValueError: not 1 ≤ shortest ≤ longest.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        super().__init__()
        if not 1 <= shortest <= longest:
            raise ValueError(f"crop=({shortest}, {longest}): give the shortest and the longest side, in pixels")
        self.shortest, self.longest = shortest, longest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        extents = v2.query_size(flat_inputs)
        sides = [_draw(min(self.shortest, extent), min(self.longest, extent)) for extent in extents]
        top, left = (_draw(0, extent - side) for extent, side in zip(extents, sides, strict=True))
        return {"top": top, "left": left, "height": sides[0], "width": sides[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


def resize(short_side: int, long_side: int | None = None) -> v2.Transform:
    """Resize the shorter side to `short_side`, or the longer to `long_side` where it would pass that; shape kept."""
    if short_side < 1 or (long_side is not None and long_side < short_side):
        raise ValueError(f"short side {short_side}, long side {long_side}: give pixels, the long side the greater")
    # torchvision takes no pair of equal sides, which only ever means the longer one.
    return v2.Resize(None, max_size=long_side) if short_side == long_side else v2.Resize(short_side, max_size=long_side)


class _Steps:
    """Runs torchvision's transforms on an image with boxes, labels, areas and crowd."""

    def __init__(self, steps: Sequence[Callable[..., Any]]) -> None:
        normalise = v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        self.steps = v2.Compose(
            [*steps, v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, True), normalise]
        )

    def __call__(self, image: Image.Image, boxes: Boxes) -> tuple[Tensor, Boxes]:
        corners = tv_tensors.BoundingBoxes(boxes.boxes, format="XYXY", canvas_size=(image.height, image.width))
        sample = {"image": v2.functional.to_image(image), "boxes": corners}
        done = self.steps({**sample, "labels": boxes.labels, "areas": boxes.areas, "crowd": boxes.crowd})
        image_now, boxes_now = (done[name].as_subclass(Tensor) for name in ("image", "boxes"))
        kept = {name: done[name] for name in ("labels", "areas", "crowd")}
        return image_now, boxes._replace(boxes=boxes_now, **kept)


class DetrAugment(_Steps):
    """Flip; then resize to one of several short sides; half the time, another resize and a crop come before that.

    Boxes are cut with the image, and those under a pixel wide, high or large left out; `areas` stay those of the file.

    Args:
        short_sides: one is drawn; pixels.
        long_side: that the longer side never passes, pixels.
        crop_short_sides: one is drawn for the resize before the crop, pixels.
        crop: shortest and longest side of the crop, pixels.
        crop_probability: of resize and crop.
        flip_probability: of the mirror image.

    Raises:
        ValueError: sides out of order.
    """

    def __init__(
        self,
        *,
        short_sides: Sequence[int] = tuple(range(480, 801, 32)),
        long_side: int = 1333,
        crop_short_sides: Sequence[int] = (400, 500, 600),
        crop: tuple[int, int] = (384, 600),
        crop_probability: float = 0.5,
        flip_probability: float = 0.5,
    ) -> None:
        cropping = [v2.RandomChoice([resize(side) for side in crop_short_sides]), RandomCropWithin(*crop)]
        super().__init__(
            [
                v2.RandomHorizontalFlip(flip_probability),
                v2.RandomApply(cropping, crop_probability),
                v2.RandomChoice([resize(side, long_side) for side in short_sides]),
                *_clean(),
            ]
        )


class LargeScaleJitter(_Steps):
    """Flip, resize by a factor drawn from a wide range, and cut what is beyond a square: what ViTDet trains with.

    Boxes as with `DetrAugment`. An image smaller than the square stays so: the batch pads it.

    Args:
        side: of the square; factor 1 makes the longer side of the image this long, pixels.
        scale: least and greatest factor.
        flip_probability: of the mirror image.

    Raises:
        ValueError: side or scale out of range.
    """

    def __init__(
        self, *, side: int = 1024, scale: tuple[float, float] = (0.1, 2.0), flip_probability: float = 0.5
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale={tuple(scale)}: give the least and the greatest factor, above 0")
        super().__init__(
            [
                v2.RandomHorizontalFlip(flip_probability),
                v2.ScaleJitter((side, side), (scale[0], scale[1])),
                RandomCropWithin(side, side),
                *_clean(),
            ]
        )


class ResizeForTest(_Steps):
    """The shorter side becomes `image_size`, unless the longer would pass `image_size` times `longest`. Every box stays.

    Args:
        image_size: pixels.
        longest: the longer side's limit as a multiple of `image_size`: 1333 / 800 in COCO's recipes.

    Raises:
        ValueError: image_size is below 1, or longest below 1.
    """

    def __init__(self, *, image_size: int, longest: float = 1333 / 800) -> None:
        super().__init__([resize(image_size, round(image_size * longest))])


def _clean() -> list[v2.Transform]:
    return [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1, min_area=1, labels_getter=_beside_boxes)]


def _beside_boxes(sample: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return sample["labels"], sample["areas"], sample["crowd"]


def _draw(least: int, greatest: int) -> int:
    return int(torch.randint(least, greatest + 1, ()))
