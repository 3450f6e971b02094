"""ADE20k (arXiv 1608.05442), or any segmentation set in the same folders, for UperNet and Mask2Former."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.batches import SegmentationBatch
from datamodules.resumable import ResumableLoader
from datamodules.segmentation_folder import IGNORED, SegmentationFolder, read_class_names
from datamodules.segmentation_transforms import (
    EvalTransform,
    PhotometricDistortion,
    SegmentationTransform,
    TrainTransform,
)


class Sample(NamedTuple):
    """A normalised image (3, h, w), its classes (h', w') uint8, and its file's name."""

    image: Tensor
    classes: Tensor
    name: str


class SegmentationImages(Dataset[Sample]):
    """A folder through a transform."""

    def __init__(self, folder: SegmentationFolder, transform: SegmentationTransform) -> None:
        self.folder, self.transform = folder, transform

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> Sample:
        return Sample(*self.transform(*self.folder.read(index)), self.folder.name(index))


def collate(samples: Sequence[Sample], least: tuple[int, int] = (0, 0)) -> SegmentationBatch:
    """Pad right and below, images with 0 and classes with 255, to the largest of the batch and at least `least`."""
    sizes = torch.tensor([sample.image.shape[-2:] for sample in samples])
    target_sizes = torch.tensor([sample.classes.shape for sample in samples])
    floor = torch.tensor(least)
    images = torch.zeros(len(samples), 3, *torch.maximum(sizes.amax(0), floor).tolist())
    shape = torch.maximum(target_sizes.amax(0), floor).tolist()
    targets = torch.full((len(samples), *shape), IGNORED, dtype=torch.int64)
    for number, (image, classes, _) in enumerate(samples):
        images[number, :, : image.shape[1], : image.shape[2]] = image
        targets[number, : classes.shape[0], : classes.shape[1]] = classes
    return SegmentationBatch(images, sizes, targets, target_sizes, tuple(sample.name for sample in samples))


class Ade20k(pl.LightningDataModule):
    """Images with a class for every pixel, as `SegmentationBatch`.

    `path` is laid out like ADEChallengeData2016: `images/{training,validation}/NAME.jpg`,
    `annotations/{training,validation}/NAME.png` with 0 for no class and class + 1 elsewhere, and `objectInfo150.txt`, whose
    rows name the classes. The test set's annotations aren't public: `test_dataloader` gives the validation set.

    Training: the short side at `train_short_side` times a random factor, a crop, a flip, distorted colours; every batch is
    padded to `crop_size`, drops the last incomplete one, and the trainer needs `use_distributed_sampler=False`.
    Evaluation: the whole image with its short side at `image_size`, and classes of the file's size; each image exactly once
    over all ranks, which differ by one image where they can't share evenly.

    Args:
        path: the folder above.
        image_size: short side in evaluation, pixels; the long side is at most 4 times that.
        batch_size: training images a batch and rank.
        num_classes: that `path` must hold, at most 254.
        train_short_side: short side in training before the random factor, pixels.
        crop_size: of training, one number or (height, width), pixels.
        scales: least and greatest factor.
        category_cap: crops are drawn again, up to 10 times, while one class covers more than this share.
        distort: change brightness, contrast, saturation and hue at random in training.
        eval_batch_size: more than 1 pads images to the largest of the batch.
        num_workers: loader processes a rank.
        pin_memory: copy batches to page-locked memory, for a GPU.
        persistent_workers: keep the loader processes from epoch to epoch.

    Attributes:
        num_classes: number of classes.
        class_names: their names in label order, after `setup`.

    Raises:
        ValueError: here, an argument out of range; in `setup`, what `SegmentationFolder` and `read_class_names` refuse.
        FileNotFoundError: in `setup`, a part of `path` isn't there.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        image_size: int,
        batch_size: int,
        num_classes: int = 150,
        train_short_side: int = 512,
        crop_size: int | Sequence[int] = 512,
        scales: Sequence[float] = (0.5, 2.0),
        category_cap: float = 0.75,
        distort: bool = True,
        eval_batch_size: int = 1,
        num_workers: int = 8,
        pin_memory: bool = True,
        persistent_workers: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(image_size, int) or image_size < 1:
            raise ValueError(
                f"image_size={image_size} (in evaluation resolution=): give the short side of the images, pixels"
            )
        crop = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
        if len(crop) != 2 or len(scales) != 2:
            raise ValueError(f"crop_size={crop_size} and scales={scales}: give two numbers each, or one crop_size")
        if not 1 <= num_classes < IGNORED:
            raise ValueError(f"num_classes={num_classes}: give 1 … {IGNORED - 1}; annotations have 8 bits")
        if batch_size < 1 or eval_batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"batch_size={batch_size} and eval_batch_size={eval_batch_size} must be at least 1, "
                f"num_workers={num_workers} at least 0"
            )
        self.path = Path(path)
        self.image_size, self.batch_size, self.eval_batch_size = image_size, batch_size, eval_batch_size
        self.num_classes = num_classes
        self._loading: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "persistent_workers": persistent_workers and num_workers > 0,
        }
        self.crop_size: tuple[int, int] = (crop[0], crop[1])
        self.train_transform = TrainTransform(
            short_side=train_short_side,
            crop_size=self.crop_size,
            scales=(scales[0], scales[1]),
            category_cap=category_cap,
            distortion=PhotometricDistortion() if distort else None,
        )
        self.eval_transform = EvalTransform(image_size=image_size)
        self.class_names: Sequence[str] = []
        self.train_images: SegmentationImages | None = None
        self.eval_images: SegmentationImages | None = None

    def setup(self, stage: str | None = None) -> None:
        """List and check the files; stages "validate" and "test" read only the validation split."""
        if not self.path.is_dir():
            raise FileNotFoundError(f"path={self.path} is no folder; give the folder ADEChallengeData2016")
        self.class_names = read_class_names(self.path, self.num_classes)
        self.eval_images = SegmentationImages(self._folder("validation"), self.eval_transform)
        if stage in ("fit", None):
            self.train_images = SegmentationImages(self._folder("training"), self.train_transform)

    def _folder(self, split: str) -> SegmentationFolder:
        return SegmentationFolder(self.path, split, self.num_classes)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of `batch_size` crops."""
        if self.train_images is None:
            raise RuntimeError('call setup("fit") before train_dataloader()')
        rank, world = self._rank_and_world()
        sampler: DistributedSampler[Sample] = DistributedSampler(
            self.train_images, world, rank, shuffle=True, drop_last=True
        )
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is more than the {len(sampler)} images an epoch gives each of "
                f"{world} ranks; lower it, or use fewer ranks"
            )
        return ResumableLoader(
            self.train_images,
            sampler,
            self.batch_size,
            drop_last=True,
            collate_fn=partial(collate, least=self.crop_size),
            # The workers' seeds come from here: with the same seed on every rank, each still augments differently.
            generator=torch.Generator().manual_seed((torch.initial_seed() + rank) % 2**63),
            **self._loading,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of whole images, each of this rank's share once."""
        if self.eval_images is None:
            raise RuntimeError('call setup("validate") before val_dataloader()')
        rank, world = self._rank_and_world()
        return DataLoader(
            self.eval_images,
            batch_size=self.eval_batch_size,
            sampler=range(rank, len(self.eval_images), world),  # torch's DistributedSampler would show some twice
            collate_fn=collate,
            **self._loading,
        )

    def test_dataloader(self) -> DataLoader[Any]:
        """The validation images."""
        return self.val_dataloader()

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
