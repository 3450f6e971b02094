"""Renders glyph scenes at any resolution: outlines rasterised and photographs resampled for the pixels asked for."""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datamodules.glyph_scenes import Glyph, Scene, SceneSettings
from datamodules.glyph_sources import Sources

_LUMINANCE = np.array((0.299, 0.587, 0.114))
_WEIGHTS = 4
_LEAST_OUTLINE = 128  # Below this, hinting would bend the outline.
_THUMBNAIL = 24


class SceneRenderer:
    """Draws scenes of one split.

    Args:
        sources: fonts and photographs of the split.
        settings: holds the least contrast between a glyph and its background.
    """

    def __init__(self, sources: Sources, settings: SceneSettings) -> None:
        self.contrast = settings.contrast
        self.families = tuple(sources.fonts.values())
        self.photographs = tuple(_load_photograph(path) for path in sources.photographs)

    def render(self, scene: Scene, height: int, width: int) -> np.ndarray:
        """Draws one scene.

        The shorter side is the unit of length: a longer image shows more of the same scene at both ends.

        Returns:
            Colours, uint8, shape (height, width, 3).
        """
        thumbnail = np.asarray(self._background(scene, _THUMBNAIL, _THUMBNAIL), np.float64) / 255.0
        image = self._background(scene, height, width)
        for glyph in (*scene.distractors, scene.glyph):
            colour = _contrasting_colour(glyph, thumbnail, self.contrast)
            image.paste(colour, (0, 0), self._coverage(glyph, height, width))
        return np.asarray(image)

    def _background(self, scene: Scene, height: int, width: int) -> Image.Image:
        photograph, (inner_height, inner_width) = self.photographs[scene.photograph]
        centre_x, centre_y, share = scene.window
        side = share * min(inner_height, inner_width)
        # The photograph is mirrored all round by half its size, so a wide window never leaves it at aspects up to 2.
        middle_x = inner_width / 2 + side / 2 + centre_x * (inner_width - side)
        middle_y = inner_height / 2 + side / 2 + centre_y * (inner_height - side)
        half_x, half_y = side * width / min(height, width) / 2, side * height / min(height, width) / 2
        box = (
            max(0.0, middle_x - half_x),
            max(0.0, middle_y - half_y),
            min(2.0 * inner_width, middle_x + half_x),
            min(2.0 * inner_height, middle_y + half_y),
        )
        image = photograph.resize((width, height), Image.Resampling.BILINEAR, box=box)
        bands = image.split()
        levels = np.arange(256)
        tinted = []
        for channel, gain, offset in zip(scene.channels, scene.gain, scene.offset, strict=True):
            table = np.clip(np.rint((levels - 127.5) * gain + 127.5 + 255.0 * offset), 0, 255).astype(int).tolist()
            tinted.append(bands[channel].point(table))
        return Image.merge("RGB", tinted)

    def _coverage(self, glyph: Glyph, height: int, width: int) -> Image.Image:
        # Twice the resolution, then a 2x2 mean: the edge of an outline covers a pixel in part.
        unit = 2 * min(height, width)
        level = 16
        while level < glyph.size * unit:
            level *= 2
        faces = self.families[glyph.family]
        face = faces[int(glyph.face * len(faces))]
        bitmap = _glyph_bitmap(face, round(glyph.weight * (_WEIGHTS - 1)), glyph.character, level)
        ink = max(bitmap.size) - 4  # The bitmap has a margin of two pixels.
        a, b, c, d = glyph.matrix
        determinant = (a * d - b * c) * glyph.size * unit / ink
        inverse = (d / determinant, -b / determinant, -c / determinant, a / determinant)
        origin_x, origin_y = width + glyph.centre[0] * unit, height + glyph.centre[1] * unit
        shift_x = bitmap.width / 2 - inverse[0] * origin_x - inverse[1] * origin_y
        shift_y = bitmap.height / 2 - inverse[2] * origin_x - inverse[3] * origin_y
        canvas = bitmap.transform(
            (2 * width, 2 * height),
            Image.Transform.AFFINE,
            (inverse[0], inverse[1], shift_x, inverse[2], inverse[3], shift_y),
            Image.Resampling.BILINEAR,
        )
        return canvas.reduce(2)


def _contrasting_colour(glyph: Glyph, thumbnail: np.ndarray, contrast: float) -> tuple[int, int, int]:
    # thumbnail: (T, T, 3), the background of the unit square; it fixes the colour whatever resolution is rendered.
    count = len(thumbnail)
    left, top = ((np.array(glyph.centre) - glyph.size / 2 + 0.5) * count).clip(0, count - 1).astype(int)
    right, bottom = np.ceil((np.array(glyph.centre) + glyph.size / 2 + 0.5) * count).clip(1, count).astype(int)
    patch = thumbnail[top : max(bottom, top + 1), left : max(right, left + 1)]  # (h, w, 3)
    background = float((patch @ _LUMINANCE).mean())
    colour = np.array(glyph.tint)
    lightness = float(colour @ _LUMINANCE)
    if abs(lightness - background) < contrast:
        brighter = glyph.brighter if contrast <= background <= 1.0 - contrast else background < 0.5
        goal = background + contrast if brighter else background - contrast
        if goal > lightness:
            colour = colour + (1.0 - colour) * min(1.0, (goal - lightness) / (1.0 - lightness))
        else:
            colour = colour * max(0.0, goal / lightness)
    red, green, blue = np.rint(colour * 255.0).astype(int).tolist()
    return red, green, blue


@lru_cache(maxsize=16384)
def _glyph_bitmap(path: Path, weight: int, character: str, level: int) -> Image.Image:
    """Rasterises one character so that the longer side of its ink is about ``level`` pixels, with a margin of two."""
    size = max(level, _LEAST_OUTLINE)
    font = _load_font(path, weight, size)
    left, top, right, bottom = font.getbbox(character)
    font = _load_font(path, weight, max(1, round(size * size / max(right - left, bottom - top, 1))))
    left, top, right, bottom = font.getbbox(character)
    bitmap = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2))
    ImageDraw.Draw(bitmap).text((1 - left, 1 - top), character, fill=255, font=font)
    bitmap = bitmap.crop(bitmap.getbbox())
    factor = size // level
    if factor > 1:
        columns, rows = (math.ceil(side / factor) * factor for side in bitmap.size)
        even = Image.new("L", (columns, rows))
        even.paste(bitmap, ((columns - bitmap.width) // 2, (rows - bitmap.height) // 2))
        bitmap = even.reduce(factor)
    framed = Image.new("L", (bitmap.width + 4, bitmap.height + 4))
    framed.paste(bitmap, (2, 2))
    return framed


@lru_cache(maxsize=1024)
def _load_font(path: Path, weight: int, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    if "[" in path.name:
        values = []
        for axis in font.get_variation_axes():
            least, default, greatest = (float(axis[key] or 0) for key in ("minimum", "default", "maximum"))
            is_weight = axis.get("name") in (b"Weight", "Weight")
            values.append(least + (greatest - least) * weight / (_WEIGHTS - 1) if is_weight else default)
        font.set_variation_by_axes(values)
    return font


def _load_photograph(path: Path) -> tuple[Image.Image, tuple[int, int]]:
    with Image.open(path) as file:
        pixels = np.asarray(file.convert("RGB"))  # (H, W, 3)
    height, width = pixels.shape[:2]
    margin = ((height // 2, height - height // 2), (width // 2, width - width // 2), (0, 0))
    return Image.fromarray(np.pad(pixels, margin, mode="symmetric")), (height, width)
