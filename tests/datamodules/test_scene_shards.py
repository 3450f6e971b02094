"""Shards of scenes: what goes in comes out, by number and id, in workers; and every damage is named."""

import json
import pickle

import pytest
import torch
from torch.utils.data import DataLoader
from waymo_cases import differences, small_scene

from datamodules.scene_shards import (
    MANIFEST,
    SceneShards,
    ShardError,
    ShardWriter,
    pack,
    read_index,
    read_place,
)


@pytest.fixture(scope="module")
def scenes():
    made = [small_scene(seed)._replace(scenario_id=f"szene-{seed}-ü") for seed in range(3)]
    bare = made[0]._replace(
        scenario_id="bare",
        feature_ids=torch.empty(0, dtype=torch.int64),
        feature_types=torch.empty(0, dtype=torch.int64),
        feature_starts=torch.zeros(1, dtype=torch.int64),
        points=torch.empty(0, 3),
        light_lanes=torch.empty(0, dtype=torch.int64),
        light_states=torch.empty(91, 0, dtype=torch.int64),
        light_stops=torch.empty(91, 0, 3),
        light_valid=torch.empty(91, 0, dtype=torch.bool),
    )
    return [*made, bare]


@pytest.fixture
def folder(tmp_path, scenes):
    for name, part in (("b", scenes[2:]), ("a", scenes[:2])):
        with ShardWriter(tmp_path / f"{name}.scenes") as writer:
            for scene in part:
                writer.add(scene)
            writer.about = {"name": name}
    return tmp_path


def test_every_field_comes_back(folder, scenes):
    shards = SceneShards(folder)
    assert len(shards) == 4
    for index, scene in enumerate(scenes):
        assert differences(shards[index], scene) == []
        assert shards.scenario_id(index) == scene.scenario_id
        assert shards.find(scene.scenario_id) == index
    assert differences(shards[-1], scenes[-1]) == []
    assert [scene.scenario_id for scene in shards] == [scene.scenario_id for scene in scenes]
    assert read_index(folder / "b.scenes")[1] == {"name": "b"}
    with pytest.raises(KeyError, match="no scenario 'absent'"):
        shards.find("absent")
    with pytest.raises(IndexError):
        shards[4]


def test_a_scene_may_be_written_to(folder, scenes):
    shards = SceneShards(folder)
    shards[0].positions.zero_()
    assert differences(shards[0], scenes[0]) == []


def test_workers_read_it(folder, scenes):
    shards = pickle.loads(pickle.dumps(SceneShards(folder)))
    loader = DataLoader(shards, batch_size=None, num_workers=1)
    for one, two in zip(loader, scenes, strict=True):
        assert differences(type(scenes[0])(*one), two) == []


def test_strided_tensors_are_written_in_order(tmp_path, scenes):
    turned = scenes[0]._replace(positions=scenes[0].positions.transpose(0, 1).contiguous().transpose(0, 1))
    assert not turned.positions.is_contiguous()
    assert pack(turned) == pack(scenes[0])


@pytest.mark.parametrize(
    "change", [{"headings": torch.zeros(3, 91)}, {"points": torch.zeros(4, 3, dtype=torch.float64)}]
)
def test_a_scene_of_other_shapes_is_refused(tmp_path, scenes, change):
    def write():
        with ShardWriter(tmp_path / "a.scenes") as writer:
            writer.add(scenes[0])
            writer.add(scenes[0]._replace(**change))

    with pytest.raises(ValueError, match=rf"{scenes[0].scenario_id}: {next(iter(change))} is torch"):
        write()
    assert not list(tmp_path.iterdir())  # nothing half-written


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def test_a_flipped_byte_names_shard_and_scene(folder, scenes):
    path = folder / "a.scenes"
    places, _ = read_index(path)
    flip(path, places[1].offset + places[1].length // 2)
    shards = SceneShards(folder)
    assert differences(shards[0], scenes[0]) == []
    with pytest.raises(
        ShardError, match=rf"a.scenes: scene {scenes[1].scenario_id} at byte {places[1].offset} is damaged"
    ):
        shards[1]


def test_a_shard_that_is_none(folder):
    path = folder / "a.scenes"
    whole = path.read_bytes()
    for content, words in (
        (whole[:-1], "a.scenes is cut off"),
        (whole[: len(whole) // 2], "a.scenes is cut off"),
        (b"", "not a shard"),
        (b"x" * 500, "not a shard"),
    ):
        path.write_bytes(content)
        with pytest.raises(ShardError, match=words):
            SceneShards(folder)
    path.write_bytes(whole)
    flip(path, len(whole) - 60)
    with pytest.raises(ShardError, match="its index fails its CRC"):
        SceneShards(folder)


def test_a_shard_that_is_replaced_by_a_shorter_one(folder):
    path = folder / "b.scenes"
    places, _ = read_index(path)
    path.write_bytes(path.read_bytes()[: places[1].offset + 10])
    with pytest.raises(ShardError, match=r"b.scenes: scene bare .* is damaged"):
        read_place(path, places[1])


def test_the_manifest_tells_what_belongs_together(folder):
    manifest = {"complete": True, "shards": [{"name": "a.scenes"}, {"name": "b.scenes"}]}
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest))
    assert len(SceneShards(folder)) == 4
    path.write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(ShardError, match="isn't finished"):
        SceneShards(folder)
    path.write_text(json.dumps(manifest | {"shards": manifest["shards"][:1]}))
    with pytest.raises(ShardError, match=r"b.scenes isn't in"):
        SceneShards(folder)
    path.write_text("{}")
    with pytest.raises(ShardError, match="no manifest"):
        SceneShards(folder)
    path.write_text(json.dumps(manifest))
    (folder / "b.scenes").unlink()
    with pytest.raises(FileNotFoundError, match=r"b.scenes is missing"):
        SceneShards(folder)


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \*.scenes"):
        SceneShards(tmp_path)
