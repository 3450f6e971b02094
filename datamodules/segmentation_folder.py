"""Images with a class for every pixel, in the folder layout of ADEChallengeData2016 (ADE20k, arXiv 1608.05442)."""

from __future__ import annotations

import csv
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.labelled_images import decode_image

NAMES_FILE = "objectInfo150.txt"
IGNORED = 255
"""The class of pixels that have none."""


def read_class_names(path: Path, num_classes: int) -> list[str]:
    """The first of each class's synonyms in `objectInfo150.txt`: a header, then a row a class, separated by tabs.

    Raises:
        FileNotFoundError: no such file in `path`.
        ValueError: columns Idx or Name are missing, indices don't count up from 1, or rows aren't `num_classes`.
    """
    file = path / NAMES_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: it names the classes, and comes with ADEChallengeData2016")
    with file.open(newline="", encoding="utf-8") as text:
        rows = list(csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    names = []
    for number, row in enumerate(rows, 1):
        index, name = row.get("Idx"), row.get("Name")
        if not index or not name:
            raise ValueError(f"{file}: row {number} has no Idx or no Name; columns are separated by tabs")
        if index.strip() != str(number):
            raise ValueError(f"{file}: row {number} has Idx {index.strip()!r}; the rows must count up from 1")
        names.append(re.split("[,;]", name)[0].strip())
    if not names:
        raise ValueError(f"{file} has no row of a class; columns Idx and Name are separated by tabs")
    if len(names) != num_classes:
        raise ValueError(
            f"num_classes={num_classes}, but {file} has {len(names)} classes; set num_classes={len(names)}, or correct path"
        )
    return names


def _files(folder: Path, ending: str) -> set[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; path must hold images/ and annotations/ of ADE20k")
    with os.scandir(folder) as entries:
        return {entry.name.removesuffix(ending) for entry in entries if entry.name.endswith(ending)}


class SegmentationFolder:
    """One split: `images/SPLIT/*.jpg` and `annotations/SPLIT/*.png`, whose pixels are 0 for no class, or class + 1.

    Making one checks every file by its header, without decoding pixels.

    Args:
        path: holds `images` and `annotations`.
        split: "training" or "validation".
        num_classes: that annotations may name; at most 254.
        threads: that read headers at once, which hides the latency of a network's disk.

    Attributes:
        names: of the images, without ending, sorted; fixed-width bytes.

    Raises:
        FileNotFoundError: a folder is missing or empty.
        ValueError: an image without annotation or the reverse, sizes that differ, an annotation that isn't a single
            channel of 8 bits, a file that is no image. Names the first such file and counts them.
    """

    def __init__(self, path: str | Path, split: str, num_classes: int, threads: int = 8) -> None:
        self.images, self.annotations = Path(path) / "images" / split, Path(path) / "annotations" / split
        self.num_classes = num_classes
        images, annotations = _files(self.images, ".jpg"), _files(self.annotations, ".png")
        if not images:
            raise FileNotFoundError(f"{self.images} holds no .jpg; put the images of {split} there")
        faults = [
            *(
                f"{self.image_path(name)} has no annotation {self.annotation_path(name)}"
                for name in images - annotations
            ),
            *(f"{self.annotation_path(name)} has no image {self.image_path(name)}" for name in annotations - images),
        ]
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(self._fault, sorted(images & annotations))
            faults += [fault for fault in found if fault is not None]
        if faults:
            more = f" (and {len(faults) - 1} more such files)" if len(faults) > 1 else ""
            raise ValueError(f"{min(faults)}{more}")
        # One array instead of many strings: forked workers would copy the strings by counting references to them.
        self.names = np.array([os.fsencode(name) for name in sorted(images)], dtype=np.bytes_)

    def image_path(self, name: str) -> Path:
        return self.images / f"{name}.jpg"

    def annotation_path(self, name: str) -> Path:
        return self.annotations / f"{name}.png"

    def _fault(self, name: str) -> str | None:
        sizes = []
        for file in (self.image_path(name), self.annotation_path(name)):
            try:
                with Image.open(file) as opened:  # reads the header alone
                    sizes.append(opened.size)
                    mode = opened.mode
            except Exception as error:  # PIL raises OSError, SyntaxError, struct.error and others by format
                return f"{file} can't be read as an image: {type(error).__name__}"
        if mode not in ("P", "L"):
            return (
                f"{file} is an annotation of mode {mode}; it must be one channel of 8 bits, 0 for no class or class + 1"
            )
        if sizes[0] != sizes[1]:
            (w, h), (width, height) = sizes
            return f"{file} is {width} x {height} pixels (width x height), but its image is {w} x {h}"
        return None

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def read(self, index: int) -> tuple[Image.Image, Tensor]:
        """A colour image, and its classes (h, w) uint8 with 255 where there is none.

        Raises:
            ValueError: a file can't be decoded, or an annotation names a class past `num_classes`; names file and value.
        """
        file, annotation = self.image_path(self.name(index)), self.annotation_path(self.name(index))
        image = decode_image(file.read_bytes(), str(file))
        try:
            with Image.open(annotation) as opened:
                values = np.array(opened)
        except Exception as error:  # as above
            raise ValueError(f"cannot decode {annotation}: {type(error).__name__}: {error}") from error
        if (highest := int(values.max())) > self.num_classes:
            raise ValueError(
                f"{annotation} holds value {highest}, but num_classes={self.num_classes}: pixels must be 0 … "
                f"{self.num_classes}, 0 for no class"
            )
        return image, torch.from_numpy(values - np.uint8(1))  # 0 wraps round to 255
