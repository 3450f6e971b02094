"""ImageNet-1k, or any image classification set laid out like it, for the RoPE-ViT recipes (arXiv 2403.13298)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from datamodules.augment import EvalTransform, TrainTransform
from datamodules.image_folder import FolderImages
from datamodules.image_shards import INDEX_NAME, ShardImages, write_index
from datamodules.labelled_images import CorruptBudget, ImageSource, LabelledImages
from datamodules.mixing import Mixing, collate
from datamodules.resumable import ResumableLoader


class ImageNet(pl.LightningDataModule):
    """Training and validation images with class labels, as `ImageBatch`.

    `path` is one folder with `train/` and `val/`, each in either layout:

    - class folders, `train/<class>/*.JPEG`; labels follow the sorted folder names;
    - WebDataset shards, `train/*.tar` with KEY.jpg and KEY.cls, and `classes.txt` beside `train/` with one class name a
      line in label order (optional). `prepare_data` indexes new shards once, into `train/index.npz`.

    ImageNet's test labels aren't public: `test_dataloader` is the validation set, as in the papers.

    The samplers split the work over ranks themselves, so the trainer needs `use_distributed_sampler=False`; Lightning
    calls their `set_epoch`. Training drops the last incomplete batch. Evaluation sees each image exactly once: ranks
    differ by one image where they can't share evenly, so a validation step must hold no collective of its own.

    Args:
        path: the folder above.
        image_size: output size in pixels, one number or (height, width).
        batch_size: images a batch and rank; even when `mix` is on.
        train_transform: training recipe; called with `image_size=(height, width)`.
        eval_crop_ratio: evaluation resizes to int(size / ratio) and cuts the centre: 1.0 for ViT, 0.875 for Swin.
        num_classes: classes that `path` must hold.
        num_workers: loader processes a rank.
        repeats: repeated augmentation: a training epoch shows 1/repeats of the images, each repeats times (timm's
            `RepeatAugSampler`; copies of an image go to different ranks). 1 shows every image once.
        mix: mixup and CutMix for training batches; called with `num_classes=…`. None keeps integer targets.
        corrupt_budget: undecodable training images a rank may skip, each logged; one more ends the run. In evaluation
            the first is an error.
        pin_memory: copy batches to page-locked memory, for a GPU.
        persistent_workers: keep the loader processes from epoch to epoch.

    Attributes:
        num_classes: number of classes.
        class_names: their names in label order, after `setup`.
        corrupt_budget: how many undecodable images were met is its `count`.

    Raises:
        ValueError: here, an argument out of range; in `setup`, splits or classes that disagree. One line each.
        FileNotFoundError: in `prepare_data` or `setup`, a part of `path` isn't there.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        image_size: int | Sequence[int],
        batch_size: int,
        train_transform: TrainTransform,
        eval_crop_ratio: float,
        num_classes: int = 1000,
        num_workers: int = 8,
        repeats: int = 1,
        mix: Mixing | None = None,
        corrupt_budget: int = 0,
        pin_memory: bool = True,
        persistent_workers: bool = True,
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"image_size={image_size}: give one positive number or (height, width)")
        if not 0 < eval_crop_ratio <= 1:
            raise ValueError(f"eval_crop_ratio={eval_crop_ratio}: give a ratio in (0, 1], 1.0 for ViT, 0.875 for Swin")
        if batch_size < 1 or repeats < 1 or num_workers < 0 or corrupt_budget < 0:
            raise ValueError(
                f"batch_size={batch_size} and repeats={repeats} must be at least 1, "
                f"num_workers={num_workers} and corrupt_budget={corrupt_budget} at least 0"
            )
        if mix is not None and batch_size % 2:
            raise ValueError(f"batch_size={batch_size}: mixing pairs the images of a batch; give an even number")
        self.path = Path(path)
        self.image_size: tuple[int, int] = (size[0], size[1])
        self.batch_size = batch_size
        self.num_classes = num_classes
        self.num_workers = num_workers
        self.repeats = repeats
        self.corrupt_budget = CorruptBudget(corrupt_budget)
        self._loading: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "persistent_workers": persistent_workers and num_workers > 0,
        }
        self.train_transform = train_transform(image_size=self.image_size)
        self.eval_transform = EvalTransform(image_size=self.image_size, crop_ratio=eval_crop_ratio)
        self.train_collate = collate if mix is None else mix(num_classes=num_classes)
        self.class_names: list[str] = []
        self.train_images: LabelledImages | None = None
        self.eval_images: LabelledImages | None = None

    def prepare_data(self) -> None:
        """Index shards that have no index yet; Lightning runs it once a node, before any `setup`."""
        for split in ("train", "val"):
            folder = self.path / split
            if any(folder.glob("*.tar")) and not (folder / INDEX_NAME).is_file():
                write_index(folder)

    def setup(self, stage: str | None = None) -> None:
        """List and check both splits; stages "validate" and "test" need only `val/`."""
        evaluation = self._open("val")
        self.eval_images = LabelledImages(evaluation, self.eval_transform)
        if stage in ("fit", None):
            training = self._open("train")
            if training.class_names != evaluation.class_names:
                differing = sorted(set(training.class_names) ^ set(evaluation.class_names))
                raise ValueError(
                    f"path={self.path}: train/ has {len(training.class_names)} classes and val/ "
                    f"{len(evaluation.class_names)}, {differing[0]!r} is only in one; give both splits the same classes"
                )
            self._check_classes(training)
            if len(training.labels) <= self.corrupt_budget.limit:
                raise ValueError(
                    f"corrupt_budget={self.corrupt_budget.limit} allows for every one of the {len(training.labels)} "
                    f"images of {training.folder} to be skipped; lower it"
                )
            self.train_images = LabelledImages(training, self.train_transform, self.corrupt_budget)
        self._check_classes(evaluation)
        self.class_names = evaluation.class_names

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Batches of (B, 3, H, W) float32 and (B,) int64, or (B, num_classes) float32 with `mix`."""
        if self.train_images is None:
            raise RuntimeError('call setup("fit") before train_dataloader()')
        rank, world = self._rank_and_world()
        sampler: RepeatAugSampler | DistributedSampler[tuple[Tensor, int]]
        if self.repeats > 1:
            sampler = RepeatAugSampler(self.train_images, world, rank, num_repeats=self.repeats)
        else:
            sampler = DistributedSampler(self.train_images, world, rank, shuffle=True, drop_last=True)
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
            collate_fn=self.train_collate,
            # The workers' seeds come from here: with the same seed on every rank, each still augments differently.
            generator=torch.Generator().manual_seed((torch.initial_seed() + rank) % 2**63),
            **self._loading,
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Batches of (B, 3, H, W) float32 and (B,) int64, each image of this rank's share once."""
        if self.eval_images is None:
            raise RuntimeError('call setup("validate") before val_dataloader()')
        rank, world = self._rank_and_world()
        return DataLoader(
            self.eval_images,
            batch_size=self.batch_size,
            sampler=range(rank, len(self.eval_images), world),  # torch's DistributedSampler would show some twice
            collate_fn=collate,
            **self._loading,
        )

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """The validation images."""
        return self.val_dataloader()

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _open(self, split: str) -> ImageSource:
        folder = self.path / split
        if not self.path.is_dir():
            raise FileNotFoundError(f"path={self.path} is no folder; give the folder that holds train/ and val/")
        if not folder.is_dir():
            raise FileNotFoundError(f"path={self.path} has no {split}/; put the split's class folders or shards there")
        sharded = (folder / INDEX_NAME).is_file() or any(folder.glob("*.tar"))
        return ShardImages(folder) if sharded else FolderImages(folder)

    def _check_classes(self, source: ImageSource) -> None:
        if len(source.class_names) != self.num_classes:
            raise ValueError(
                f"num_classes={self.num_classes}, but {source.folder} has {len(source.class_names)} classes; "
                f"set num_classes={len(source.class_names)}, or correct path"
            )
        empty = np.flatnonzero(np.bincount(source.labels, minlength=self.num_classes) == 0)
        if len(empty):
            raise ValueError(
                f"path: class {source.class_names[empty[0]]!r} of {source.folder} has no image; "
                "add its images, or remove the class from both splits"
            )
