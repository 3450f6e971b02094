"""The COCO datamodule on small folders: samplers, crowds, resuming, and every bad input."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import coco_folder
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from torch.utils.data import DistributedSampler

from datamodules.batches import DetectionBatch
from datamodules.coco import Coco
from datamodules.detection_transforms import DetrAugment, ResizeForTest
from datamodules.labelled_images import UndecodableImageError
from launch import register_resolvers

CONFIGS = Path(__file__).parents[2] / "configs"


def coco(path: Path, **changes: Any) -> Coco:
    arguments: dict[str, Any] = {
        "path": path,
        "image_size": 48,
        "batch_size": 2,
        "train_transform": DetrAugment(short_sides=(40, 48), long_side=96, crop_short_sides=(40,), crop=(24, 36)),
        "num_classes": 3,
        "num_workers": 0,
        "pin_memory": False,
    }
    return Coco(**(arguments | changes))


def ready(path: Path, stage: str | None = None, **changes: Any) -> Coco:
    datamodule = coco(path, **changes)
    datamodule.prepare_data()
    datamodule.setup(stage)
    return datamodule


def as_rank(datamodule: Coco, rank: int, world: int) -> Coco:
    datamodule.trainer = SimpleNamespace(global_rank=rank, world_size=world)  # type: ignore[assignment]
    return datamodule


def ids(batches: Any) -> list[int]:
    return [target.image_id for batch in batches for target in batch.targets]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return coco_folder.write(tmp_path / "coco")


def test_batches_are_what_the_files_say(root: Path) -> None:
    datamodule = ready(root, "validate", pad_multiple=16)
    assert datamodule.class_names == ["cat", "ant", "bee"]
    told = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    seen = 0
    for batch in datamodule.val_dataloader():
        assert isinstance(batch, DetectionBatch)
        assert not any(side % 16 for side in batch.images.shape[2:])
        for size, target in zip(batch.sizes, batch.targets, strict=True):
            row = next(each for each in told["images"] if each["id"] == target.image_id)
            assert target.original == (row["height"], row["width"])
            assert min(size.tolist()) == 48 or max(size.tolist()) == 80  # 48 · 1333 / 800
            mine = [each for each in told["annotations"] if each["image_id"] == target.image_id]
            scale = torch.tensor([size[1] / row["width"], size[0] / row["height"]]).repeat(2)
            expected = torch.tensor([each["bbox"] for each in mine]).reshape(-1, 4)
            expected = torch.cat((expected[:, :2], expected[:, :2] + expected[:, 2:]), 1) * scale
            torch.testing.assert_close(target.boxes, expected, atol=1e-4, rtol=0)  # float32 in between
            order = [3, 7, 90]
            assert [order[label] for label in target.labels.tolist()] == [each["category_id"] for each in mine]
            assert target.areas.tolist() == pytest.approx([each["area"] for each in mine], rel=1e-6)
            assert target.crowd.tolist() == [bool(each["iscrowd"]) for each in mine]
            seen += len(mine)
    assert seen == len(told["annotations"]) > 0


def test_training_drops_crowds_and_keeps_images_without_objects(root: Path) -> None:
    datamodule = ready(root, batch_size=5)
    assert datamodule.train_images is not None
    known = datamodule.train_images.annotations
    assert known.crowd.any()
    given = [datamodule.train_images.boxes(index) for index in range(10)]
    assert not torch.cat([boxes.crowd for boxes in given]).any()
    assert sum(len(boxes.labels) for boxes in given) == (~known.crowd).sum()
    assert 0 in [len(boxes.labels) for boxes in given]
    assert sorted(ids(datamodule.train_dataloader())) == sorted(known.image_ids.tolist())
    assert torch.cat([t.crowd for batch in datamodule.val_dataloader() for t in batch.targets]).any()


def test_a_set_without_any_object_trains(tmp_path: Path) -> None:
    for split in ("train2017", "val2017"):
        coco_folder.write_split(tmp_path, split, coco_folder.content(4) | {"annotations": []})
    for batch in ready(tmp_path).train_dataloader():
        assert [tuple(target.boxes.shape) for target in batch.targets] == [(0, 4), (0, 4)]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_sees_every_image_exactly_once(root: Path, world: int) -> None:
    datamodule = ready(root, "test")
    shares = [ids(as_rank(datamodule, rank, world).test_dataloader()) for rank in range(world)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert datamodule.eval_images is not None
    assert sorted(chain(*shares)) == sorted(datamodule.eval_images.annotations.image_ids.tolist())
    with pytest.raises(RuntimeError, match="setup"):
        datamodule.train_dataloader()


def test_ranks_share_the_training_images(root: Path) -> None:
    datamodule = ready(root)
    orders = []
    for rank in range(3):
        sampler = as_rank(datamodule, rank, 3).train_dataloader().batch_sampler.sampler
        assert isinstance(sampler, DistributedSampler)
        orders.append(list(sampler))
    assert [len(order) for order in orders] == [3, 3, 3]
    assert len(set(chain(*orders))) == 9


def test_a_resumed_epoch_goes_on_with_the_images_left(root: Path) -> None:
    datamodule = ready(root)
    whole = ids(datamodule.train_dataloader())
    interrupted = datamodule.train_dataloader()
    batches = iter(interrupted)
    first = ids([next(batches), next(batches)])
    resumed = datamodule.train_dataloader()
    resumed.load_state_dict(interrupted.state_dict())
    assert first + ids(resumed) == whole


def test_workers_and_ranks_augment_differently_and_as_seeded(root: Path) -> None:
    def sizes(rank: int, seed: int) -> list[Any]:
        torch.manual_seed(seed)
        loader = as_rank(datamodule, rank, 1).train_dataloader()
        return [batch.sizes.tolist() for batch in loader]

    datamodule = ready(root, num_workers=2, persistent_workers=False)
    assert sizes(0, 0) == sizes(0, 0)
    assert sizes(0, 0) != sizes(0, 1)
    torch.manual_seed(3)
    generators = [as_rank(datamodule, rank, 2).train_dataloader().generator for rank in (0, 1)]
    assert [generator and generator.initial_seed() for generator in generators] == [3, 4]


def test_lightning_trains_and_validates(root: Path) -> None:
    class Recorder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.trained: list[list[int]] = []
            self.validated: list[int] = []

        def training_step(self, batch: DetectionBatch) -> torch.Tensor:
            assert isinstance(batch, DetectionBatch)
            self.trained.append(ids([batch]))
            return self.layer(batch.images.mean((1, 2, 3))[:, None]).mean()

        def validation_step(self, batch: DetectionBatch) -> None:
            self.validated += ids([batch])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Recorder()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=coco(root))
    assert len(module.trained) == 10
    assert sorted(chain(*module.trained[:5])) == sorted(chain(*module.trained[5:]))
    assert module.trained[:5] != module.trained[5:]
    assert len(module.validated) == 2 * 5


def test_annotations_are_read_once(root: Path) -> None:
    datamodule = ready(root, "fit")
    images = datamodule.train_images, datamodule.eval_images
    (root / "annotations" / "instances_train2017.json").unlink()
    datamodule.setup("test")
    datamodule.setup("fit")
    assert images == (datamodule.train_images, datamodule.eval_images)


# Bad inputs: one line, the place, the remedy


def refused(error: type[Exception], *fragments: str, path: Path, **changes: Any) -> None:
    with pytest.raises(error) as caught:
        list(ready(path, **changes).train_dataloader())
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_missing_parts(root: Path) -> None:
    refused(FileNotFoundError, "path=", "absent", "annotations/", path=root / "absent")
    (root / "val2017").rename(root / "validation")
    refused(FileNotFoundError, str(root / "val2017"), "is no folder", path=root)
    (root / "annotations" / "instances_val2017.json").unlink()
    refused(FileNotFoundError, "instances_val2017.json is not there", path=root)


def test_wrong_annotations_end_setup(root: Path) -> None:
    file = root / "annotations" / "instances_train2017.json"
    told = json.loads(file.read_text())
    told["annotations"][4]["image_id"] = 1
    file.write_text(json.dumps(told))
    refused(ValueError, str(file), f"annotation {told['annotations'][4]['id']}", "image 1", path=root)


def test_categories_that_differ(root: Path) -> None:
    refused(ValueError, "num_classes=80", "set num_classes=3", path=root, num_classes=80)
    file = root / "annotations" / "instances_train2017.json"
    told = json.loads(file.read_text())
    told["categories"][1]["name"] = "wasp"
    file.write_text(json.dumps(told))
    refused(ValueError, "differ in category 90", path=root)


def test_a_corrupt_image_is_named(root: Path) -> None:
    broken = sorted((root / "train2017").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    refused(UndecodableImageError, f"cannot decode {broken}", path=root)


def test_an_image_of_another_size_than_told(root: Path) -> None:
    other = sorted((root / "train2017").iterdir())[3]
    Image.new("RGB", (33, 44)).save(other)
    refused(ValueError, f"{other} is 33 x 44 pixels", "instances_train2017.json says", path=root)


def test_a_batch_no_rank_can_fill(root: Path) -> None:
    refused(ValueError, "batch_size=11", "10 images", path=root, batch_size=11)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": [48, 64]}, "image_size="),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"pad_multiple": 0}, "pad_multiple=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"border": float("nan")}, "border=nan"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, changes: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        coco(tmp_path, **changes)


def test_the_config_builds_the_recipe(tmp_path: Path) -> None:
    register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(
            overrides=["+datamodule=coco", "+resolution=800", "+image_size=800", f"datamodule.path={tmp_path}"]
        )
    datamodule = instantiate(config.datamodule)
    assert isinstance(datamodule, Coco)
    assert isinstance(datamodule.train_transform, DetrAugment)
    assert isinstance(datamodule.eval_transform, ResizeForTest)
    assert (datamodule.num_classes, datamodule.image_size) == (80, 800)
    # The steps of the config are those that the class has by itself, which other tests hold to the recipe.
    assert str(datamodule.train_transform.steps) == str(DetrAugment().steps)
    assert str(datamodule.eval_transform.steps) == str(ResizeForTest(image_size=800).steps)
