"""Draws glyph scenes: what a picture shows, in coordinates that know no resolution.

The unit of length is the picture's shorter side, the origin its centre, x points right and y down.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_Number = TypeVar("_Number", int, float)

CLASS_NAMES: tuple[str, ...] = tuple("ACEHKMSTXZ")
DISTRACTORS = "0123456789?&%$#@+*="


@dataclass(frozen=True)
class Glyph:
    """One character in a scene.

    Attributes:
        character: what is written.
        family: index into the families of the split.
        face: position in [0, 1) along the faces (files) of that family.
        weight: position in [0, 1] along the weight axis, for a file that has one.
        size: the longer side of the ink, in units.
        centre: centre of the ink (x, y), in units.
        matrix: (2, 2) row-major map of the upright glyph: rotation, shear, stretch.
        tint: red, green, blue in [0, 1], before the renderer moves them away from the background.
        brighter: whether they are moved towards white rather than black, where both leave enough contrast.
    """

    character: str
    family: int
    face: float
    weight: float
    size: float
    centre: tuple[float, float]
    matrix: tuple[float, float, float, float]
    tint: tuple[float, float, float]
    brighter: bool


@dataclass(frozen=True)
class Scene:
    """A photograph seen through a window, small characters that mean nothing, and the glyph to be named.

    Attributes:
        label: class index of ``glyph``.
        photograph: index into the photographs of the split.
        window: centre (x, y) in [0, 1] of the window's possible range, and its side as a share of the shorter side.
        channels: a permutation of the colour channels.
        gain: contrast factor per channel. ``offset``: brightness added per channel, in [-1, 1].
        glyph: the glyph to be named, drawn last.
        distractors: small characters of no class, drawn before it.
    """

    label: int
    photograph: int
    window: tuple[float, float, float]
    channels: tuple[int, int, int]
    gain: tuple[float, float, float]
    offset: tuple[float, float, float]
    glyph: Glyph
    distractors: tuple[Glyph, ...]


@dataclass(frozen=True)
class SceneSettings:
    """How varied scenes are; every change makes another data set.

    Attributes:
        size: least and greatest size of the glyph, in units.
        rotation: greatest turn to either side, in degrees.
        shear: greatest shear to either side.
        stretch: greatest factor between width and height.
        distractors: greatest number of small characters.
        contrast: least difference of luminance between glyph and local background, in [0, 1].
        window: least and greatest side of the photograph's window, as a share of its shorter side.
    """

    size: tuple[float, float] = (0.5, 0.95)
    rotation: float = 10.0
    shear: float = 0.15
    stretch: float = 1.2
    distractors: int = 2
    contrast: float = 0.5
    window: tuple[float, float] = (0.25, 0.6)


def draw_scene(index: int, seed: tuple[int, ...], families: int, photographs: int, settings: SceneSettings) -> Scene:
    """Draws scene ``index`` of a split; the same arguments give the same scene.

    Args:
        index: position in the split; the class is ``index`` modulo the number of classes, so classes are balanced.
        seed: seed of the data set and number of the split.
        families: number of font families of the split.
        photographs: number of photographs of the split.
        settings: how varied scenes are.
    """
    random = np.random.default_rng((*seed, index))
    label = index % len(CLASS_NAMES)
    size = float(np.exp(random.uniform(*np.log(settings.size))))
    slack = max(0.0, 0.5 - 0.5 * size)
    centre = (float(random.uniform(-slack, slack)), float(random.uniform(-slack, slack)))
    glyph = _draw_glyph(random, CLASS_NAMES[label], size, centre, families, settings)
    distractors = []
    for _ in range(int(random.integers(0, settings.distractors + 1))):
        character = DISTRACTORS[int(random.integers(len(DISTRACTORS)))]
        place = (float(random.uniform(-1.0, 1.0)), float(random.uniform(-0.5, 0.5)))
        if random.random() < 0.75:
            place = (place[0] / 2, place[1])
        distractors.append(_draw_glyph(random, character, float(random.uniform(0.08, 0.2)), place, families, settings))
    window = (random.random(), random.random(), random.uniform(*settings.window))
    return Scene(
        label=label,
        photograph=int(random.integers(photographs)),
        window=(float(window[0]), float(window[1]), float(window[2])),
        channels=_triple(random.permutation(3), int),
        gain=_triple(random.uniform(0.3, 0.6, 3), float),
        offset=_triple(random.uniform(-0.2, 0.2) + random.uniform(-0.12, 0.12, 3), float),
        glyph=glyph,
        distractors=tuple(distractors),
    )


def _draw_glyph(
    random: np.random.Generator,
    character: str,
    size: float,
    centre: tuple[float, float],
    families: int,
    settings: SceneSettings,
) -> Glyph:
    angle = math.radians(random.uniform(-settings.rotation, settings.rotation))
    stretch = math.sqrt(math.exp(random.uniform(-1.0, 1.0) * math.log(settings.stretch)))
    shear = random.uniform(-settings.shear, settings.shear)
    cosine, sine = math.cos(angle), math.sin(angle)
    turn = np.array(((cosine, -sine), (sine, cosine)))
    matrix = turn @ np.array(((1.0, shear), (0.0, 1.0))) @ np.diag((stretch, 1.0 / stretch))
    return Glyph(
        character=character,
        family=int(random.integers(families)),
        face=float(random.random()),
        weight=float(random.random()),
        size=size,
        centre=centre,
        matrix=(float(matrix[0, 0]), float(matrix[0, 1]), float(matrix[1, 0]), float(matrix[1, 1])),
        tint=_triple(random.random(3), float),
        brighter=bool(random.random() < 0.5),
    )


def _triple(values: np.ndarray, kind: type[_Number]) -> tuple[_Number, _Number, _Number]:
    return kind(values[0]), kind(values[1]), kind(values[2])
