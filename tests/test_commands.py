"""The commands as a user types them: train, resume, evaluate, sweep; and one line for what can't work."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import folder
import pytest
import torch

from launch import newest_checkpoint, with_overrides_of_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def run(script, *arguments, ok=True):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert (done.returncode == 0) == ok, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return folder.write(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    run("train.py", *folder.overrides(images), "position=axial", f"hydra.run.dir={path}")
    return path


def test_the_run_folder_tells_everything(trained):
    for name in ("last.ckpt", "config.yaml", "versions.yaml", "csv/version_0/metrics.csv"):
        assert (trained / name).is_file(), name
    assert list((trained / "tensorboard").iterdir())
    assert "_target_: rotary.frequencies.Axial" in (trained / "config.yaml").read_text()
    assert f"torch: {torch.__version__.split('+')[0]}" in (trained / "versions.yaml").read_text()


def test_resuming_goes_on_to_the_epoch_asked_for(images, trained, tmp_path):
    common = [*folder.overrides(images), "position=axial"]
    more = run("train.py", *common, "epochs=3", f"ckpt={trained}/last.ckpt", "resume=true", f"hydra.run.dir={tmp_path}")
    assert "Epoch 2" in more.stderr + more.stdout
    assert "Epoch 1:" not in more.stderr + more.stdout
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 2


def test_a_sweep_writes_rows_a_table_and_a_figure(trained, tmp_path):
    results = tmp_path / "results.csv"
    points = "hydra.sweeper.params.resolution='16,[16,32]'"
    done = run("evaluate.py", f"ckpt={trained}/last.ckpt", f"results={results}", "sweep=resolution", points)
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["resolution"], row["scaling"]) for row in rows} == {
        (size, scaling) for size in ("16", "16x32") for scaling in ("identity", "interpolate", "ntk", "yarn")
    }
    assert {row["model"] for row in rows} == {"vit_nano axial"}
    assert all(float(row["top1"]) > 0.9 for row in rows if row["resolution"] == "16")  # three colours
    assert (tmp_path / "resolution.png").read_bytes().startswith(b"\x89PNG")
    assert "top1 (%) by test resolution" in done.stdout


BAD = {
    "unknown key": (["modle.depth=3"], "Key 'modle' is not in struct"),
    "unknown value": (["position=polar"], "Could not find 'position/polar'"),
    "head width": (["model.num_heads=5"], "embed_dim=48 doesn't divide by num_heads=5"),
    "no folder": (["datamodule.path=/nowhere"], "/nowhere"),
    "class count": (["model.num_classes=7"], "answers with 7 classes, the data has 3"),
    "classes on disk": (["datamodule.num_classes=4"], "4"),
    "patch": (["image_size=18"], "isn't a multiple of the patch (4); the nearest is"),
    "resume what": (["resume=true"], "resume=true needs ckpt=PATH"),
    "no checkpoint": (["ckpt=/nowhere.ckpt", "resume=true"], "ckpt=/nowhere.ckpt: no such file"),
    "no path": (["datamodule.path=???"], "datamodule.path"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_before_training(images, tmp_path, case):
    arguments, message = BAD[case]
    done = run("train.py", *folder.overrides(images), *arguments, f"hydra.run.dir={tmp_path}", ok=False)
    said = done.stderr + done.stdout
    assert message in said
    assert "Traceback" not in said
    assert "Epoch 0" not in said


def test_a_checkpoint_of_another_architecture_is_named(trained):
    done = run("evaluate.py", f"ckpt={trained}/last.ckpt", "model.depth=3", "results=/dev/null", ok=False)
    assert "last.ckpt" in done.stderr
    assert "blocks.2" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_resolution_that_is_no_multiple_is_named(trained, tmp_path):
    results = tmp_path / "results.csv"
    done = run("evaluate.py", f"ckpt={trained}/last.ckpt", "resolution=30", f"results={results}", ok=False)
    assert "isn't a multiple of the patch (4); the nearest is" in done.stderr
    assert not results.exists()


def test_last_is_the_newest_run_of_the_task(tmp_path):
    for age, name in ((20, "imagenet/b"), (10, "imagenet/a"), (5, "other/c")):
        path = tmp_path / name / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    arguments = ["evaluate.py", "task=imagenet", "ckpt=last"]
    newest_checkpoint(arguments, tmp_path)
    assert arguments[2] == f"ckpt={tmp_path}/imagenet/a/last.ckpt"
    with pytest.raises(ValueError, match="train first"):
        newest_checkpoint(["evaluate.py", "task=lm", "ckpt=last"], tmp_path)


def test_a_folder_of_runs_speaks_through_its_first(trained, tmp_path):
    (tmp_path / "axial-seed0").symlink_to(trained)
    arguments = ["evaluate.py", f"ckpt={tmp_path}", "epochs=7"]
    with_overrides_of_checkpoint(arguments, swept=("position",))
    assert "task=imagenet" in arguments
    assert not any(argument.startswith("position=") for argument in arguments)
    assert arguments.count("epochs=7") == 1
    assert "epochs=2" not in arguments


@pytest.mark.parametrize(
    ("trained", "given", "expected"),
    [
        (["+model.norm=batch"], [], ["+model.norm=batch"]),
        (["~data.transform", "+data.transform={a:1}"], [], ["~data.transform", "+data.transform={a:1}"]),
        (["~data.transform", "+data.transform={a:1}"], ["+data.transform={b:2}"], ["~data.transform"]),
        (["+model.norm=batch"], ["+model.norm=group"], []),
        (["~data.transform"], ["~data.transform"], []),
    ],
)
def test_overrides_that_add_and_remove_come_once(tmp_path, trained, given, expected):
    """A second rank is started with the arguments of the first, which have them already."""
    path = tmp_path / "last.ckpt"
    torch.save({"run": {"overrides": ["task=coco", *trained]}}, path)
    arguments = ["evaluate.py", f"ckpt={path}", *given]
    for _ in range(2):
        with_overrides_of_checkpoint(arguments)
        assert arguments == ["evaluate.py", "task=coco", *expected, f"ckpt={path}", *given]


def test_what_is_chosen_anew_sheds_its_old_keys(tmp_path):
    path = tmp_path / "last.ckpt"
    overrides = ["task=trajectory", "datamodule=scenes_womd", "datamodule.path=D", "pos=rope"]
    torch.save({"run": {"overrides": overrides}}, path)
    for given in ("sweep=agents", "datamodule=scenes_synthetic"):
        arguments = ["evaluate.py", f"ckpt={path}", given]
        with_overrides_of_checkpoint(arguments)
        assert set(arguments) == {"evaluate.py", "task=trajectory", "pos=rope", f"ckpt={path}", given}
