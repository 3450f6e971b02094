"""COCO's instance annotations (arXiv 1405.0312) as arrays, checked before anything trains on them."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# Real annotations hold boxes that pass the border by rounding, and a very few that have no width or height. An export gone
# wrong (other units, other image sizes, corners for extents) spoils far more than this.
BORDER = 1.0  # pixels that a box may pass the border by
EMPTY_SHARE = 1e-4  # of the annotations that may have boxes without area


class AnnotationError(ValueError):
    """An annotation file doesn't hold together; the message names the file and the image or annotation, in one line."""


@dataclass(frozen=True)
class Annotations:
    """n images with m objects; those of image i are the rows offsets[i] … offsets[i + 1].

    Attributes:
        file: where they come from.
        file_names: (n,) bytes.
        image_ids: (n,) int64.
        sizes: (n, 2) int64: height and width, pixels.
        offsets: (n + 1,) int64.
        boxes: (m, 4) float64: x1, y1, x2, y2, pixels, inside the image.
        labels: (m,) int64: 0 … classes − 1, in the order of the category ids.
        areas: (m,) float64: of the object, pixels.
        crowd: (m,) bool.
        annotation_ids: (m,) int64.
        category_ids: (classes,) int64.
        class_names: one a class.
    """

    file: Path
    file_names: np.ndarray
    image_ids: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    annotation_ids: np.ndarray
    category_ids: np.ndarray
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        """The file name of an image."""
        return os.fsdecode(self.file_names[index])


