"""Composes scenes of cut-outs over a photograph, with the exact visible mask of every object.

A pixel belongs to the topmost object that covers more than half of it, so later objects occlude earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from datamodules.cutouts import CLASS_NAMES, SPLITS, CutOuts, Split, coverage

_TRIES = 200


@dataclass(frozen=True)
class SceneSettings:
    """How varied scenes are; every change makes another data set. Lengths are in pixels.

    Attributes:
        side: least and greatest height and width of an image, each drawn by itself.
        objects: greatest number of objects in an image; the least is one, but for the empty images.
        empty: share of images without any object.
        size: least and greatest length of a cut-out's longer side, drawn log-uniformly.
        rotation: greatest turn to either side, in degrees.
        gain: greatest factor by which brightness, and each colour by itself, goes up or down.
        contrast: least contrast of the photograph, as a share of its own, which is the greatest.
        visible: least share of an object that later objects leave to be seen.
        window: least and greatest share of the photograph that the background shows, by length.
    """

    side: tuple[int, int] = (224, 320)
    objects: int = 6
    empty: float = 0.03
    size: tuple[float, float] = (36.0, 200.0)
    rotation: float = 15.0
    gain: float = 1.15
    contrast: float = 0.4
    visible: float = 0.4
    window: tuple[float, float] = (0.35, 1.0)

    def __post_init__(self) -> None:
        if not 0 < self.side[0] <= self.side[1]:
            raise ValueError(f"side={self.side}: give the least and the greatest side, in pixels")
        if not 1 <= self.size[0] <= self.size[1] or self.size[0] * 2 > self.side[0]:
            raise ValueError(f"size={self.size}: give lengths of at least 1, the least at most half of side[0]")
        if self.objects < 1 or not 0 <= self.empty < 1:
            raise ValueError(f"objects={self.objects} must be at least 1 and empty={self.empty} in [0, 1)")
        if not 0 < self.visible <= 1 or not 0 < self.contrast <= 1 or self.gain < 1:
            raise ValueError(
                f"visible={self.visible} and contrast={self.contrast} must be in (0, 1], gain={self.gain} at least 1"
            )
        if not 0 < self.window[0] <= self.window[1] <= 1:
            raise ValueError(f"window={self.window}: give the least and the greatest share, in (0, 1]")


class Scene(NamedTuple):
    """One image and what it shows.

    Attributes:
        image: colours, uint8, shape (H, W, 3).
        objects: int16, shape (H, W): 0 where the photograph shows, k where object k − 1 does.
        rim: bool, shape (H, W): pixels that an object covers in part, which belong to nothing surely.
        labels: class index of each object, in the order of ``CLASS_NAMES``.
    """

    image: np.ndarray
    objects: np.ndarray
    rim: np.ndarray
    labels: tuple[int, ...]


def deal_labels(count: int, split: Split, seed: int, settings: SceneSettings) -> list[tuple[int, ...]]:
    """Deals the classes of the objects of `count` scenes; over all of them, classes differ by one object at most."""
    random = np.random.default_rng((seed, SPLITS.index(split)))
    numbers = random.integers(1, settings.objects + 1, count)
    numbers[random.permutation(count)[: round(settings.empty * count)]] = 0
    rounds = -(-int(numbers.sum()) // len(CLASS_NAMES))
    deck = np.concatenate([random.permutation(len(CLASS_NAMES)) for _ in range(rounds)] or [numbers[:0]]).tolist()
    ends = np.cumsum(numbers).tolist()
    return [tuple(deck[end - number : end]) for end, number in zip(ends, numbers.tolist(), strict=True)]


def compose_scenes(sources: CutOuts, count: int, split: Split, seed: int, settings: SceneSettings) -> Iterator[Scene]:
    """Yields `count` scenes of a split; the same arguments give the same pixels."""
    for index, labels in enumerate(deal_labels(count, split, seed, settings)):
        yield compose_scene(sources, labels, np.random.default_rng((seed, SPLITS.index(split), index)), settings)


def compose_scene(
    sources: CutOuts, labels: tuple[int, ...], random: np.random.Generator, settings: SceneSettings
) -> Scene:
    """Lays one cut-out of each class of `labels`, in that order, over a window of a photograph.

    Raises:
        ValueError: if an object finds no place within 200 tries.
    """
    height, width = (int(side) for side in random.integers(settings.side[0], settings.side[1] + 1, 2))
    image = _background(sources, height, width, random, settings)
    objects = np.zeros((height, width), np.int16)
    rim = np.zeros((height, width), bool)
    areas: list[int] = []
    for label in labels:
        characters = sources.characters[label]
        character = characters[int(random.integers(len(characters)))]
        largest = settings.size[1]
        for _ in range(_TRIES):
            # Smaller at each try, so that a crowded image still finds room for the objects it was dealt.
            largest = float(np.exp(random.uniform(*np.log((settings.size[0], largest)))))
            cutout = _turned(sources, character, largest, random, settings)
            top, left = _place(cutout, height, width, random)
            if top >= 0 and _leaves_visible(cutout, objects, areas, top, left, settings.visible):
                break
        else:
            raise ValueError(f"{settings}: no place for {len(labels)} objects; lower objects, size or visible")
        alpha = coverage(cutout)  # (h, w)
        part = np.s_[top : top + cutout.height, left : left + cutout.width]
        objects[part][alpha > 0.5] = len(areas) + 1
        rim[part] = np.where(alpha > 0.05, alpha < 0.95, rim[part])
        areas.append(int((alpha > 0.5).sum()))
        image.paste(cutout, (left, top), cutout)
    return Scene(np.asarray(image), objects, rim, labels)


def _background(
    sources: CutOuts, height: int, width: int, random: np.random.Generator, settings: SceneSettings
) -> Image.Image:
    photograph = sources.photographs[int(random.integers(len(sources.photographs)))]
    scale = random.uniform(*settings.window) * min(photograph.width / width, photograph.height / height)
    left = random.uniform(0.0, photograph.width - scale * width)
    top = random.uniform(0.0, photograph.height - scale * height)
    # Rounding may carry the sum past the photograph by 1e-13, which Pillow refuses.
    right = min(left + scale * width, photograph.width)
    bottom = min(top + scale * height, photograph.height)
    image = photograph.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # There are few photographs: with their channels in any order, no colour tells an object from what lies behind it.
    bands = image.split()
    image = Image.merge("RGB", [bands[channel] for channel in random.permutation(3)])
    contrast = random.uniform(settings.contrast, 1.0)
    grey = 255.0 * random.uniform(0.25, 0.75)
    levels = np.rint(grey + contrast * (np.arange(256) - grey)).astype(int).tolist()
    return image.point(levels * 3).point(_gains(random, settings.gain))


def _turned(
    sources: CutOuts, character: str, size: float, random: np.random.Generator, settings: SceneSettings
) -> Image.Image:
    """The cut-out scaled to `size`, turned, perhaps mirrored, recoloured, cropped to where alpha is above a half."""
    picture = sources.picture(character, size)
    factor = size / max(picture.size)
    angle = math.radians(random.uniform(-settings.rotation, settings.rotation))
    mirror = -1.0 if random.random() < 0.5 else 1.0
    cosine, sine = math.cos(angle), math.sin(angle)
    width = math.ceil(factor * (picture.width * abs(cosine) + picture.height * abs(sine))) + 2
    height = math.ceil(factor * (picture.width * abs(sine) + picture.height * abs(cosine))) + 2
    a, b, d, e = mirror * cosine / factor, mirror * sine / factor, -sine / factor, cosine / factor
    shift_x = picture.width / 2 - a * width / 2 - b * height / 2
    shift_y = picture.height / 2 - d * width / 2 - e * height / 2
    inverse = (a, b, shift_x, d, e, shift_y)
    turned = picture.transform((width, height), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    red, green, blue, alpha = turned.split()
    coloured = Image.merge("RGB", (red, green, blue)).point(_gains(random, settings.gain))
    coloured.putalpha(alpha)
    return coloured.crop(alpha.point([255 * (level > 127) for level in range(256)]).getbbox())


def _gains(random: np.random.Generator, gain: float) -> list[int]:
    """Pillow's table of 3 x 256 levels: one factor for all colours, times one for each."""
    most = math.log(gain)
    factors = np.exp(random.uniform(-most, most) + random.uniform(-most, most, 3) / 2)
    levels = np.rint(factors[:, None] * np.arange(256)).clip(0, 255)  # (3, 256)
    return levels.astype(int).ravel().tolist()


def _place(cutout: Image.Image, height: int, width: int, random: np.random.Generator) -> tuple[int, int]:
    """Top and left of the cut-out, wholly inside the image; −1 twice where it is too large."""
    if cutout.height > height or cutout.width > width:
        return -1, -1
    top, left = random.integers((height - cutout.height + 1, width - cutout.width + 1))
    return int(top), int(left)


def _leaves_visible(
    cutout: Image.Image, objects: np.ndarray, areas: list[int], top: int, left: int, visible: float
) -> bool:
    """Whether each object laid before keeps `visible` of its pixels under the cut-out."""
    part = objects[top : top + cutout.height, left : left + cutout.width]
    before = np.bincount(objects.ravel(), minlength=len(areas) + 1)[1:]
    hidden = np.bincount(part[coverage(cutout) > 0.5], minlength=len(areas) + 1)[1:]
    return all(left_over >= visible * area for left_over, area in zip(before - hidden, areas, strict=True))
