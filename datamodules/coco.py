"""COCO detection (arXiv 1405.0312), or any data set laid out like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.batches import Boxes, DetectionBatch
from datamodules.coco_annotations import BORDER, Annotations, read_annotations
from datamodules.detection_transforms import DetectionEvalTransform, DetectionTransform, ResizeForTest
from datamodules.labelled_images import decode_image
from datamodules.padding import DetectionCollate
from datamodules.resumable import ResumableLoader


class CocoImages(Dataset[tuple[Tensor, Boxes]]):
    """Items are transform(image, boxes).

    Args:
        folder: of the images.
        annotations: of the images.
        transform: PIL image and boxes → (3, h, w) float32 and boxes.
        crowd: keep boxes around crowds; evaluation excuses what is found there, training can't use them.
    """

    def __init__(self, folder: Path, annotations: Annotations, transform: DetectionTransform, *, crowd: bool) -> None:
        self.folder = folder
        self.annotations = annotations
        self.transform = transform
        self.crowd = crowd

    def __len__(self) -> int:
        return len(self.annotations)

    def boxes(self, index: int) -> Boxes:
        """The objects of an image, in pixels of its file."""
        known = self.annotations
        rows = slice(*known.offsets[index : index + 2])
        kept = slice(None) if self.crowd else ~known.crowd[rows]
        height, width = known.sizes[index].tolist()
        return Boxes(
            boxes=torch.from_numpy(known.boxes[rows][kept]).float(),
            labels=torch.from_numpy(known.labels[rows][kept]),
            areas=torch.from_numpy(known.areas[rows][kept]).float(),
            crowd=torch.from_numpy(known.crowd[rows][kept]),
            image_id=int(known.image_ids[index]),
            original=(height, width),
        )

    def __getitem__(self, index: int) -> tuple[Tensor, Boxes]:
        file = self.folder / self.annotations.file_name(index)
        image = decode_image(file.read_bytes(), str(file))
        boxes = self.boxes(index)
        if (image.height, image.width) != boxes.original:
            raise ValueError(
                f"{file} is {image.width} x {image.height} pixels (width x height), but {self.annotations.file} says "
                f"{boxes.original[1]} x {boxes.original[0]} for image {boxes.image_id}; unpack the images again"
            )
        return self.transform(image, boxes)


class Coco(pl.LightningDataModule):
    """Training and validation images with boxes, as `DetectionBatch`.

    `path` holds `train2017/`, `val2017/` and `annotations/instances_train2017.json`, `annotations/instances_val2017.json`,
    as cocodataset.org packs them; `setup` checks the annotations. COCO's test labels aren't public: `test_dataloader` is
    the validation set, as in the papers. Images without objects train like others.

    The samplers split the work over ranks themselves, so the trainer needs `use_distributed_sampler=False`. Training drops
    the last incomplete batch. Evaluation sees each image exactly once: ranks differ by one image where they can't share
    evenly, so a validation step must hold no collective of its own.

    Args:
        path: the folder above.
        image_size: short side of the images in evaluation, pixels.
        batch_size: images a batch and rank.
        train_transform: training recipe, with sizes of its own.
        eval_transform: what evaluation does; called with `image_size=…`.
        num_classes: categories that both files must have.
        num_workers: loader processes a rank.
        pad_multiple: batches are padded to a multiple of this many pixels.
        border: pixels that a box may pass the border of its image by; it is cut there.
        pin_memory: copy batches to page-locked memory, for a GPU.
        persistent_workers: keep the loader processes from epoch to epoch.

    Attributes:
        num_classes: number of classes.
        class_names: their names in label order, that of the category ids, after `setup`.

    Raises:
        ValueError: here, an argument out of range; in `setup`, annotations that don't hold together. One line each.
        FileNotFoundError: in `setup`, a part of `path` or an image isn't there.
        UndecodableImageError: in iteration, an image is corrupt; the message names it.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        image_size: int,
        batch_size: int,
        train_transform: DetectionTransform,
        eval_transform: DetectionEvalTransform = ResizeForTest,
        num_classes: int = 80,
        num_workers: int = 8,
        pad_multiple: int = 1,
        border: float = BORDER,
        pin_memory: bool = True,
        persistent_workers: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(image_size, int) or image_size < 1:
            raise ValueError(
                f"image_size={image_size} (in evaluation resolution=): give the short side of the images, pixels"
            )
        if batch_size < 1 or pad_multiple < 1 or num_classes < 1 or num_workers < 0 or not border >= 0:
            raise ValueError(
                f"batch_size={batch_size}, pad_multiple={pad_multiple} and num_classes={num_classes} must be at least 1, "
                f"num_workers={num_workers} and border={border} at least 0"
            )
        self.path = Path(path)
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_classes = num_classes
        self.num_workers = num_workers
        self.border = border
        self._loading: dict[str, Any] = {
            "num_workers": num_workers,
            "collate_fn": DetectionCollate(pad_multiple),
            "pin_memory": pin_memory,
            "persistent_workers": persistent_workers and num_workers > 0,
        }
        self.train_transform = train_transform
        self.eval_transform = eval_transform(image_size=image_size)
        self.class_names: list[str] = []
        self.train_images: CocoImages | None = None
        self.eval_images: CocoImages | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and check the annotations, once; stages "validate" and "test" need only those of `val2017`."""
        if self.eval_images is None:
            self.eval_images = self._open("val2017", self.eval_transform, crowd=True)
        evaluation = self.eval_images.annotations
        if stage in ("fit", None) and self.train_images is None:
            images = self._open("train2017", self.train_transform, crowd=False)
            training = images.annotations
            pairs = [
                set(zip(each.category_ids.tolist(), each.class_names, strict=True)) for each in (training, evaluation)
            ]
            if differing := sorted(pairs[0] ^ pairs[1]):
                number, name = differing[0]
                raise ValueError(
                    f"{training.file} and {evaluation.file} differ in category {number} ({name!r}); give both the same"
                )
            self.train_images = images
        self.class_names = evaluation.class_names

    def train_dataloader(self) -> DataLoader[DetectionBatch]:
        """Batches without crowds, in an order that follows from the epoch."""
        if self.train_images is None:
            raise RuntimeError('call setup("fit") before train_dataloader()')
        rank, world = self._rank_and_world()
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.train_images, world, rank, shuffle=True, drop_last=len(self.train_images) >= world
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
            # The workers' seeds come from here: with the same seed on every rank, each still augments differently.
            generator=torch.Generator().manual_seed((torch.initial_seed() + rank) % 2**63),
            **self._loading,
        )

    def val_dataloader(self) -> DataLoader[DetectionBatch]:
        """Batches with crowds, each image of this rank's share once."""
        if self.eval_images is None:
            raise RuntimeError('call setup("validate") before val_dataloader()')
        rank, world = self._rank_and_world()
        return DataLoader(
            self.eval_images,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            sampler=range(rank, len(self.eval_images), world),  # torch's DistributedSampler would show some twice
            **self._loading,
        )

    def test_dataloader(self) -> DataLoader[DetectionBatch]:
        """The validation images."""
        return self.val_dataloader()

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _open(self, split: str, transform: DetectionTransform, *, crowd: bool) -> CocoImages:
        if not self.path.is_dir():
            raise FileNotFoundError(f"path={self.path} is no folder; give the folder with {split}/ and annotations/")
        folder = self.path / split
        annotations = read_annotations(self.path / "annotations" / f"instances_{split}.json", folder, self.border)
        if len(annotations.class_names) != self.num_classes:
            raise ValueError(
                f"num_classes={self.num_classes}, but {annotations.file} has {len(annotations.class_names)} categories; "
                f"set num_classes={len(annotations.class_names)}, or correct path"
            )
        return CocoImages(folder, annotations, transform, crowd=crowd)
