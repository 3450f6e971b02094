"""The ImageNet datamodule on tiny folder trees and tar shards: labels, samplers, budgets and every bad input."""

from __future__ import annotations

import io
import logging
import math
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from torch.utils.data import DistributedSampler

from datamodules.augment import EvalTransform, RandAugment, ThreeAugment
from datamodules.batches import ImageBatch
from datamodules.imagenet import ImageNet
from datamodules.labelled_images import CorruptBudgetError, UndecodableImageError
from datamodules.mixing import MixedCollate

CLASSES = ("ant", "bee", "cat")
CONFIGS = Path(__file__).parents[2] / "configs"


def photo_bytes(label: int, number: int) -> bytes:
    """A JPEG whose brightness tells its class, with noise of its own."""
    noise = np.random.default_rng((label, number)).uniform(0, 30, (30, 40, 3))
    file = io.BytesIO()
    Image.fromarray((40 + 70 * label + noise).astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write_folders(root: Path, train: int = 4, val: int = 3, classes: tuple[str, ...] = CLASSES) -> Path:
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{name}_{number:04d}.JPEG").write_bytes(photo_bytes(label, number))
    return root


def write_shards(root: Path, train: int = 4, val: int = 3, per_shard: int = 5) -> Path:
    """The photos of `write_folders` as WebDataset writes them, dealt over the classes."""
    webdataset = pytest.importorskip("webdataset")
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir()
        samples = [(label, number) for number in range(count) for label in range(len(CLASSES))]
        for shard in range(math.ceil(len(samples) / per_shard)):
            with webdataset.TarWriter(str(root / split / f"imagenet-{split}-{shard:06d}.tar")) as writer:
                for label, number in samples[shard * per_shard : (shard + 1) * per_shard]:
                    key, photo = f"{CLASSES[label]}_{number:04d}", photo_bytes(label, number)
                    writer.write({"__key__": key, "jpg": photo, "cls": label, "json": {"file": key}})
    return root


def image_net(path: Path, **changes: Any) -> ImageNet:
    arguments: dict[str, Any] = {
        "path": path,
        "image_size": 16,
        "batch_size": 2,
        "train_transform": ThreeAugment,
        "eval_crop_ratio": 1.0,
        "num_classes": len(CLASSES),
        "num_workers": 0,
        "pin_memory": False,
    }
    return ImageNet(**(arguments | changes))


def ready(path: Path, stage: str | None = None, **changes: Any) -> ImageNet:
    datamodule = image_net(path, **changes)
    datamodule.prepare_data()
    datamodule.setup(stage)
    return datamodule


def as_rank(datamodule: ImageNet, rank: int, world: int) -> ImageNet:
    datamodule.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
    return datamodule


def evaluated(datamodule: ImageNet) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(datamodule.val_dataloader())
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.targets for batch in batches])


# Sources


def test_both_sources_give_the_same_images_and_labels(tmp_path: Path) -> None:
    folders = ready(write_folders(tmp_path / "folders"))
    shards = ready(write_shards(tmp_path / "shards"))
    assert folders.class_names == shards.class_names == list(CLASSES)
    for ours, theirs in ((folders.train_images, shards.train_images), (folders.eval_images, shards.eval_images)):
        assert ours is not None
        assert theirs is not None
        pairs = [
            {source.read(i): int(source.labels[i]) for i in range(len(source.labels))}
            for source in (ours.source, theirs.source)
        ]
        assert len(pairs[0]) == len(ours)
        assert pairs[0] == pairs[1]


def test_images_carry_the_label_of_their_class(tmp_path: Path) -> None:
    images, targets = evaluated(ready(write_shards(tmp_path), "validate"))
    brightness = images.mean((1, 2, 3))
    for lower, upper in ((0, 1), (1, 2)):
        assert brightness[targets == lower].max() < brightness[targets == upper].min()


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    datamodule = ready(write_shards(tmp_path))
    shards = sorted(str(shard) for shard in (tmp_path / "train").glob("*.tar"))
    theirs = [
        (sample["__key__"], sample["jpg"], int(sample["cls"]))
        for sample in webdataset.WebDataset(shards, shardshuffle=False)
    ]
    assert datamodule.train_images is not None
    source = datamodule.train_images.source
    ours = [(source.name(i).split(":")[-1], source.read(i), int(source.labels[i])) for i in range(len(source.labels))]
    assert ours == theirs