def read_annotations(file: Path, folder: Path, border: float = BORDER) -> Annotations:
    """Reads and checks an `instances_*.json`.

    Boxes are cut at the border of their image. Those without area are left out, counted in a warning with their ids.
    Images without objects stay.

    Args:
        file: of the annotations.
        folder: that must hold the images; it is listed, not read.
        border: pixels that a box may pass the border of its image by.

    Raises:
        FileNotFoundError: the file, the folder or an image of it isn't there.
        AnnotationError: the JSON is corrupt; a key is missing or of another type; an id is there twice; an annotation has
            an image or category that isn't there, a box outside its image or (more than one in 10,000) without area, a
            number that isn't finite, or a mask of another size than its image.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; put the annotations there, as cocodataset.org packs them")
    content = _parse(file)
    images, annotations, categories = (_list(file, content, key) for key in ("images", "annotations", "categories"))

    category_ids = _integers(file, "category", categories, "id")
    _check_unique(file, "category", category_ids)
    names = _column(file, "category", categories, "name", str)
    if len(set(names)) < len(names):
        raise AnnotationError(f"{file}: two categories are called {max(names, key=names.count)!r}; give each its name")
    by_id = np.argsort(category_ids)
    image_ids = _integers(file, "image", images, "id")
    _check_unique(file, "image", image_ids)
    sizes = np.stack([_integers(file, "image", images, key) for key in ("height", "width")], 1)
    _refuse(file, "image", image_ids, (sizes < 1).any(1), "has no pixels: height {}, width {}", sizes)
    file_names = _column(file, "image", images, "file_name", str)
    _check_files(file, folder, image_ids, file_names)

    ids = _integers(file, "annotation", annotations, "id")
    _check_unique(file, "annotation", ids)
    of_image, image = _look_up(image_ids, _integers(file, "annotation", annotations, "image_id"))
    _refuse(file, "annotation", ids, ~of_image.known, "is of image {}, which is not there", of_image.wanted)
    of_class, label = _look_up(category_ids[by_id], _integers(file, "annotation", annotations, "category_id"))
    _refuse(file, "annotation", ids, ~of_class.known, "is of category {}, which is not there", of_class.wanted)
    crowd = _integers(file, "annotation", annotations, "iscrowd")
    _refuse(file, "annotation", ids, (crowd < 0) | (crowd > 1), "has iscrowd {}; give 0 or 1", crowd)
    areas = _floats(file, annotations, "area", ())
    _refuse(file, "annotation", ids, ~(np.isfinite(areas) & (areas >= 0)), "has area {}", areas)
    _check_mask_sizes(file, annotations, ids, sizes[image])
    boxes = _floats(file, annotations, "bbox", (4,))
    kept, boxes = _check_boxes(file, ids, boxes, sizes[image], border)

    order = np.flatnonzero(kept)[np.argsort(image[kept], kind="stable")]
    counts = np.bincount(image[order], minlength=len(images))
    return Annotations(
        file=file,
        file_names=np.array([os.fsencode(name) for name in file_names], dtype=np.bytes_),  # one array: see FolderImages
        image_ids=image_ids,
        sizes=sizes,
        offsets=np.concatenate(([0], np.cumsum(counts))),
        boxes=boxes[order],
        labels=label[order],
        areas=areas[order],
        crowd=crowd[order].astype(bool),
        annotation_ids=ids[order],
        category_ids=category_ids[by_id],
        class_names=[names[index] for index in by_id],
    )


def _parse(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{file} is corrupt at byte {_bytes_before(error)}: {error}; fetch it again") from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{file} is corrupt at byte {error.start}: {error.reason}; fetch it again") from error
    except RecursionError as error:
        raise AnnotationError(f"{file} is corrupt: brackets without end; fetch it again") from error
    if not isinstance(content, dict):
        raise AnnotationError(
            f"{file} holds a {type(content).__name__} where COCO has an object with images; correct path"
        )
    return content


def _bytes_before(error: json.JSONDecodeError) -> int:
    return len(error.doc[: error.pos].encode("utf-8", "surrogatepass"))


def _list(file: Path, content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    rows = content.get(key)
    if not isinstance(rows, list):
        raise AnnotationError(
            f"{file} has no list {key!r}; COCO's instance files have images, annotations and categories"
        )
    if key != "annotations" and not rows:
        raise AnnotationError(f"{file}: the list {key!r} is empty")
    wrong = next((index for index, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise AnnotationError(f"{file}: {key}[{wrong}] is {_shown(rows[wrong])}; it must be an object")
    return rows


def _column(
    file: Path, kind: str, rows: Sequence[Mapping[str, Any]], key: str, wanted: type | tuple[type, ...]
) -> list:
    """Values of a key in every row, of a wanted type; booleans are no numbers."""
    try:
        values = [row[key] for row in rows]
    except KeyError:
        index = next(index for index, row in enumerate(rows) if key not in row)
        raise AnnotationError(f"{file}: {_named(kind, rows[index], index)} has no {key!r}") from None
    allowed = wanted if isinstance(wanted, tuple) else (wanted,)
    if not set(map(type, values)) <= set(allowed):
        index = next(index for index, value in enumerate(values) if type(value) not in allowed)
        names = " or ".join(each.__name__ for each in allowed)
        raise AnnotationError(
            f"{file}: {_named(kind, rows[index], index)} has {key!r} {_shown(values[index])}; it must be {names}"
        )
    return values


def _integers(file: Path, kind: str, rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    values = _column(file, kind, rows, key, int)
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        index = next(index for index, value in enumerate(values) if not -(2**63) <= value < 2**63)
        raise AnnotationError(f"{file}: {kind} {rows[index]['id']} has {key!r} {values[index]}; give less") from None


def _floats(file: Path, annotations: Sequence[Mapping[str, Any]], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """(rows, *shape) float64, where every value is a number or a list of `shape` numbers."""
    values: Any = _column(file, "annotation", annotations, key, list if shape else (float, int))
    if shape:
        wrong = next((i for i, v in enumerate(values) if len(v) != 4 or not set(map(type, v)) <= {float, int}), None)
        if wrong is not None:
            raise AnnotationError(
                f"{file}: {_named('annotation', annotations[wrong], wrong)} has {key!r} {_shown(values[wrong])}; "
                "it must be x, y, width and height"
            )
    try:
        return np.array(values, dtype=np.float64).reshape(-1, *shape)
    except OverflowError:
        index = next(i for i, v in enumerate(values) if any(abs(n) > sys.float_info.max for n in (v if shape else [v])))
        raise AnnotationError(
            f"{file}: {_named('annotation', annotations[index], index)} has {key!r} {_shown(values[index])}; give less"
        ) from None


@dataclass(frozen=True)
class _Found:
    wanted: np.ndarray
    known: np.ndarray


def _look_up(ids: np.ndarray, wanted: np.ndarray) -> tuple[_Found, np.ndarray]:
    """Which of the wanted ids are known, and where in `ids` they are (anywhere, if they aren't)."""
    order = np.argsort(ids)
    place = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    return _Found(wanted, ids[place] == wanted), place


def _check_unique(file: Path, kind: str, ids: np.ndarray) -> None:
    found, counts = np.unique(ids, return_counts=True)
    _refuse(file, kind, found, counts > 1, "is there {} times; ids are unique", counts)


def _check_files(file: Path, folder: Path, ids: np.ndarray, names: Sequence[str]) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; put the images that {file} annotates there")
    present = set(os.listdir(folder))
    missing = [index for index, name in enumerate(names) if name not in present]
    if missing:
        raise FileNotFoundError(
            f"{folder / names[missing[0]]}, image {ids[missing[0]]} of {file}, is not there"
            f"{_more(len(missing))}; unpack the images again"
        )


def _check_mask_sizes(file: Path, annotations: Sequence[Mapping[str, Any]], ids: np.ndarray, sizes: np.ndarray) -> None:
    """Run-length masks tell their size; polygons don't."""
    for index, annotation in enumerate(annotations):
        mask = annotation.get("segmentation")
        if isinstance(mask, dict) and mask.get("size") != (size := sizes[index].tolist()):
            raise AnnotationError(
                f"{file}: annotation {ids[index]} has a mask of size {_shown(mask.get('size'))}, "
                f"but its image {annotation['image_id']} has {size} (height, width)"
            )


def _check_boxes(
    file: Path, ids: np.ndarray, boxes: np.ndarray, sizes: np.ndarray, border: float
) -> tuple[np.ndarray, np.ndarray]:
    """(m,) bool that is False where a box is left out, and corners (m, 4) inside the images."""
    _refuse(file, "annotation", ids, ~np.isfinite(boxes).all(1), "has a box that is not finite: {} {} {} {}", boxes)
    shown = "(x, y, width, height) = ({}, {}, {}, {})"
    _refuse(file, "annotation", ids, (boxes[:, 2:] < 0).any(1), f"has a box of negative size, {shown}", boxes)
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1)
    extent = sizes[:, ::-1].astype(np.float64)  # width, height
    limits = np.concatenate((np.zeros_like(extent), extent), 1)  # (m, 4)
    beyond = np.maximum(-corners[:, :2], corners[:, 2:] - extent).max(1, initial=0.0)
    _refuse(
        file,
        "annotation",
        ids,
        beyond > border,
        f"has a box {shown} that leaves its image, which is {{}} x {{}} (width x height), by more than {border:g} pixels",
        np.concatenate((boxes, extent), 1),
    )
    corners = np.clip(corners, 0.0, np.tile(limits[:, 2:], 2))
    empty = (corners[:, 2:] <= corners[:, :2]).any(1)
    if empty.sum() > EMPTY_SHARE * len(ids):
        _refuse(file, "annotation", ids, empty, f"has a box without area, {shown}", boxes)
    elif empty.any():
        some = ", ".join(map(str, ids[empty][:5])) + (", …" if empty.sum() > 5 else "")
        logger.warning("%s: left out %d boxes without area, of annotations %s", file, empty.sum(), some)
    if (beyond > 0).any():
        logger.info("%s: cut %d boxes at the border of their image", file, (beyond > 0).sum())
    return ~empty, corners


def _refuse(file: Path, kind: str, ids: np.ndarray, wrong: Any, reason: str, values: np.ndarray) -> None:
    """Raise AnnotationError for the first wrong row; `reason` has a place for each of its values."""
    rows = np.flatnonzero(wrong)
    if len(rows):
        told = reason.format(*(f"{value:.10g}" for value in np.atleast_1d(values[rows[0]])))
        raise AnnotationError(f"{file}: {kind} {ids[rows[0]]} {told}{_more(len(rows))}")


def _more(count: int) -> str:
    return f" ({count - 1} more like it)" if count > 1 else ""


def _named(kind: str, row: Mapping[str, Any], index: int) -> str:
    place: Iterable[Any] = (f"id {_shown(row['id'])}",) if "id" in row else ()
    return " ".join((kind, *place, f"(number {index} of the list)"))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
