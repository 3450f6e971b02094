"""The commands of detection and segmentation as a user types them, on scenes of real cut-outs over real photographs: train,
resume, start from a classifier, evaluate, sweep; one line for bad input."""

import csv
import json
import shutil

import folder
import pytest
import torch
from cutout_sources import linked, sources_or_skip
from PIL import Image
from test_language_commands import content, rows_in, the_error, typed

import evaluate
import train
from datamodules.cutout_folders import ADE20K_NAMES, CutoutFolder, write_ade20k, write_coco
from datamodules.cutouts import CLASS_NAMES

STEPS = 2  # of an epoch
SIZES = {"train": 8 * STEPS, "val": 8}
QUIET = [
    "threads=1",
    "trainer.accelerator=cpu",
    "callbacks.progress.refresh_rate=1000",
    "loggers.tensorboard=null",
]
PLAIN = ["num_workers=0", "pin_memory=false", "persistent_workers=false"]
TASKS = {
    "coco": [
        "image_size=64",
        "epochs=1",
        "datamodule.batch_size=8",
        "datamodule.train_transform.short_sides=[48,64]",
        "datamodule.train_transform.long_side=96",
    ],
    "ade20k": ["image_size=48", "epochs=1", "datamodule.batch_size=8", "datamodule.eval_batch_size=3"],
}
MODELS = {"coco": "rt_detr_nano vitdet_nano mixed", "ade20k": "uper_net_nano taps_nano mixed"}
METRICS = {"coco": ("ap", "ap50"), "ade20k": ("miou",)}
PICTURES = {"coco": "detections.png", "ade20k": "segmentations.png"}
SCORES = {"coco": ("ap", CLASS_NAMES), "ade20k": ("iou", ADE20K_NAMES)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return linked(sources_or_skip(), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def given(cache):
    """Task → overrides that train it on a few scenes, written where they lack."""
    few = [f"datamodule.{split}_size={size}" for split, size in SIZES.items()]
    return {task: [f"task={task}", *QUIET, *few, f"+datamodule.cache={cache}", *TASKS[task]] for task in TASKS}


@pytest.fixture(scope="module")
def trained(given, tmp_path_factory):
    """Task → run folder."""
    runs = {task: tmp_path_factory.mktemp(task) for task in TASKS}
    for task, path in runs.items():
        assert typed(train, *given[task], f"hydra.run.dir={path}") == 0
    return runs


@pytest.fixture(scope="module")
def folders(cache):
    """Task → data set on disk."""
    writers = {"coco": write_coco, "ade20k": write_ade20k}
    return {task: CutoutFolder(task, write, SIZES, cache=cache).prepare() for task, write in writers.items()}


def on_disk(task, path):
    """Overrides that train on a user's folder."""
    classes = {"coco": len(CLASS_NAMES), "ade20k": len(ADE20K_NAMES)}[task]
    data = [f"datamodule={task}", f"datamodule.path={path}", f"datamodule.num_classes={classes}"]
    return [f"task={task}", *data, *QUIET, *(f"datamodule.{word}" for word in PLAIN), *TASKS[task]]


@pytest.mark.parametrize("task", TASKS)
def test_a_run_ends_with_a_checkpoint_and_its_losses(trained, task):
    saved = content(trained[task] / "last.ckpt")
    assert (saved["epoch"], saved["global_step"]) == (0, STEPS)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    with (trained[task] / "csv/version_0/metrics.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row[f"val/{METRICS[task][0]}"]]
    assert 0 <= float(row[f"val/{METRICS[task][0]}"]) <= 1


@pytest.mark.parametrize("task", TASKS)
def test_resuming_goes_on_to_the_epoch_asked_for(given, trained, tmp_path, task):
    resumed = ["epochs=2", f"ckpt={trained[task]}/last.ckpt", "resume=true", f"hydra.run.dir={tmp_path}"]
    assert typed(train, *given[task], *resumed) == 0
    saved = content(tmp_path / "last.ckpt")
    assert (saved["epoch"], saved["global_step"]) == (1, 2 * STEPS)
    before = content(trained[task] / "last.ckpt")["state_dict"]
    assert any(not torch.equal(value, saved["state_dict"][name]) for name, value in before.items())


@pytest.mark.parametrize("task", TASKS)
def test_an_evaluation_gives_a_row_pictures_and_a_table_of_classes(trained, tmp_path, task):
    results = tmp_path / "results.csv"
    where = [f"ckpt={trained[task]}/last.ckpt", f"results={results}", f"hydra.run.dir={tmp_path}"]
    assert typed(evaluate, *where) == 0  # the checkpoint tells task, model and data
    (row,) = rows_in(results)
    size = TASKS[task][0].removeprefix("image_size=")
    assert (row["model"], row["resolution"], row["trained_at"]) == (MODELS[task], size, size)
    assert all(0 <= float(row[metric]) <= 1 for metric in METRICS[task])
    with Image.open(tmp_path / PICTURES[task]) as picture:
        assert min(picture.size) > 100
    with (tmp_path / "classes.csv").open(newline="") as file:
        head, *classes = csv.reader(file)
    score, names = SCORES[task]
    assert head == ["class", score]
    assert 0 < len(classes) <= len({name for name, _ in classes} & set(names))
    mean = sum(float(value) for _, value in classes) / len(classes)
    assert mean == pytest.approx(float(row[METRICS[task][0]]), abs=2e-6)  # both have six digits


@pytest.mark.parametrize("task", TASKS)
def test_a_sweep_of_resolutions_is_drawn(trained, tmp_path, task):
    results = tmp_path / "results.csv"
    points = "hydra.sweeper.params.resolution='32,64'"
    where = [f"ckpt={trained[task]}/last.ckpt", f"results={results}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    assert typed(evaluate, *where, "sweep=resolution", points, "evaluation.callbacks.pictures=null") == 0
    rows = rows_in(results)
    assert [(row["resolution"], row["scaling"]) for row in rows] == [("32", "identity"), ("64", "identity")]
    assert (tmp_path / "resolution.png").read_bytes().startswith(b"\x89PNG")


def test_windows_and_scales_are_set_for_an_evaluation(trained, tmp_path):
    results = tmp_path / "results.csv"
    where = [f"ckpt={trained['ade20k']}/last.ckpt", f"results={results}", f"hydra.run.dir={tmp_path}"]
    asked = ["task.crop=48", "task.stride=32", "task.ratios=[0.5,1.0]", "task.flip=true"]
    assert typed(evaluate, *where, *asked, "+trainer.limit_test_batches=1") == 0
    (row,) = rows_in(results)
    assert row["ratios"] == "[0.5, 1.0]"
    assert 0 <= float(row["miou"]) <= 1


@pytest.mark.parametrize("task", TASKS)
def test_a_folder_of_the_user_trains_too(folders, tmp_path, task):
    short = ["+trainer.limit_train_batches=1", f"hydra.run.dir={tmp_path}"]
    assert typed(train, *on_disk(task, folders[task]), *short) == 0
    assert content(tmp_path / "last.ckpt")["global_step"] == 1


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The run folder of a ViT that was trained to tell images apart, of the width and depth of the backbones."""
    path = tmp_path_factory.mktemp("classifier")
    images = folder.write(tmp_path_factory.mktemp("images"))
    like_trunk = ["embed_dim=96", "num_heads=3", "depth=4", "patch_size=8"]
    shape = [f"model.{word}" for word in like_trunk]
    more = ["position=mixed", "epochs=1", "+trainer.limit_train_batches=1", "loggers.tensorboard=null"]
    assert typed(train, *folder.overrides(images), *shape, "+model.mlp_ratio=2", *more, f"hydra.run.dir={path}") == 0
    return path


def test_a_classifier_gives_the_backbone_its_weights(given, classifier, tmp_path):
    still = ["task.optimizer.lr=0.0", "task.optimizer.other_lr=0.0", "+trainer.limit_train_batches=1"]
    weights = f"pretrained={classifier}/last.ckpt"
    runs = {name: tmp_path / name for name in ("pretrained", "fresh")}
    assert typed(train, *given["coco"], *still, weights, f"hydra.run.dir={runs['pretrained']}") == 0
    assert typed(train, *given["coco"], *still, f"hydra.run.dir={runs['fresh']}") == 0
    source = content(classifier / "last.ckpt")["state_dict"]
    made, fresh = (content(path / "last.ckpt")["state_dict"] for path in runs.values())
    trunk = {name: value for name, value in made.items() if ".trunk." in name}
    assert any("rope.freqs" in name for name in trunk)
    assert all(torch.equal(value, source[name.replace("backbone.trunk.", "")]) for name, value in trunk.items())
    head = [name for name in made if ".trunk." not in name and "running" not in name and "num_batches" not in name]
    assert any("decoder" in name for name in head)
    assert all(torch.equal(made[name], fresh[name]) for name in head)
    assert not any(torch.equal(value, fresh[name]) for name, value in trunk.items() if name.endswith("qkv.weight"))


def test_an_evaluation_needs_no_pretrained_file(given, classifier, tmp_path):
    weights = tmp_path / "weights.ckpt"
    shutil.copy(classifier / "last.ckpt", weights)
    short = ["+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1", f"pretrained={weights}"]
    assert typed(train, *given["coco"], *short, f"hydra.run.dir={tmp_path}") == 0
    weights.unlink()
    asked = [f"results={tmp_path / 'results.csv'}", "+trainer.limit_test_batches=1", f"hydra.run.dir={tmp_path / 'e'}"]
    assert typed(evaluate, f"ckpt={tmp_path / 'last.ckpt'}", *asked) == 0


def test_a_requeued_run_resumes_with_the_command_it_was_started_with(given, classifier, trained, tmp_path, capfd):
    """scripts/train.sbatch adds ckpt and resume=true to it; the checkpoint has the weights, whatever `pretrained` says."""
    both = [f"pretrained={classifier}/last.ckpt", f"ckpt={trained['coco']}/last.ckpt"]
    assert typed(train, *given["coco"], *both, "epochs=2", "resume=true", f"hydra.run.dir={tmp_path / 'resumed'}") == 0
    assert "pretrained:" not in capfd.readouterr().out
    assert content(tmp_path / "resumed" / "last.ckpt")["global_step"] == 2 * STEPS
    assert typed(train, *given["coco"], *both, f"hydra.run.dir={tmp_path / 'both'}") == 2
    assert "ckpt and pretrained both give weights" in the_error(capfd.readouterr().err)


def cut_json(root):
    file = root / "annotations/instances_train2017.json"
    file.write_bytes(file.read_bytes()[:5000])


def without_image(root):
    next((root / "val2017").iterdir()).unlink()


def of_no_image(root):
    file = root / "annotations/instances_val2017.json"
    told = json.loads(file.read_text())
    told["annotations"][0]["image_id"] = 77
    file.write_text(json.dumps(told))


def without_annotation(root):
    next((root / "annotations/training").iterdir()).unlink()


def narrower(root):
    file = next((root / "annotations/validation").iterdir())
    with Image.open(file) as opened:
        smaller = opened.crop((0, 0, opened.width - 3, opened.height))
    smaller.save(file)


def nothing(root):
    pass


BAD = {
    "coco, cut json": ("coco", cut_json, [], "instances_train2017.json is corrupt at byte 4"),
    "coco, missing image": ("coco", without_image, [], "is not there; unpack the images again"),
    "coco, missing image's object": ("coco", of_no_image, [], "is of image 77, which is not there"),
    "coco, classes": ("coco", nothing, ["datamodule.num_classes=80"], "num_classes=80, but"),
    "coco, model's classes": ("coco", nothing, ["model.num_classes=3"], "the model tells 3 classes, the data has 10"),
    "coco, no folder": ("coco", nothing, ["datamodule.path=/nowhere"], "path=/nowhere is no folder"),
    "coco, no path": ("coco", nothing, ["datamodule.path=???"], "datamodule.path"),
    "coco, foreign weights": ("coco", nothing, ["pretrained=/nowhere.pth"], "/nowhere.pth"),
    "ade20k, missing annotation": ("ade20k", without_annotation, [], "has no annotation"),
    "ade20k, sizes": ("ade20k", narrower, [], "pixels (width x height), but its image is"),
    "ade20k, classes": ("ade20k", nothing, ["datamodule.num_classes=150"], "num_classes=150, but"),
    "ade20k, crop alone": ("ade20k", nothing, ["task.crop=48"], "task.crop=48 and task.stride=None go together"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_before_training(folders, tmp_path, case, capfd):
    task, spoil, arguments, message = BAD[case]
    path = shutil.copytree(folders[task], tmp_path / "data")
    spoil(path)
    assert typed(train, *on_disk(task, path), *arguments, f"hydra.run.dir={tmp_path / 'run'}") == 2
    out, err = capfd.readouterr()
    assert message in the_error(err)
    assert "Epoch 0" not in out + err
    assert not (tmp_path / "run/last.ckpt").exists()


def test_weights_of_another_network_are_named(given, classifier, trained, tmp_path, capfd):
    other = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.ones(3)}, other)
    cases = {
        f"{other}": "no vision transformer (it starts with conv1.weight)",
        f"{trained['ade20k']}/last.ckpt": "no vision transformer (it starts with backbone.trunk.",
    }
    for path, message in cases.items():
        assert typed(train, *given["coco"], f"pretrained={path}", f"hydra.run.dir={tmp_path}") == 2
        error = the_error(capfd.readouterr().err)
        assert path in error
        assert message in error
    deeper = ["backbone.trunk.depth=5", f"pretrained={classifier}/last.ckpt"]
    assert typed(train, *given["coco"], *deeper, f"hydra.run.dir={tmp_path}") == 2
    assert "the model is a ViT of width 96 and depth 5" in the_error(capfd.readouterr().err)
