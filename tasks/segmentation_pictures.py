"""Pictures of what a segmenter says in an evaluation: image, truth and prediction beside each other, with class names."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from datamodules.batches import SegmentationBatch
from tasks.image_sheets import LEGEND_ROW, FirstImages, Sheet, class_colours, fitted, photograph

CELL = (360, 400)
"""Greatest height and width of a photograph on the sheet, pixels."""
MARGIN, CAPTION, COLUMN = 12, 22, 200
OPACITY = 0.65
"""Of the colour of a class over the photograph, which is grey below it."""
NAMED = 0.02
"""Least share of the image that has its class written on it."""
IGNORED = 255


class Seen(NamedTuple):
    """An image as it is drawn: colours (3, h, w), true and predicted classes (h, w) at the same size, its name, and the
    share of pixels that are right at the file's size, NaN where none has a class."""

    picture: Tensor
    truth: Tensor
    prediction: Tensor
    name: str
    accuracy: float


def overlay(picture: Tensor, classes: Tensor, colours: Tensor) -> Tensor:
    """The photograph (3, h, w), grey and coloured by class (h, w); as it was where there is no class (255).

    Args:
        picture: colours in [0, 1].
        classes: int64.
        colours: (classes, 3) in [0, 1].
    """
    grey = (picture * picture.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    known = classes != IGNORED
    painted = colours.to(picture)[classes.where(known, 0)].permute(2, 0, 1)
    return torch.where(known, OPACITY * painted + (1 - OPACITY) * grey, picture)


def _places(classes: Tensor) -> list[tuple[int, int, int]]:
    """Class, row and column: for each class that is large enough, its pixel nearest to the middle of all its pixels."""
    places = []
    for label in classes.unique().tolist():
        pixels = (classes == label).nonzero().float()
        if label != IGNORED and len(pixels) >= NAMED * classes.numel():
            row, column = pixels[(pixels - pixels.mean(0)).norm(dim=1).argmin()].int().tolist()
            places.append((label, row, column))
    return places


def draw_segmentations(images: Sequence[Seen], names: Sequence[str], path: Path) -> Path:
    """One row an image: the photograph, the true classes over it, the predicted ones; below, the names of the classes.

    Args:
        images: at least one.
        names: of the classes.
        path: ends in .png; written whole or not at all.
    """
    colours = class_colours(len(names))
    present = sorted({c for seen in images for side in (seen.truth, seen.prediction) for c in side.unique().tolist()})
    present = [label for label in present if label != IGNORED]
    widest = max(seen.picture.shape[2] for seen in images)
    width = max(3 * widest + 4 * MARGIN, 3 * COLUMN)
    rows = [seen.picture.shape[1] + CAPTION + MARGIN for seen in images]
    entries = max(1, (width - MARGIN) // COLUMN)
    sheet = Sheet(2 * MARGIN + sum(rows) + ceil(len(present) / entries) * LEGEND_ROW, width)
    top = MARGIN
    for seen, row in zip(images, rows, strict=True):
        palette = torch.tensor(colours)
        panels = (
            (seen.name, seen.picture, None),
            ("truth", overlay(seen.picture, seen.truth, palette), seen.truth),
            (
                f"prediction, {100 * seen.accuracy:.1f} % of pixels right",
                overlay(seen.picture, seen.prediction, palette),
                seen.prediction,
            ),
        )
        for number, (caption, picture, classes) in enumerate(panels):
            left = MARGIN + number * (widest + MARGIN)
            sheet.write(caption, top, left)
            sheet.image(picture, top + CAPTION, left)
            for label, y, x in [] if classes is None else _places(classes):
                side = "left" if x < 40 else "right" if x > picture.shape[2] - 40 else "center"
                sheet.halo(
                    names[label], top + CAPTION + y, left + x, 12, horizontalalignment=side, verticalalignment="center"
                )
        top += row
    sheet.legend([(names[label], colours[label]) for label in present], top, MARGIN, entries, COLUMN)
    return sheet.save(path)


class SegmentationPictures(FirstImages[Seen]):
    """Draws the first images of an evaluation beside true and predicted classes: `segmentations.png`.

    The task gives `last_prediction`, for each image of the batch classes (h', w') int64 at the size of its file.

    Args:
        folder: where the picture goes.
        images: how many; 0 for none.
    """

    def __init__(self, folder: str | Path, images: int = 6) -> None:
        super().__init__(folder, images)

    def show(self, batch: SegmentationBatch, task: Any) -> list[Seen]:
        seen = []
        predictions: Sequence[Tensor] = task.last_prediction
        shapes = zip(batch.sizes.tolist(), batch.target_sizes.tolist(), strict=True)
        each = zip(batch.images, batch.targets, predictions, batch.image_ids, shapes, strict=True)
        for image, target, prediction, name, ((height, width), (rows, columns)) in each:
            truth, prediction = target[:rows, :columns].cpu(), prediction.cpu()
            known = truth != IGNORED
            size = fitted(rows, columns, CELL)
            seen.append(
                Seen(
                    photograph(image[:, :height, :width], size),
                    _resized(truth, size),
                    _resized(prediction, size),
                    name,
                    float((truth == prediction)[known].double().mean()),
                )
            )
        return seen

    def draw(self, shown: Sequence[Seen], names: Sequence[str]) -> Path:
        return draw_segmentations(shown, names, self.folder / "segmentations.png")


def _resized(classes: Tensor, size: tuple[int, int]) -> Tensor:
    shape = list(size)
    return functional.interpolate(classes[None, None].float(), shape, mode="nearest-exact")[0, 0].long()
