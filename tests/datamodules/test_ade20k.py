"""The ADE20k datamodule on a tiny folder: labels, batches, samplers, and every bad input by its file."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from datamodules.ade20k import Ade20k, Sample, collate
from datamodules.batches import SegmentationBatch
from datamodules.segmentation_folder import SegmentationFolder, read_class_names

NAMES = ("wall", "building", "sky")
CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = ((40, 60), (60, 40), (50, 50))


def write_names(root, names=("wall", "building, edifice", "sky ")):
    """As the file of the data set: spaces after some indices and names, synonyms after commas."""
    rows = [f"{index} \t0.1576\t11664\t1172\t{name}" for index, name in enumerate(names, 1)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")


def annotation(number, height, width):
    """0 … 3 in quarters, turned by the image's number."""
    values = np.zeros((height, width), dtype=np.uint8)
    values[: height // 2, width // 2 :] = 1
    values[height // 2 :, : width // 2] = 2
    values[height // 2 :, width // 2 :] = 3
    return (values + number) % 4


def write(root, train=7, val=5):
    for split, count in (("training", train), ("validation", val)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            height, width = SIZES[number % 3]
            name = f"ADE_{split[:5]}_{number:08d}"
            values = annotation(number, height, width)
            Image.fromarray(np.repeat(60 * values[..., None], 3, -1)).save(
                root / "images" / split / f"{name}.jpg", quality=95
            )
            Image.fromarray(values).save(root / "annotations" / split / f"{name}.png")
    write_names(root)
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path)


def data(path, **changes):
    arguments = {
        "path": path, "image_size": 32, "batch_size": 2, "num_classes": 3, "train_short_side": 32, "crop_size": (24, 32),
        "num_workers": 0, "pin_memory": False,
    }  # fmt: skip
    return Ade20k(**(arguments | changes))


def ready(path, stage=None, **changes):
    module = data(path, **changes)
    module.prepare_data()
    module.setup(stage)
    return module


def annotation_file(root, number=0, split="validation"):
    return root / "annotations" / split / f"ADE_{split[:5]}_{number:08d}.png"


def test_names_are_the_first_synonyms(root):
    assert ready(root).class_names == list(NAMES)


def test_names_need_no_certain_columns_but_index_and_name(root):
    (root / "objectInfo150.txt").write_text("Idx\tStuff\tName\n1\t1\twall\n2\t0\tlamp; light\n")
    assert read_class_names(root, 2) == ["wall", "lamp"]


def test_evaluation_shows_whole_images_and_classes_of_the_files(root):
    module = ready(root, "validate")
    batches = list(module.val_dataloader())
    assert [batch.image_ids for batch in batches] == [(f"ADE_valid_{number:08d}",) for number in range(5)]
    for number, batch in enumerate(batches):
        assert isinstance(batch, SegmentationBatch)
        height, width = SIZES[number % 3]
        factor = 32 / min(height, width)
        assert batch.images.shape == (1, 3, round(factor * height), round(factor * width))
        assert batch.sizes.tolist() == [list(batch.images.shape[2:])]
        assert batch.target_sizes.tolist() == [[height, width]]
        expected = torch.from_numpy(annotation(number, height, width)).long() - 1
        assert torch.equal(batch.targets[0], expected.where(expected >= 0, 255))
        assert batch.targets.dtype == torch.int64
    assert [batch.image_ids for batch in module.test_dataloader()] == [batch.image_ids for batch in batches]


def test_palettes_are_read_as_indices(root):
    file = annotation_file(root)
    picture = Image.open(file)
    picture.putpalette([value for index in range(256) for value in (255 - index, index, 7)])
    assert picture.mode == "P"
    picture.save(file)
    first = next(iter(ready(root, "validate").val_dataloader()))
    assert sorted(first.targets.unique().tolist()) == [0, 1, 2, 255]


def test_training_batches_are_padded_to_the_crop(root):
    module = ready(root, scales=(0.5, 0.5))  # short side 16
    seen = []
    for batch in module.train_dataloader():
        assert batch.images.shape == (2, 3, 24, 32)
        assert batch.targets.shape == (2, 24, 32)
        assert torch.equal(batch.sizes, batch.target_sizes)
        for image, target, (height, width) in zip(batch.images, batch.targets, batch.sizes.tolist(), strict=True):
            assert 16 in (height, width)
            assert not image[:, height:].any()
            assert not image[..., width:].any()
            assert (target[height:] == 255).all()
            assert (target[:, width:] == 255).all()
            assert (target[:height, :width] != 255).any()
        seen += batch.image_ids
    assert len(seen) == len(set(seen)) == 6  # of 7: the incomplete batch is left out


def test_evaluation_in_batches_pads_images_and_classes(root):
    alone = list(ready(root, "validate").val_dataloader())
    together = list(ready(root, "validate", eval_batch_size=3).val_dataloader())
    assert [len(batch.image_ids) for batch in together] == [3, 2]
    first = together[0]
    for number, (single, (height, width), (rows, columns)) in enumerate(
        zip(alone[:3], first.sizes.tolist(), first.target_sizes.tolist(), strict=True)
    ):
        assert torch.equal(first.images[number, :, :height, :width], single.images[0])
        assert torch.equal(first.targets[number, :rows, :columns], single.targets[0])
        outside = torch.ones_like(first.targets[number], dtype=torch.bool)
        outside[:rows, :columns] = False
        assert (first.targets[number][outside] == 255).all()
    assert first.images.sum() == pytest.approx(sum(float(single.images.sum()) for single in alone[:3]), rel=1e-4)


def test_nothing_is_padded_that_neednt_be():
    sample = Sample(torch.ones(3, 4, 5), torch.zeros(6, 7, dtype=torch.uint8), "a")
    batch = collate([sample])
    assert batch.images.shape == (1, 3, 4, 5)
    assert batch.targets.shape == (1, 6, 7)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_images_without_repeats(root, world):
    seen, trained = [], []
    for rank in range(world):
        module = ready(root, batch_size=1)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=world)
        seen += [batch.image_ids[0] for batch in module.val_dataloader()]
        trained += [batch.image_ids[0] for batch in module.train_dataloader()]
    assert sorted(seen) == [f"ADE_valid_{number:08d}" for number in range(5)]
    assert len(trained) == len(set(trained)) == 7 // world * world


def test_an_interrupted_epoch_goes_on_with_the_images_left(root):
    loader = ready(root).train_dataloader()
    order = [batch.image_ids for batch in loader]
    again = ready(root).train_dataloader()
    iterator = iter(again)
    next(iterator)
    resumed = ready(root).train_dataloader()
    resumed.load_state_dict(again.state_dict())
    assert [batch.image_ids for batch in resumed] == order[1:]


def test_lightning_moves_and_counts_the_batches(root):
    class Probe(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

        def training_step(self, batch, index):
            return self.weight * batch.images.mean()

        def validation_step(self, batch, index):
            self.seen += batch.image_ids

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    probe = Probe()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(probe, data(root, num_workers=1))
    assert probe.seen == [f"ADE_valid_{number:08d}" for number in range(5)]
    assert trainer.global_step == 3


def test_evaluation_needs_no_training_images(root):
    shutil.rmtree(root / "images" / "training")
    ready(root, "test")
    with pytest.raises(FileNotFoundError, match="training is no folder"):
        ready(root, "fit")


def test_the_config_makes_it(root):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        config = compose("datamodule/ade20k", overrides=["+resolution=48", "+image_size=64", f"datamodule.path={root}"])
    made = instantiate(config).datamodule
    assert isinstance(made, Ade20k)
    assert (made.image_size, made.crop_size, made.num_classes) == (48, (64, 64), 150)
    assert made.train_transform.short_side == 64


def spoil_missing_annotation(root):
    annotation_file(root, 2).unlink()
    return ValueError, r"ADE_valid_00000002.jpg has no annotation"


def spoil_missing_image(root):
    (root / "images" / "validation" / "ADE_valid_00000001.jpg").unlink()
    return ValueError, r"ADE_valid_00000001.png has no image"


def spoil_several(root):
    for number in (1, 3):
        annotation_file(root, number).unlink()
    return ValueError, r"ADE_valid_00000001.jpg has no annotation.*\(and 1 more such files\)"


def spoil_size(root):
    Image.fromarray(annotation(0, 40, 61)).save(annotation_file(root))
    return ValueError, r"ADE_valid_00000000.png is 61 x 40 pixels .*but its image is 60 x 40"


def spoil_colours(root):
    Image.open(annotation_file(root)).convert("RGB").save(annotation_file(root))
    return ValueError, r"ADE_valid_00000000.png is an annotation of mode RGB"


def spoil_bits(root):
    Image.fromarray(annotation(0, 40, 60).astype(np.uint16)).save(annotation_file(root))
    return ValueError, r"ADE_valid_00000000.png is an annotation of mode I;16"


def spoil_header(root):
    annotation_file(root, 4).write_bytes(b"no picture")
    return ValueError, r"ADE_valid_00000004.png can't be read as an image: UnidentifiedImageError"


def spoil_empty(root):
    for kind in ("images", "annotations"):
        for file in (root / kind / "validation").iterdir():
            file.unlink()
    return FileNotFoundError, r"images/validation holds no .jpg"


def spoil_folder(root):
    (root / "annotations").rename(root / "labels")
    return FileNotFoundError, r"annotations/validation is no folder"


def spoil_names_missing(root):
    (root / "objectInfo150.txt").unlink()
    return FileNotFoundError, r"objectInfo150.txt is missing"


def spoil_names_rows(root):
    write_names(root, ("wall", "sky"))
    return ValueError, r"num_classes=3, but .*objectInfo150.txt has 2 classes; set num_classes=2"


def spoil_names_order(root):
    (root / "objectInfo150.txt").write_text("Idx\tName\n1\ta\n3\tb\n2\tc\n")
    return ValueError, r"objectInfo150.txt: row 2 has Idx '3'"


def spoil_names_separator(root):
    (root / "objectInfo150.txt").write_text("Idx Name\n1 a\n2 b\n3 c\n")
    return ValueError, r"objectInfo150.txt: row 1 has no Idx or no Name"


SPOILS = [value for name, value in sorted(globals().items()) if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILS, ids=[spoil.__name__.removeprefix("spoil_") for spoil in SPOILS])
def test_bad_folders_are_found_at_start(root, spoil):
    ready(root, "validate")
    error, message = spoil(root)
    with pytest.raises(error, match=message) as caught:
        ready(root, "validate")
    assert "\n" not in str(caught.value)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        ready(tmp_path / "nowhere")


def test_a_class_too_many_is_named_with_its_file(root):
    values = annotation(0, 40, 60)
    values[3, 4] = 9
    Image.fromarray(values).save(annotation_file(root))
    folder = SegmentationFolder(root, "validation", 3)
    with pytest.raises(ValueError, match=r"ADE_valid_00000000.png holds value 9, but num_classes=3"):
        folder.read(0)


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_a_file_cut_short_is_named(root, kind):
    file = next(iter(sorted((root / kind / "validation").iterdir())))
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    folder = SegmentationFolder(root, "validation", 3)
    with pytest.raises(ValueError, match=f"cannot decode .*{file.name}"):
        folder.read(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"image_size": [32, 48]}, r"image_size=\[32, 48\]", id="two_sides"),
        pytest.param({"image_size": 0}, "image_size=0", id="no_side"),
        pytest.param({"batch_size": 0}, "batch_size=0", id="no_batch"),
        pytest.param({"num_classes": 255}, "num_classes=255", id="classes"),
        pytest.param({"crop_size": (1, 2, 3)}, "crop_size=", id="crop"),
        pytest.param({"scales": (1.0,)}, "scales=", id="scales"),
    ],
)
def test_arguments_out_of_range_are_refused(root, changes, message):
    with pytest.raises(ValueError, match=message):
        data(root, **changes)


def test_a_batch_larger_than_an_epoch_is_refused(root):
    with pytest.raises(ValueError, match="batch_size=8 is more than the 7 images"):
        ready(root, batch_size=8).train_dataloader()