def test_classes_are_numbered_where_no_file_names_them(tmp_path: Path) -> None:
    (write_shards(tmp_path) / "classes.txt").unlink()
    assert ready(tmp_path).class_names == ["0", "1", "2"]


# Training order


def test_repeated_augmentation_has_the_order_and_length_of_timm(tmp_path: Path) -> None:
    datamodule = ready(write_folders(tmp_path, train=90), repeats=3)  # 270 images: 256 a world, after rounding
    assert datamodule.train_images is not None
    orders = []
    for rank in range(2):
        sampler: Any = as_rank(datamodule, rank, 2).train_dataloader().batch_sampler.sampler
        sampler.set_epoch(7)
        orders.append(list(sampler))
    assert [len(order) for order in orders] == [270 // 256 * 256 // 2] * 2
    striped = [index for pair in zip(*orders, strict=True) for index in pair]
    shuffled = torch.randperm(270, generator=torch.Generator().manual_seed(7))
    assert striped == shuffled.repeat_interleave(3)[:256].tolist()
    shown = Counter(striped)
    assert len(shown) == math.ceil(256 / 3)
    assert sorted(shown.values())[1:] == [3] * 85


def test_repeats_on_a_single_process_fill_whole_batches(tmp_path: Path) -> None:
    datamodule = ready(write_folders(tmp_path), repeats=3, batch_size=4)
    loader = datamodule.train_dataloader()
    assert len(loader) == 3  # twelve images
    assert sum(len(batch.images) for batch in loader) == 12


def test_without_repeats_ranks_share_the_images_without_duplicates(tmp_path: Path) -> None:
    datamodule = ready(write_folders(tmp_path, train=5))
    orders = []
    for rank in range(2):
        sampler = as_rank(datamodule, rank, 2).train_dataloader().batch_sampler.sampler
        assert isinstance(sampler, DistributedSampler)
        orders.append(list(sampler))
    assert [len(order) for order in orders] == [7, 7]
    assert len(set(orders[0]) | set(orders[1])) == 14


def test_lightning_changes_the_order_each_epoch(tmp_path: Path) -> None:
    class Recorder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.epochs: list[int] = []
            self.shapes: set[tuple[int, ...]] = set()

        def on_train_batch_start(self, batch: ImageBatch, batch_idx: int) -> None:
            self.epochs.append(self.trainer.train_dataloader.batch_sampler.sampler.epoch)  # type: ignore[union-attr]
            self.shapes.add((*batch.images.shape, *batch.targets.shape))

        def training_step(self, batch: ImageBatch) -> torch.Tensor:
            return self.layer(batch.images.mean((1, 2, 3))[:, None]).mean()

        def validation_step(self, batch: ImageBatch) -> None:
            assert batch.targets.dtype == torch.int64

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Recorder()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=image_net(write_shards(tmp_path), repeats=3, batch_size=4, mix=MixedCollate))
    assert module.epochs == [0, 0, 0, 1, 1, 1]
    assert module.shapes == {(4, 3, 16, 16, 4, 3)}


def test_mixing_makes_soft_targets_in_training_only(tmp_path: Path) -> None:
    datamodule = ready(write_folders(tmp_path), mix=partial(MixedCollate, label_smoothing=0.1), image_size=(16, 24))
    batch = next(iter(datamodule.train_dataloader()))
    assert isinstance(batch, ImageBatch)
    assert batch.images.shape == (2, 3, 16, 24)
    assert batch.targets.shape == (2, 3)
    assert batch.targets.dtype == torch.float32
    assert next(iter(datamodule.val_dataloader())).targets.dtype == torch.int64
    assert next(iter(ready(tmp_path).train_dataloader())).targets.dtype == torch.int64


def test_workers_of_two_ranks_augment_differently(tmp_path: Path) -> None:
    datamodule = ready(write_folders(tmp_path))
    torch.manual_seed(3)
    generators = [as_rank(datamodule, rank, 2).train_dataloader().generator for rank in (0, 1, 0)]
    assert [generator and generator.initial_seed() for generator in generators] == [3, 4, 3]


