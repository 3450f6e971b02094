"""Pictures of what a detector finds in an evaluation: boxes with class and score, the truth dashed, as one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.patheffects import withStroke
from torch import Tensor

from datamodules.batches import Boxes, DetectionBatch
from models.dense import Detections
from tasks.image_sheets import INK, POINT, FirstImages, Sheet, class_colours, fitted, photograph

CELL = (420, 480)
"""Greatest height and width of a photograph on the sheet, pixels."""
MARGIN, CAPTION, COLUMNS = 12, 22, 4


class Found(NamedTuple):
    """An image as it is drawn: colours (3, h, w), boxes in its pixels, and its id."""

    picture: Tensor
    truth: Boxes
    detections: Detections


def found(image: Tensor, size: Sequence[int], truth: Boxes, detections: Detections) -> Found:
    """Cut the padding of a normalised image (3, H, W) away and bring it, and what is in it, to the size of a cell.

    Args:
        image: of a batch.
        size: height and width of what isn't padding.
        truth: boxes in pixels of the batch's image.
        detections: likewise.
    """
    height, width = (int(side) for side in size)
    shape = fitted(height, width, CELL)
    scale = truth.boxes.new_tensor([shape[1] / width, shape[0] / height]).repeat(2).cpu()
    return Found(
        photograph(image[:, :height, :width], shape),
        truth._replace(boxes=truth.boxes.cpu() * scale, labels=truth.labels.cpu()),
        Detections(detections.boxes.cpu().float() * scale, detections.scores.cpu(), detections.labels.cpu()),
    )


def draw_detections(images: Sequence[Found], names: Sequence[str], path: Path, threshold: float) -> Path:
    """One sheet of images with the detections above a score and the true boxes.

    Args:
        images: at least one.
        names: of the classes.
        path: ends in .png; written whole or not at all.
        threshold: least score that is drawn.
    """
    columns = min(COLUMNS, ceil(len(images) ** 0.5))
    rows = ceil(len(images) / columns)
    tallest = max(image.picture.shape[1] for image in images)
    widest = max(image.picture.shape[2] for image in images)
    row, column = tallest + CAPTION + MARGIN, widest + MARGIN
    sheet = Sheet(MARGIN + rows * row + CAPTION, max(MARGIN + columns * column, 400))
    colours = class_colours(len(names))
    for number, (picture, truth, detections) in enumerate(images):
        top, left = MARGIN + number // columns * row, MARGIN + number % columns * column
        kept = [index for index, score in enumerate(detections.scores.tolist()) if score >= threshold]
        sheet.write(f"image {truth.image_id}: {len(kept)} found, {len(truth.boxes)} true", top, left)
        top += CAPTION
        sheet.image(picture, top, left)
        for x1, y1, x2, y2 in truth.boxes.tolist():
            corners = (left + x1, top + y1, left + x2, top + y2)
            sheet.box(corners, 2, INK, linestyle=(0, (4, 4)), zorder=3)
            sheet.box(corners, 1, "white", linestyle=(0, (8, 8)), zorder=3)
        for index in reversed(kept):  # the best on top
            x1, y1, x2, y2 = detections.boxes[index].tolist()
            label = int(detections.labels[index])
            colour = colours[label]
            outline = sheet.box((left + x1, top + y1, left + x2, top + y2), 2, colour, zorder=2)
            outline.set_path_effects([withStroke(linewidth=4 * POINT, foreground="white", alpha=0.5)])
            light = colour @ (0.299, 0.587, 0.114) > 0.5
            above = y1 >= 16
            sheet.write(
                f"{names[label]} {100 * float(detections.scores[index]):.0f}",
                top + y1 - 1 if above else top + y1 + 1, left + x1, 11, color="black" if light else "white",
                verticalalignment="bottom" if above else "top", zorder=4,
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.85},
            )  # fmt: skip
    note = f"found: class and score in percent, at least {100 * threshold:g}; true boxes are dashed"
    sheet.write(note, MARGIN + rows * row, MARGIN, 12)
    return sheet.save(path)


class DetectionPictures(FirstImages[Found]):
    """Draws the first images of an evaluation with found and true boxes: `detections.png`.

    The task gives `last_detections`, boxes in pixels of the batch's images, best first.

    Args:
        folder: where the picture goes.
        images: how many; 0 for none.
        threshold: least score that is drawn.
    """

    def __init__(self, folder: str | Path, images: int = 8, threshold: float = 0.4) -> None:
        super().__init__(folder, images)
        self.threshold = threshold

    def show(self, batch: DetectionBatch, task: Any) -> list[Found]:
        sizes = batch.sizes.tolist()
        return [found(*each) for each in zip(batch.images, sizes, batch.targets, task.last_detections, strict=True)]

    def draw(self, shown: Sequence[Found], names: Sequence[str]) -> Path:
        return draw_detections(shown, names, self.folder / "detections.png", self.threshold)
