"""Scenes found by their ids in TFRecord files; what is missing or damaged is named."""

import pytest
import torch

from datamodules.scene_shards import ShardError
from datamodules.synthetic_scenes import synthetic_scene
from datamodules.tfrecord import write_tfrecord
from datamodules.waymo_example import write_example
from datamodules.waymo_scenario import write_scenario
from tools import waymo_to_shards
from tools.scene_source import find_scenes, scenes_of_files


@pytest.fixture
def folder(tmp_path):
    for part in (0, 1):
        records = [write_scenario(synthetic_scene(2 * part + seed, agents=3)) for seed in (0, 1)]
        write_tfrecord(tmp_path / f"scenes.tfrecord-0000{part}-of-00002", records)
    (tmp_path / "notes.txt").write_text("not read")
    return tmp_path


def test_scenes_are_found_by_id(folder):
    ids = [scene.scenario_id for scene in scenes_of_files(folder)]
    assert ids == [synthetic_scene(seed, agents=3).scenario_id for seed in range(4)]
    assert [scene.scenario_id for scene in find_scenes(str(folder), [ids[3], ids[1]])] == [ids[1], ids[3]]
    one = folder / "scenes.tfrecord-00001-of-00002"
    assert [scene.scenario_id for scene in find_scenes(str(one), [ids[2]])] == [ids[2]]
    with pytest.raises(ValueError, match=f"lacks 1 of the scenarios asked for, such as {ids[0]}"):
        list(find_scenes(str(one), ids[0:1] + ids[2:]))


def test_examples_and_shards_are_scenes_too(folder, tmp_path):
    scenes = list(scenes_of_files(folder))
    examples = tmp_path / "examples.tfrecord"
    write_tfrecord(examples, map(write_example, scenes))
    read = list(scenes_of_files(examples))
    assert [scene.scenario_id for scene in read] == [scene.scenario_id for scene in scenes]
    assert all(torch.equal(one.valid, two.valid) for one, two in zip(read, scenes, strict=True))
    examples.unlink()
    shards = tmp_path / "shards"
    assert waymo_to_shards.main([str(folder), str(shards)]) == 0
    packed = list(scenes_of_files(shards))
    assert [write_scenario(scene) for scene in packed] == [write_scenario(scene) for scene in scenes]
    one = sorted(shards.glob("*.scenes"))[1]
    assert [scene.scenario_id for scene in scenes_of_files(one)] == [scene.scenario_id for scene in scenes[2:]]
    (found,) = find_scenes(str(shards), [scenes[3].scenario_id])
    assert torch.equal(found.positions, scenes[3].positions)
    one.unlink()
    with pytest.raises(FileNotFoundError, match=one.name):
        list(scenes_of_files(shards))
    one.write_bytes(b"x" * 100)
    with pytest.raises(ShardError, match=one.name):
        list(scenes_of_files(one))


def test_damage_is_named(folder):
    write_tfrecord(folder / "wrong.tfrecord", [write_scenario(synthetic_scene(9, agents=3)), b"\x0a\xff"])
    with pytest.raises(ValueError, match=r"wrong\.tfrecord: record 1: "):
        list(scenes_of_files(folder / "wrong.tfrecord"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(scenes_of_files(folder / "nowhere"))
