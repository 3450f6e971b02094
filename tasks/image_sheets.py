"""Sheets of photographs with what a model found in them, drawn to the pixel, and the callback that gathers the photographs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional

from tasks.scene_pictures import save

DPI = 100
POINT = 72 / DPI
"""Points a pixel: matplotlib measures strokes and letters in points."""
INK = "#222222"


def photograph(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A normalised image (3, h, w) as colours in [0, 1], float32 (3, *size) on the CPU."""
    mean, deviation = torch.tensor((IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))[..., None, None]
    colours = image.detach().cpu().float() * deviation + mean
    shape = list(size)
    return functional.interpolate(colours[None], shape, mode="bilinear", antialias=True)[0].clamp(0, 1)


_CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
_OPPONENTS = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])


def perceived(colours: np.ndarray) -> np.ndarray:
    """Coordinates (n, 3) of sRGB colours in OKLab, where distance is about the difference one sees."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _CONES.T) @ _OPPONENTS.T


@cache
def class_colours(count: int) -> np.ndarray:
    """(count, 3) red, green, blue in [0, 1], a colour a class: each the farthest seen from all before, none near grey.

    The colour of a class doesn't depend on `count`, which is at most 255.
    """
    levels = np.linspace(0, 1, 11)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    colours = colours[(np.ptp(colours, axis=1) > 0.35) & (colours.max(1) > 0.35)]
    places = perceived(colours)
    chosen = [int(np.argmin(np.abs(colours - (0.9, 0.1, 0.1)).sum(1)))]
    apart = np.full(len(colours), np.inf)
    while len(chosen) < count:
        apart = np.minimum(apart, np.linalg.norm(places - places[chosen[-1]], axis=1))
        chosen.append(int(apart.argmax()))
    found = colours[chosen[:count]]
    found.setflags(write=False)  # it is shared
    return found


def fitted(height: int, width: int, cell: tuple[int, int]) -> tuple[int, int]:
    """The largest height and width of that aspect inside a cell, whole pixels."""
    factor = min(cell[0] / height, cell[1] / width)
    return max(1, round(height * factor)), max(1, round(width * factor))


class Sheet:
    """A page whose coordinates are its pixels, from the top left.

    Args:
        height: pixels.
        width: pixels.
    """

    def __init__(self, height: int, width: int) -> None:
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        self.page = self.figure.add_axes((0, 0, 1, 1))
        self.page.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
        self.page.axis("off")

    def image(self, colours: Tensor, top: float, left: float) -> None:
        """Lay a picture (3, h, w) on the page, a pixel on a pixel."""
        height, width = colours.shape[1:]
        extent = (left, left + width, top + height, top)
        self.page.imshow(colours.permute(1, 2, 0).numpy(), extent=extent, aspect="auto", interpolation="nearest")

    def write(self, text: str, top: float, left: float, size: float = 13, **style: Any) -> Any:
        """Text of `size` pixels whose box begins at (top, left)."""
        style = {"color": INK, "verticalalignment": "top"} | style
        return self.page.text(left, top, text, fontsize=size * POINT, parse_math=False, **style)

    def halo(self, text: str, top: float, left: float, size: float = 13, **style: Any) -> Any:
        """White text that can be read on any photograph."""
        outline = [withStroke(linewidth=3 * POINT, foreground=INK)]
        return self.write(text, top, left, size, **({"color": "white", "path_effects": outline} | style))

    def box(self, corners: Sequence[float], stroke: float, colour: Any, **style: Any) -> Rectangle:
        """The outline of x1, y1, x2, y2, `stroke` pixels wide and centred on them."""
        x1, y1, x2, y2 = corners
        outline = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=stroke * POINT, edgecolor=colour, **style)
        self.page.add_patch(outline)
        return outline

    def legend(self, entries: Sequence[tuple[str, Any]], top: int, left: int, columns: int, column: int) -> None:
        """A patch and a name for each entry, row by row, rows of `LEGEND_ROW` pixels and columns of `column`."""
        for number, (name, colour) in enumerate(entries):
            y, x = top + number // columns * LEGEND_ROW, left + number % columns * column
            self.page.add_patch(Rectangle((x, y), 14, 14, facecolor=colour, edgecolor=INK, linewidth=0.5 * POINT))
            letters = column // 8 - 3  # a letter of 13 pixels is about 8 wide
            self.write(name if len(name) <= letters else f"{name[: letters - 1]}…", y - 1, x + 20)

    def save(self, path: Path) -> Path:
        """Write the page as PNG, whole or not at all."""
        return save(self.figure, path, DPI)


LEGEND_ROW = 20

Shown = TypeVar("Shown")


class FirstImages(pl.Callback, Generic[Shown]):
    """Gathers what is shown of the first images of an evaluation and draws it once there are enough, or none come any more.

    Args:
        folder: where the picture goes.
        images: how many; 0 for none.

    Raises:
        ValueError: `images` is negative.
    """

    def __init__(self, folder: str | Path, images: int) -> None:
        if images < 0:
            raise ValueError(f"{type(self).__name__}: images={images}; give how many to draw, 0 for none")
        self.folder, self.images = Path(folder), images
        self.shown: list[Shown] = []
        self.done = False

    @abstractmethod
    def show(self, batch: Any, task: Any) -> list[Shown]:
        """What is kept of each image of a batch that the task has just measured."""

    @abstractmethod
    def draw(self, shown: Sequence[Shown], names: Sequence[str]) -> Path:
        """Draw what was kept; `names` are the classes'."""

    def _gather(self, trainer: pl.Trainer, task: Any, batch: Any) -> None:
        if self.done or not self.images or not trainer.is_global_zero or trainer.sanity_checking:
            return
        self.shown += self.show(batch, task)[: self.images - len(self.shown)]
        if len(self.shown) == self.images:
            self._finish(trainer)

    def _finish(self, trainer: Any) -> None:
        if self.shown:
            print(f"picture: {self.draw(self.shown, trainer.datamodule.class_names)}")
        self.shown, self.done = [], True

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *others: Any, **named: Any
    ) -> None:
        self._gather(trainer, pl_module, batch)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *others: Any, **named: Any
    ) -> None:
        self._gather(trainer, pl_module, batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._finish(trainer)
        self.done = False

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._finish(trainer)
        self.done = False
