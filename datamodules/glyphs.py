"""Letters in photographs: an image set that pip brings, native at every resolution and split by font family.

Each scene is drawn once from a seed and rendered for the resolution asked for, so a test set is the same pictures at
every resolution, each with all the detail its pixels can hold.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.batches import ImageBatch
from datamodules.embedded_source import cache_folder
from datamodules.glyph_scenes import CLASS_NAMES, SceneSettings
from datamodules.glyph_sources import Split, prepare_sources
from datamodules.glyph_store import RenderedSplit, labels_of, open_rendered, render_once
from datamodules.random_resized_crop import BatchRandomResizedCrop
from datamodules.resumable import ResumableLoader

MEAN = 0.45
STANDARD_DEVIATION = 0.25


class GlyphImages(Dataset[tuple[np.ndarray, int]]):
    """A rendered split as a map-style dataset.

    Items are ``(colours, label)``: uint8 of shape (H, W, 3) and the class index.

    Args:
        images: uint8, shape (N, H, W, 3), usually memory-mapped.
        labels: int64, shape (N,).
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


class CollateImages:
    """Makes an ``ImageBatch`` of dataset items: to float, normalised, and cropped where a crop is given.

    Args:
        crop: applied to the whole batch; None leaves the images as they are.
    """

    def __init__(self, crop: BatchRandomResizedCrop | None = None) -> None:
        self.crop = crop

    def __call__(self, items: Sequence[tuple[np.ndarray, int]]) -> ImageBatch:
        colours = torch.from_numpy(np.stack([image for image, _ in items]))  # (B, H, W, 3)
        images: Tensor = colours.permute(0, 3, 1, 2).contiguous().float()
        images = images.div_(255.0 * STANDARD_DEVIATION).sub_(MEAN / STANDARD_DEVIATION)
        if self.crop is not None:
            images = self.crop(images)
        return ImageBatch(images, torch.tensor([label for _, label in items], dtype=torch.int64))


class Glyphs(lightning.LightningDataModule):
    """Letters in photographs, 10 balanced classes.

    The fonts and photographs are downloaded with pip at first use (about 25 MB) and every split is rendered once per
    resolution, into ``$ROTALITH_CACHE`` or ``~/.cache/rotalith``. Training scenes are rendered at twice ``image_size``
    and randomly cropped; validation and test scenes are rendered at ``image_size`` and not cropped.

    Args:
        image_size: side in pixels, or (height, width).
        batch_size: images per batch and rank.
        num_classes: for configs to read; the set has ten.
        num_workers: loader processes.
        crop_scale: least and greatest area of the training crop.
        train_size: number of training scenes.
        val_size: number of validation scenes.
        test_size: number of test scenes.
        seed: seed of the scenes; loaders shuffle with torch's global generator.
        settings: how varied the scenes are.
        cache: the cache folder where it is not the usual one.
    """

    num_classes: int = len(CLASS_NAMES)
    class_names: tuple[str, ...] = CLASS_NAMES

    def __init__(
        self,
        image_size: int | Sequence[int] = 32,
        batch_size: int = 128,
        num_classes: int = len(CLASS_NAMES),
        num_workers: int = 0,
        crop_scale: Sequence[float] = (0.2, 1.0),
        train_size: int = 16384,
        val_size: int = 1024,
        test_size: int = 1024,
        seed: int = 0,
        settings: SceneSettings | None = None,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__()
        if num_classes != len(CLASS_NAMES):
            raise ValueError(
                f"Glyphs has {len(CLASS_NAMES)} classes: set datamodule.num_classes to that, not {num_classes}"
            )
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size: tuple[int, int] = (height, width)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.crop_scale = (crop_scale[0], crop_scale[1])
        self.sizes: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        self.seed = seed
        self.settings = settings or SceneSettings()
        self.cache = Path(cache) if cache else cache_folder()
        self.datasets: dict[Split, GlyphImages] = {}

    def rendered(self, split: Split) -> RenderedSplit:
        """Describes the array that a split is read from."""
        height, width = self.image_size
        factor = 2 if split == "train" else 1
        return RenderedSplit(split, factor * height, factor * width, self.sizes[split], self.seed, self.settings)

    def prepare_data(self) -> None:
        """Downloads fonts and photographs where the cache lacks them; `setup` renders the splits that a stage needs."""
        prepare_sources(self.cache)

    def setup(self, stage: str | None = None) -> None:
        """Opens the splits of a stage, rendering them first where the cache lacks them.

        Args:
            stage: "fit" (train and val), "validate", "test", or None for all three splits.

        Raises:
            SourceError: if a cached array is altered, or a source cannot be downloaded.
        """
        splits: dict[str | None, tuple[Split, ...]] = {
            "fit": ("train", "val"), "validate": ("val",), "test": ("test",),
            None: ("train", "val", "test"),
        }  # fmt: skip
        for split in splits[stage]:
            if split not in self.datasets:
                images = open_rendered(self._render_once(split), self.rendered(split))
                self.datasets[split] = GlyphImages(images, labels_of(self.sizes[split]))

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """Returns shuffled, cropped batches of the training fonts; an incomplete last batch is dropped."""
        images, (rank, world) = cast("Dataset[Any]", self.datasets["train"]), self._rank_and_world()
        crop = BatchRandomResizedCrop(self.image_size, self.crop_scale)
        sampler: DistributedSampler[Any] = DistributedSampler(images, world, rank, seed=self.seed, drop_last=True)
        return ResumableLoader(
            images,
            sampler,
            self.batch_size,
            drop_last=True,
            collate_fn=CollateImages(crop),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> DataLoader[ImageBatch]:
        """Returns batches of the validation fonts, in order."""
        return self._held_out("val")

    def test_dataloader(self) -> DataLoader[ImageBatch]:
        """Returns batches of the test fonts, in order."""
        return self._held_out("test")

    def _render_once(self, split: Split) -> Path:
        return render_once(self.rendered(split), self.cache, lambda: prepare_sources(self.cache))

    def _held_out(self, split: Split) -> DataLoader[ImageBatch]:
        rank, world = self._rank_and_world()
        # The dataset's items are pairs; what the loader yields is what the collate function makes of them.
        images = cast("Dataset[Any]", self.datasets[split])
        return DataLoader(
            images,
            batch_size=self.batch_size,
            sampler=range(rank, self.sizes[split], world),
            num_workers=self.num_workers,
            collate_fn=CollateImages(),
            persistent_workers=self.num_workers > 0,
        )

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
