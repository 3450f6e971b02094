"""The vocabulary tool builds from scenes, tells coverage, and fails in one line."""

import json

import pytest
import torch

from datamodules.embedded_scenes import load_embedded
from datamodules.embedded_source import SourceError
from datamodules.synthetic_scenes import synthetic_scene
from datamodules.tfrecord import write_tfrecord
from datamodules.waymo_scenario import write_scenario
from models.vocabulary import load, sampled
from tools.vocabulary import collect, inspect, main


def test_a_vocabulary_built_from_scenes_covers_them(tmp_path, capsys):
    out, numbers, picture = tmp_path / "v.safetensors", tmp_path / "v.json", tmp_path / "v.png"
    shared = ["--source", "synthetic", "--scenes", "3"]
    assert main(["build", *shared, "--size", "600", "--tolerance", "0.1", "--sampled", "20000", "--out", str(out)]) == 0
    assert max(load(out).counts) <= 600
    assert main(["inspect", *shared, "--vocabulary", str(out), "--json", str(numbers), "--picture", str(picture)]) == 0
    vehicle = json.loads(numbers.read_text())[0]
    assert vehicle["agent"] == "vehicle"
    assert vehicle["segments"] > 500
    assert vehicle["within"] > 0.8
    assert vehicle["mean"] < 0.1
    assert 0 < vehicle["tokens"] - vehicle["dead"] <= 600
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "vehicle: " in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"v.safetensors", "v.json", "v.png"}


def test_scenes_come_from_files_too(tmp_path, capsys):
    write_tfrecord(tmp_path / "a.tfrecord", [write_scenario(synthetic_scene(0))])
    assert main(["inspect", "--source", str(tmp_path / "a.tfrecord")]) == 0
    assert "motions" in capsys.readouterr().out


def test_dead_tokens_are_those_that_no_motion_is_nearest_to():
    vocabulary = sampled(64, (0.5, 0.2, 0.3), pool=2000)
    scene = synthetic_scene(0)
    inspections, uses = inspect(vocabulary, [scene], 10_000)
    for each, used in zip(inspections, uses, strict=True):
        assert int(used.sum()) == each.segments
        assert each.dead == int((used == 0).sum())


def test_motions_are_stretches_valid_throughout():
    scene = synthetic_scene(1)
    pools = collect([scene], 10**6, torch.Generator())
    expected = scene.valid.unfold(1, 6, 1).all(-1).sum()
    assert sum(len(pool) for pool in pools) == expected
    assert [len(pool) for pool in collect([scene], 7, torch.Generator())] == [min(7, len(pool)) for pool in pools]


def test_a_missing_source_fails_in_one_line_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "v.safetensors"
    assert main(["build", "--source", str(tmp_path / "none"), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not out.exists()
    assert main(["inspect", "--vocabulary", str(out), "--source", "synthetic"]) == 1
    assert "v.safetensors" in capsys.readouterr().err


def test_the_default_tokens_reconstruct_recorded_traffic():
    try:
        scenes = load_embedded()
    except SourceError as error:
        pytest.skip(f"the embedded scenes can't be had: {error}")
    inspections, _ = inspect(sampled(), scenes, 20_000)
    vehicle, pedestrian, _ = inspections
    # Measured: 0.07 m and 99 % for vehicles, 0.045 m for pedestrians.
    assert vehicle.mean < 0.09
    assert vehicle.percentile95 < 0.25
    assert vehicle.within > 0.97
    assert pedestrian.mean < 0.06
