"""The embedded COCO and ADE20k folders: pycocotools reads what was composed, both agree, our readers make batches."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from cutout_sources import linked, sources_or_skip
from PIL import Image

from datamodules.cutout_folders import ADE20K_NAMES, CATEGORY_IDS, CutoutFolder, class_map, run_lengths, write_coco
from datamodules.cutout_scenes import SceneSettings, compose_scenes
from datamodules.cutouts import CLASS_NAMES, SPLITS, CutOuts
from datamodules.detection_transforms import DetrAugment, ResizeForTest
from datamodules.embedded_ade20k import EmbeddedAde20k
from datamodules.embedded_coco import EmbeddedCoco

SIZES = {"train": 12, "val": 10}
SETTINGS = SceneSettings(empty=0.2)
OPTIONS = {
    "train_size": SIZES["train"],
    "val_size": SIZES["val"],
    "settings": SETTINGS,
    "image_size": 128,
    "batch_size": 4,
    "num_workers": 0,
    "pin_memory": False,
}


@pytest.fixture(scope="module")
def sources():
    return sources_or_skip()


@pytest.fixture(scope="module")
def cache(sources, tmp_path_factory):
    return linked(sources, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def coco(cache):
    augment = DetrAugment(short_sides=(96, 160), long_side=256, crop_probability=0.0)
    data = EmbeddedCoco(train_transform=augment, eval_transform=ResizeForTest, cache=cache, **OPTIONS)
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def ade20k(cache):
    data = EmbeddedAde20k(
        train_short_side=128, crop_size=128, scales=(0.75, 1.25), category_cap=1.0, cache=cache, **OPTIONS
    )
    data.prepare_data()
    data.setup()
    return data


def composed(sources, split):
    return list(compose_scenes(CutOuts(sources, split), SIZES[split], split, 0, SETTINGS))


def masks(height, width, seed):
    random = np.random.default_rng(seed)
    return [
        *(random.random((height, width)) < share for share in (0.05, 0.5, 0.95)),
        np.zeros((height, width), bool),
        np.ones((height, width), bool),
    ]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (13, 7)], ids=str)
def test_run_lengths_are_those_of_pycocotools(shape):
    reader = pytest.importorskip("pycocotools.mask")
    for mask in masks(*shape, seed=0):
        counts = run_lengths(mask)
        assert sum(counts) == mask.size
        encoded = reader.frPyObjects({"size": list(shape), "counts": counts}, *shape)
        np.testing.assert_array_equal(reader.decode(encoded).astype(bool), mask)
        assert encoded["counts"] == reader.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]


@pytest.mark.parametrize("split", SPLITS)
def test_pycocotools_reads_the_masks_and_boxes_that_were_composed(coco, sources, split):
    reader = pytest.importorskip("pycocotools.mask")
    known = pytest.importorskip("pycocotools.coco").COCO(coco.path / "annotations" / f"instances_{split}2017.json")
    scenes = composed(sources, split)
    assert [known.cats[i]["name"] for i in sorted(known.cats)] == list(CLASS_NAMES)
    assert len(known.imgs) == len(scenes)
    for image_id, scene in zip(sorted(known.imgs), scenes, strict=True):
        image = known.imgs[image_id]
        assert (image["height"], image["width"]) == scene.objects.shape
        with Image.open(coco.path / f"{split}2017" / image["file_name"]) as file:
            assert np.abs(np.asarray(file, float) - scene.image).mean() < 6  # of 255: JPEG
        rows = known.loadAnns(sorted(known.getAnnIds(image_id)))
        assert len(rows) == len(scene.labels)
        for number, (row, label) in enumerate(zip(rows, scene.labels, strict=True), 1):
            mask = known.annToMask(row)
            np.testing.assert_array_equal(mask.astype(bool), scene.objects == number)
            encoded = known.annToRLE(row)
            assert reader.toBbox(encoded).tolist() == row["bbox"]
            assert reader.area(encoded) == row["area"]
            assert row["category_id"] == CATEGORY_IDS[label]
            assert row["iscrowd"] == 0


def test_ids_are_unique_over_both_splits_and_not_contiguous(coco):
    files = [json.loads((coco.path / "annotations" / f"instances_{split}2017.json").read_text()) for split in SPLITS]
    for key in ("images", "annotations"):
        ids = [row["id"] for content in files for row in content[key]]
        assert len(set(ids)) == len(ids)
    assert {"info", "licenses"} <= set(files[0])
    assert files[0]["categories"] == files[1]["categories"]
    assert len(set(CATEGORY_IDS)) == len(CLASS_NAMES)
    assert set(CATEGORY_IDS) != set(range(1, len(CLASS_NAMES) + 1))


@pytest.mark.parametrize("split", SPLITS)
def test_both_folders_hold_the_same_scenes(coco, ade20k, sources, split):
    long = {"train": "training", "val": "validation"}[split]
    files = sorted((coco.path / f"{split}2017").iterdir())
    names = [f"ADE_{split}_{number:08d}" for number in range(1, len(files) + 1)]
    assert sorted(file.stem for file in (ade20k.path / "annotations" / long).iterdir()) == names
    for file, name, scene in zip(files, names, composed(sources, split), strict=True):
        assert file.read_bytes() == (ade20k.path / "images" / long / f"{name}.jpg").read_bytes()
        with Image.open(ade20k.path / "annotations" / long / f"{name}.png") as opened:
            assert opened.mode == "L"
            classes = np.asarray(opened)
        np.testing.assert_array_equal(classes, class_map(scene))
        told = classes[~scene.rim]
        expected = [1, *(label + 2 for label in scene.labels)]
        assert (told == np.array(expected)[scene.objects[~scene.rim]]).all()
        assert (classes[scene.rim] == 0).all()


def test_object_info_counts_pixels_and_images(ade20k):
    header, *rows = (line.split("\t") for line in (ade20k.path / "objectInfo150.txt").read_text().splitlines())
    assert header == ["Idx", "Ratio", "Train", "Val", "Stuff", "Name"]
    assert [row[5] for row in rows] == list(ADE20K_NAMES)
    pixels = {}
    for split, column in (("training", 2), ("validation", 3)):
        files = sorted((ade20k.path / "annotations" / split).iterdir())
        pixels[split] = [np.bincount(np.asarray(Image.open(file)).ravel(), minlength=12)[1:] for file in files]
        assert [int(row[column]) for row in rows] == (np.array(pixels[split]) > 0).sum(0).tolist()
    totals = np.sum(pixels["training"], 0)
    np.testing.assert_allclose([float(row[1]) for row in rows], totals / totals.sum(), atol=5.1e-5)  # four digits


def test_the_detection_reader_makes_batches(coco):
    assert coco.class_names == list(CLASS_NAMES)
    assert len(coco.train_images) == SIZES["train"]
    train, val = next(iter(coco.train_dataloader())), list(coco.val_dataloader())
    for batch in (train, *val):
        for (height, width), target in zip(batch.sizes.tolist(), batch.targets, strict=True):
            limits = torch.tensor((width, height, width, height))
            assert (target.boxes >= 0).all()
            assert (target.boxes <= limits).all()
            assert (target.boxes[:, 2:] > target.boxes[:, :2]).all()
            assert ((target.labels >= 0) & (target.labels < coco.num_classes)).all()
    counts = [len(target.labels) for batch in val for target in batch.targets]
    assert len(counts) == SIZES["val"]
    assert counts.count(0) == 2  # a fifth has no objects
    assert all(min(size) == 128 for batch in val for size in batch.sizes.tolist())


def test_the_segmentation_reader_makes_batches(ade20k):
    assert list(ade20k.class_names) == list(ADE20K_NAMES)
    train, val = next(iter(ade20k.train_dataloader())), list(ade20k.val_dataloader())
    assert train.images.shape == (4, 3, 128, 128)
    assert sum(len(batch.image_ids) for batch in val) == SIZES["val"]
    for batch in (train, *val):
        values = batch.targets.unique().tolist()
        assert set(values) <= {*range(len(ADE20K_NAMES)), 255}
        assert 0 in values
    assert 255 in train.targets  # rims


def test_a_folder_is_written_once_and_another_set_elsewhere(coco, cache):
    folder = partial(CutoutFolder, "coco", write_coco, cache=cache)
    same = folder(SIZES, 0, SETTINGS)
    assert same.path == coco.path
    before = (coco.path / "annotations").stat().st_mtime_ns
    assert same.prepare() == coco.path
    assert (coco.path / "annotations").stat().st_mtime_ns == before
    others = [folder(SIZES, 1, SETTINGS), folder(SIZES, 0), folder({**SIZES, "val": 11}, 0, SETTINGS)]
    assert len({other.path for other in others} | {same.path}) == 4


def test_an_interrupted_writer_leaves_no_folder(cache):
    def stopped(content, *_):
        (content / "train2017").mkdir()
        raise KeyboardInterrupt

    folder = CutoutFolder("stopped", stopped, SIZES, cache=cache)
    with pytest.raises(KeyboardInterrupt):
        folder.prepare()
    assert not folder.path.exists()


@pytest.mark.parametrize(("split", "size"), [("train", 0), ("val", 500_001)])
def test_sizes_out_of_range_are_refused(split, size):
    with pytest.raises(ValueError, match=f"{split}_size={size}"):
        CutoutFolder("coco", write_coco, {**SIZES, split: size})
