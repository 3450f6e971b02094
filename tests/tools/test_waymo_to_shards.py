"""Conversion of TFRecord files to shards: what comes out, going on after a stop, damage within and beyond the budget."""

import json
import os

import pytest

from datamodules.scene_shards import SceneShards
from datamodules.synthetic_scenes import synthetic_scene
from datamodules.tfrecord import TFRecordFile, write_tfrecord
from datamodules.waymo_example import read_any, write_example
from datamodules.waymo_scenario import write_scenario
from tools import waymo_to_shards


@pytest.fixture(scope="module")
def records():
    scenes = [synthetic_scene(seed, agents=4, crossings=1) for seed in range(6)]
    write = [write_scenario, write_scenario, write_scenario, lambda scene: write_example(scene, rows=4000)]
    return [write[seed % 4](scene) for seed, scene in enumerate(scenes)]


@pytest.fixture
def source(tmp_path, records):
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(3):
        write_tfrecord(folder / f"v.tfrecord-0000{number}-of-00003", records[2 * number : 2 * number + 2])
    (folder / "README").write_text("not a record")
    return folder


def convert(*arguments):
    return waymo_to_shards.main([str(argument) for argument in arguments])


def damage(source, number, record):
    """Flip a byte in the data of one record and return its offset."""
    path = source / f"v.tfrecord-0000{number}-of-00003"
    offset = TFRecordFile(path).offsets[record]
    data = bytearray(path.read_bytes())
    data[offset + 40] ^= 1
    path.write_bytes(data)
    return offset


def same(one, two):
    """Whether two scenes are equal as Scenario records."""
    return write_scenario(one) == write_scenario(two)


def test_both_kinds_become_shards(source, tmp_path, records, capsys):
    out = tmp_path / "out"
    assert convert(source, out, "--dataset-version", "1.3.0") == 0
    assert "6 scenes with 24 agents in 3 shards" in capsys.readouterr().out
    shards = SceneShards(out)
    assert len(shards) == 6
    assert all(same(scene, read_any(data)) for scene, data in zip(shards, records, strict=True))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["dataset_version"] == "1.3.0"
    counts = manifest["counts"]
    assert (counts["scenes"], counts["Scenario records"], counts["tf.Example records"]) == (6, 5, 1)
    assert sum(counts[f"agents {name}"] for name in ("VEHICLE", "PEDESTRIAN", "CYCLIST")) == counts["agents"] == 24
    for shard in manifest["shards"]:
        assert waymo_to_shards.crc_of(out / shard["name"]) == shard["crc32c"]
        assert waymo_to_shards.crc_of(source / shard["source"]["name"]) == shard["source"]["crc32c"]
    assert {path.suffix for path in out.iterdir()} == {".scenes", ".json"}


def test_a_file_without_records_is_told(source, tmp_path, capsys):
    (source / "v.tfrecord-00001-of-00003").write_bytes(b"")
    assert convert(source, tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "warning: 1 files hold no record, such as v.tfrecord-00001-of-00003" in said.err
    assert "4 scenes" in said.out
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert counts["files without records"] == 1


def test_processes_give_the_same(source, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert convert(source, one) == 0
    assert convert(source, two, "--workers", 2) == 0
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_one_file_is_a_source_too(source, tmp_path):
    assert convert(source / "v.tfrecord-00001-of-00003", tmp_path / "out") == 0
    assert len(SceneShards(tmp_path / "out")) == 2


def test_it_goes_on_where_it_stopped(source, tmp_path, records, monkeypatch):
    out = tmp_path / "out"
    assert convert(source, out) == 0
    first, second, third = sorted(out.glob("*.scenes"))
    kept = first.stat().st_mtime_ns
    second.unlink()
    data = bytearray(third.read_bytes())
    data[1000] ^= 1
    third.write_bytes(data)
    (out / "v.scenes.0.partial").write_bytes(b"of a run that was killed")
    made = []
    convert_one = waymo_to_shards.convert
    monkeypatch.setattr(
        waymo_to_shards,
        "convert",
        lambda source, shard, budget: made.append(shard) or convert_one(source, shard, budget),
    )
    assert convert(source, out) == 0
    assert made == [second, third]
    assert first.stat().st_mtime_ns == kept
    assert all(same(scene, read_any(data)) for scene, data in zip(SceneShards(out), records, strict=True))
    assert not list(out.glob("*.partial"))

    write_tfrecord(source / "v.tfrecord-00000-of-00003", records[4:])  # a source that changed
    made.clear()
    assert convert(source, out) == 0
    assert made == [first]


def test_damaged_records_are_left_out_and_named(source, tmp_path, records, capsys):
    flipped = damage(source, 1, 0)
    with (source / "v.tfrecord-00002-of-00003").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 7)
    odd = [records[0], b"no scenario", records[1]]
    write_tfrecord(source / "v.tfrecord-00000-of-00003", odd)
    assert convert(source, tmp_path / "out", "--budget", 3) == 0
    errors = capsys.readouterr().err
    wrong = 16 + len(records[0])
    assert f"left out: v.tfrecord-00000-of-00003: record at byte {wrong}: not a Scenario" in errors
    assert f"left out: v.tfrecord-00001-of-00003: record at byte {flipped}: its" in errors
    cut = 16 + len(records[4])
    assert f"left out: v.tfrecord-00002-of-00003: record at byte {cut}: " in errors
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [fault["offset"] for fault in manifest["skipped"]] == [wrong, flipped, cut]
    assert manifest["counts"]["scenes"] == 4
    expected = [records[index] for index in (0, 1, 3, 4)]
    assert all(same(scene, read_any(data)) for scene, data in zip(SceneShards(tmp_path / "out"), expected, strict=True))


@pytest.mark.parametrize("budget", [0, 1])
def test_past_the_budget_it_stops(source, tmp_path, capsys, budget):
    out = tmp_path / "out"
    damage(source, 0, 1)
    last = damage(source, 2, 0)
    assert convert(source, out, "--budget", budget) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert f"--budget {budget}" in error
    if budget == 1:
        assert f"v.tfrecord-00002-of-00003: record at byte {last}" in error
    assert not list(out.glob("*.partial"))
    with pytest.raises((ValueError, FileNotFoundError), match=r"isn't finished|holds no"):
        SceneShards(out)
    assert convert(source, out, "--budget", 2) == 0  # and goes on with a larger one
    assert len(SceneShards(out)) == 4


def test_sources_that_are_none(source, tmp_path, records, capsys):
    def refused(words, *arguments):
        assert convert(*arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") <= 3  # a line, and the bar

    out = tmp_path / "out"
    refused("is neither a folder nor a file", tmp_path / "absent", out)
    refused("holds no file with tfrecord in its name", tmp_path, out)
    assert not out.exists()
    refused("README: record at byte 0: not a TFRecord file", source / "README", out)
    assert not list(out.glob("*.scenes"))
    (tmp_path / "empty.tfrecord").write_bytes(b"")
    refused("holds no sound record", tmp_path / "empty.tfrecord", tmp_path / "out2")
    assert convert(source, tmp_path / "out3") == 0
    write_tfrecord(tmp_path / "w.tfrecord", records[:1])
    refused("is of another source", tmp_path / "w.tfrecord", tmp_path / "out3")
    with pytest.raises(SystemExit):
        convert(source, out, "--workers", "0")