# Evaluation


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_sees_every_image_exactly_once(tmp_path: Path, world: int) -> None:
    datamodule = ready(write_shards(tmp_path), "validate")  # nine images: no even split
    shares = [evaluated(as_rank(datamodule, rank, world))[0] for rank in range(world)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len(torch.cat(shares).flatten(1).unique(dim=0)) == sum(map(len, shares)) == 9


def test_the_test_set_is_the_validation_set_and_needs_no_training_images(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    (root / "train").rename(root / "elsewhere")
    datamodule = ready(root, "test", eval_crop_ratio=0.875)
    assert sum(len(batch.images) for batch in datamodule.test_dataloader()) == 9
    with pytest.raises(RuntimeError, match="setup"):
        datamodule.train_dataloader()


# Undecodable images


def test_a_corrupt_image_is_replaced_counted_once_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = write_folders(tmp_path) / "train" / "bee" / "bee_0001.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    datamodule = ready(tmp_path, corrupt_budget=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert sum(len(batch.images) for batch in datamodule.train_dataloader()) == 12
    assert datamodule.corrupt_budget.count == 1
    messages = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(messages) == 1
    assert str(broken) in messages[0]


@pytest.mark.parametrize("write", [write_folders, write_shards])
def test_past_the_budget_training_stops(tmp_path: Path, write: Any) -> None:
    write(tmp_path)
    for file in [*tmp_path.glob("train/*/*.JPEG"), *tmp_path.glob("train/*.tar")]:
        file.write_bytes(file.read_bytes().replace(b"\xff\xd8\xff", b"\x00\x00\x00"))  # no JPEG begins so
    datamodule = ready(tmp_path, corrupt_budget=2)
    with pytest.raises(CorruptBudgetError, match=r"corrupt_budget=2 is spent.*(ant|bee|cat)_000"):
        list(datamodule.train_dataloader())
    assert datamodule.corrupt_budget.count == 3
    with pytest.raises(CorruptBudgetError):  # and stays stopped, by files already counted too
        list(datamodule.train_dataloader())


def test_workers_spend_one_budget_over_all_epochs(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for name in CLASSES:
        (tmp_path / "train" / name / f"{name}_0001.JPEG").write_bytes(b"not an image")
    datamodule = ready(tmp_path, corrupt_budget=3, num_workers=2)
    loader = datamodule.train_dataloader()
    for _ in range(2):
        assert sum(len(batch.images) for batch in loader) == 12
    assert datamodule.corrupt_budget.count == 3


def test_a_corrupt_validation_image_is_an_error_at_once(tmp_path: Path) -> None:
    broken = write_folders(tmp_path) / "val" / "cat" / "cat_0002.JPEG"
    broken.write_bytes(b"not an image")
    with pytest.raises(UndecodableImageError, match=r"val/cat/cat_0002\.JPEG"):
        list(ready(tmp_path, corrupt_budget=5).val_dataloader())


# Bad inputs: one line, the place, the remedy


def refused(error: type[Exception], *fragments: str, path: Path, **changes: Any) -> None:
    with pytest.raises(error) as caught:
        ready(path, **changes).train_dataloader()
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_missing_path_and_missing_split(tmp_path: Path) -> None:
    refused(FileNotFoundError, "path=", "absent", "train/ and val/", path=tmp_path / "absent")
    write_folders(tmp_path)
    (tmp_path / "val").rename(tmp_path / "validation")
    refused(FileNotFoundError, str(tmp_path), "has no val/", path=tmp_path)


def test_split_without_class_folders(tmp_path: Path) -> None:
    write_folders(tmp_path / "tree")
    flat = tmp_path / "tree" / "val"
    for file in list(flat.glob("*/*.JPEG")):
        file.rename(flat / file.name)
    for name in CLASSES:
        (flat / name).rmdir()
    refused(FileNotFoundError, str(flat), "val/<class>/", path=tmp_path / "tree")


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_folder(tmp_path: Path, split: str) -> None:
    for file in (write_folders(tmp_path) / split / "bee").glob("*"):
        file.unlink()
    refused(ValueError, "'bee'", str(tmp_path / split), "no image", path=tmp_path)


def test_classes_that_differ_between_the_splits(tmp_path: Path) -> None:
    (write_folders(tmp_path) / "val" / "bee").rename(tmp_path / "val" / "wasp")
    refused(ValueError, "'bee' is only in one", path=tmp_path)
    for file in (tmp_path / "val" / "wasp").glob("*"):
        file.unlink()
    (tmp_path / "val" / "wasp").rmdir()
    refused(ValueError, "train/ has 3 classes and val/ 2", path=tmp_path)


def test_number_of_classes_that_differs_from_the_config(tmp_path: Path) -> None:
    refused(ValueError, "num_classes=1000", "set num_classes=3", path=write_folders(tmp_path), num_classes=1000)


def test_shards_without_an_index(tmp_path: Path) -> None:
    datamodule = image_net(write_shards(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"python -m datamodules\.image_shards"):
        datamodule.setup()


def test_missing_shard_before_and_after_indexing(tmp_path: Path) -> None:
    lost = write_shards(tmp_path, train=6) / "train" / "imagenet-train-000001.tar"
    content = lost.read_bytes()
    lost.unlink()
    refused(FileNotFoundError, str(tmp_path / "train"), "0 to 3, but not 1", path=tmp_path)
    lost.write_bytes(content)
    ready(tmp_path)
    lost.unlink()
    refused(FileNotFoundError, str(lost), "missing", "index.npz", path=tmp_path)
    for shard in (tmp_path / "train").glob("*.tar"):
        shard.unlink()
    refused(FileNotFoundError, "missing", path=tmp_path)


def test_changed_and_damaged_shards(tmp_path: Path) -> None:
    shard = write_shards(tmp_path) / "train" / "imagenet-train-000002.tar"
    ready(tmp_path)
    shard.write_bytes(shard.read_bytes()[:700])
    refused(ValueError, str(shard), "changed since it was indexed", path=tmp_path)
    (tmp_path / "train" / "index.npz").unlink()
    refused(ValueError, str(shard), "damaged", path=tmp_path)


@pytest.mark.parametrize(
    ("sample", "fragment"),
    [
        ({"jpg": b"photo"}, "no class (.cls)"),
        ({"cls": b"1"}, "no image"),
        ({"jpg": b"photo", "cls": b"ant"}, "not a class number"),
    ],
)
def test_shard_samples_that_are_not_labelled_images(tmp_path: Path, sample: dict[str, bytes], fragment: str) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(write_shards(tmp_path) / "train" / "imagenet-train-000003.tar")) as writer:
        writer.write({"__key__": "odd_one", **sample})
    refused(ValueError, "000003.tar:odd_one", fragment, "repack", path=tmp_path)


def test_more_classes_than_names(tmp_path: Path) -> None:
    (write_shards(tmp_path) / "classes.txt").write_text("ant\nbee\n")
    refused(ValueError, "classes.txt", "has class 2", "names 2", path=tmp_path)


def test_a_batch_no_rank_can_fill(tmp_path: Path) -> None:
    refused(ValueError, "batch_size=14", "12 images", path=write_folders(tmp_path), batch_size=14)


def test_a_budget_that_covers_every_image(tmp_path: Path) -> None:
    refused(ValueError, "corrupt_budget=12", path=write_folders(tmp_path), corrupt_budget=12)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": (16, 16, 3)}, "image_size="),
        ({"eval_crop_ratio": 1.2}, "eval_crop_ratio=1.2"),
        ({"repeats": 0}, "repeats=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"corrupt_budget": -1}, "corrupt_budget=-1"),
        ({"batch_size": 3, "mix": MixedCollate}, "even"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, changes: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        image_net(tmp_path, **changes)


# Configs


@pytest.mark.parametrize(
    ("name", "recipe", "crop_ratio", "repeats", "smoothing"),
    [("imagenet", ThreeAugment, 1.0, 3, 0.0), ("imagenet_swin", RandAugment, 0.875, 1, 0.1)],
)
def test_configs_build_the_papers_recipes(
    tmp_path: Path, name: str, recipe: type, crop_ratio: float, repeats: int, smoothing: float
) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(overrides=[f"+datamodule={name}", "+resolution=224", f"datamodule.path={tmp_path}"])
    datamodule = instantiate(config.datamodule)
    assert isinstance(datamodule, ImageNet)
    assert isinstance(datamodule.train_transform, recipe)
    assert isinstance(datamodule.eval_transform, EvalTransform)
    assert config.datamodule.eval_crop_ratio == crop_ratio
    assert (datamodule.repeats, datamodule.image_size, datamodule.num_classes) == (repeats, (224, 224), 1000)
    assert isinstance(datamodule.train_collate, MixedCollate)
    mixup = datamodule.train_collate.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing) == (0.8, 1.0, smoothing)
