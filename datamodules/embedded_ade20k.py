"""Scenes of real cut-outs over real photographs as an ADE20k data set (arXiv 1608.05442), made of pip's downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datamodules.ade20k import Ade20k
from datamodules.cutout_folders import ADE20K_NAMES, CutoutFolder, write_ade20k
from datamodules.cutout_scenes import SceneSettings


class EmbeddedAde20k(Ade20k):
    """The photograph and ten classes of pictograms, written once as an ADE20k folder and read by `Ade20k` as any other.

    Args:
        num_classes: eleven; for configs to read.
        train_size: number of training images.
        val_size: number of validation images, which show other cut-outs over other photographs.
        seed: seed of the scenes.
        settings: how varied the scenes are.
        cache: the cache folder where it is not the usual one.
        **options: those of `Ade20k`, but for `path`.

    Raises:
        SourceError: in `prepare_data`, a wheel cannot be had or is altered.
    """

    def __init__(
        self,
        *,
        num_classes: int = len(ADE20K_NAMES),
        train_size: int = 2048,
        val_size: int = 256,
        seed: int = 0,
        settings: SceneSettings | None = None,
        cache: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.folder = CutoutFolder(
            "ade20k", write_ade20k, {"train": train_size, "val": val_size}, seed, settings, cache
        )
        super().__init__(path=self.folder.path, num_classes=num_classes, **options)

    def prepare_data(self) -> None:
        """Download and write what the cache lacks, half a minute; Lightning runs it once a node, before any `setup`."""
        self.folder.prepare()
