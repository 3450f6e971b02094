"""tf.Example records: the same scene as the Scenario record gives, what the format can't hold, and damaged lists."""

from collections import Counter

import numpy as np
import pytest
import torch
from waymo_cases import differences, small_scene

from datamodules import wire
from datamodules.protos import example_pb2, scenario_pb2
from datamodules.waymo_example import is_example, read_any, read_example, write_example
from datamodules.waymo_scenario import read_scenario, write_scenario
from datamodules.wire import varints


@pytest.fixture(scope="module")
def scene():
    return small_scene()


@pytest.fixture(scope="module")
def data(scene):
    return write_example(scene, rows=4000)


@pytest.fixture
def example(data):
    return example_pb2.Example.FromString(data)


def listed(values):
    """A packed list as the features hold it, written independently of the code under test."""
    packed = (
        values.tobytes() if values.dtype == np.float32 else b"".join(varint(int(value) % 2**64) for value in values)
    )
    return b"\x0a" + varint(len(packed)) + packed


def varint(value):
    out = []
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize("seed", range(3))
def test_both_formats_give_equal_tensors(seed):
    scene = small_scene(seed)
    assert differences(read_any(write_example(scene, rows=4000)), read_any(write_scenario(scene))) == []


def test_off_the_grid_coordinates_differ_by_their_float32(scene):
    moved = scene._replace(positions=scene.positions + 1e-4 * torch.rand_like(scene.positions) * scene.valid[..., None])
    one, two = read_any(write_scenario(moved)), read_any(write_example(moved, rows=4000))
    assert differences(one, two) == ["positions"]
    half = 2.0**-12  # of the spacing of float32 between 4096 and 8192 m is 2⁻¹²; the scene's own rounding adds far less
    assert (one.positions - two.positions).abs().max() <= half * 1.01


def test_the_kind_is_told_by_the_bytes(scene, data):
    assert is_example(data)
    assert not is_example(write_scenario(scene))
    assert not is_example(b"")
    assert not is_example(b"\x0a")
    packed_times = b"\x0a" + varint(8 * 91) + bytes(8 * 91)  # a Scenario whose timestamps are packed
    assert not is_example(packed_times + write_scenario(scene))


def test_scenario_with_packed_timestamps_reads(scene):
    message = scenario_pb2.Scenario.FromString(write_scenario(scene))
    message.ClearField("timestamps_seconds")
    packed = b"\x0a" + varint(8 * 91) + scene.times.numpy().tobytes()
    assert differences(read_any(packed + message.SerializeToString()), scene) == []


def test_slots_are_as_in_the_dataset(scene, example):
    features = example.features.feature
    for name, count in (("state/id", 128), ("state/past/x", 1280), ("state/current/x", 128), ("state/future/x", 10240)):
        packed = features[name].float_list
        assert packed == listed(np.frombuffer(packed[-4 * count :], np.float32))
    ids = np.frombuffer(features["state/id"].float_list[-4 * 128 :], np.float32)
    assert ids[: scene.agents].tolist() == scene.agent_ids.tolist()
    assert (ids[scene.agents :] == -1).all()
    x = np.frombuffer(features["state/future/x"].float_list[-4 * 10240 :], np.float32).reshape(128, 80)
    valid = scene.valid[:, 11:].numpy()
    assert (x[: scene.agents][~valid] == -1).all()
    expected = (scene.positions[:, 11:, 0].double() + scene.origin[0]).numpy()
    assert (x[: scene.agents][valid] == expected[valid]).all()


def test_unpacked_lists_and_float_flags_read_too(scene, example):
    features = example.features.feature
    ids = np.frombuffer(features["state/id"].float_list[-4 * 128 :], np.float32)
    features["state/id"].float_list = b"".join(b"\x0d" + value.tobytes() for value in ids)
    kinds = np.full(128, -1, np.int64)
    kinds[: scene.agents] = scene.agent_types.numpy()
    features["state/type"].int64_list = b"".join(b"\x08" + varint(int(kind) % 2**64) for kind in kinds)
    assert differences(read_example(example.SerializeToString()), scene) == []


def test_rows_of_one_feature_are_brought_together(scene, example):
    """As a file would have them that samples features in turns: order of rows within a feature is kept."""
    features = example.features.feature
    rows = 4000
    order = np.arange(rows)
    ids = np.full(rows, -1)
    sizes = scene.feature_starts.diff()
    ids[: len(scene.points)] = scene.feature_ids.repeat_interleave(sizes).numpy()
    order = np.concatenate((order[::2], order[1::2]))  # every other row first
    for name, width in (("xyz", 12), ("dir", 12)):
        packed = features[f"roadgraph_samples/{name}"].float_list
        values = np.frombuffer(packed[-width * rows :], np.float32).reshape(rows, 3)[order]
        features[f"roadgraph_samples/{name}"].float_list = listed(values)
    for name in ("id", "type", "valid"):
        packed = features[f"roadgraph_samples/{name}"].int64_list
        begin = len(packed) - (len(packed) - 1 - len(varint(len(packed))))
        values = varints(np.frombuffer(packed, np.uint8, offset=begin))[order]
        features[f"roadgraph_samples/{name}"].int64_list = listed(values)
    mixed = read_example(example.SerializeToString())
    where = {number: index for index, number in enumerate(mixed.feature_ids.tolist())}
    assert sorted(where) == sorted(scene.feature_ids.tolist())
    for index, number in enumerate(scene.feature_ids.tolist()):
        begin, end = scene.feature_starts[index], scene.feature_starts[index + 1]
        evens = order[: rows // 2]
        first = [row for row in evens if begin <= row < end] + [row for row in range(begin, end) if row % 2]
        there = slice(*mixed.feature_starts[where[number] : where[number] + 2].tolist())
        assert torch.equal(mixed.points[there], scene.points[first])
        assert mixed.feature_types[where[number]] == scene.feature_types[index]


def test_the_test_split_has_no_future(scene, example):
    for name in list(example.features.feature):
        if "/future/" in name:
            del example.features.feature[name]
    read = read_example(example.SerializeToString())
    assert (read.steps, read.current) == (11, 10)
    assert torch.equal(read.positions, scene.positions[:, :11])


def test_a_step_that_nobody_tells_the_time_of(scene):
    hidden = scene.valid.clone()
    hidden[:, 40] = False
    hidden[:, 88:] = False
    gone = scene._replace(valid=hidden)
    read = read_example(write_example(gone, rows=4000))
    torch.testing.assert_close(read.times, scene.times, rtol=0, atol=1e-9)
    assert torch.equal(read.valid, hidden)


def test_no_map_and_no_lights(scene, example):
    features = example.features.feature
    for name in list(features):
        if name.startswith("traffic_light_state/"):
            del features[name]
    features["roadgraph_samples/valid"].int64_list = listed(np.zeros(4000, np.int64))
    read = read_example(example.SerializeToString())
    assert read.points.shape == (0, 3)
    assert read.light_states.shape == (91, 0)
    assert differences(read_scenario(write_scenario(read)), read) == []


@pytest.mark.parametrize("values", [[0], [127, 128, 300], [-1, 2**63 - 1, -(2**63), 5], list(range(-300, 300, 7))])
def test_varints_of_every_length(values):
    data = b"".join(varint(value % 2**64) for value in values)
    assert varints(np.frombuffer(data, np.uint8)).tolist() == values


def test_what_does_not_fit(scene):
    many = scene._replace(
        **{
            name: getattr(scene, name)[:1].repeat_interleave(129, dim=0)
            for name in ("agent_ids", "agent_types", "positions", "sizes", "headings", "velocities", "valid")
        }
    )
    with pytest.raises(ValueError, match=f"{scene.scenario_id}: 129 agents, a tf.Example has room for 128"):
        write_example(many)
    with pytest.raises(ValueError, match=r"map points, a tf.Example has room for 100"):
        write_example(scene, rows=100)
    with pytest.raises(ValueError, match=r"24 lights at a step, a tf.Example has room for 16"):
        write_example(
            scene._replace(
                light_lanes=torch.arange(24),
                **{name: getattr(scene, name).repeat(1, 2, *[1] * (getattr(scene, name).ndim - 2))
                   for name in ("light_states", "light_stops", "light_valid")},
            )
        )  # fmt: skip


def test_damaged_records_are_named(scene, data, example):
    with pytest.raises(ValueError, match=r"not a tf\.Example"):
        read_example(b"\x0a\x05hello")
    with pytest.raises(ValueError, match=r"no scenario/id\): the tf.Example has no state/id"):
        read_example(example_pb2.Example().SerializeToString())
    features = example.features.feature

    def refused(words):
        with pytest.raises(ValueError, match=words) as caught:
            read_example(example.SerializeToString())
        assert scene.scenario_id in str(caught.value)

    kept = features["state/type"].float_list
    features["state/type"].float_list = listed(np.zeros(127, np.float32))
    refused("state/type has 127 values, expected 128")
    features["state/type"].float_list = kept[:-1]
    refused("state/type is damaged")
    features["state/type"].float_list = kept
    features["state/past/x"].float_list = listed(np.zeros(1279, np.float32))
    refused("state/past/x has 1279 values, expected 1280")
    del features["state/past/x"]
    refused("the tf.Example has no state/past/x")
    features["state/past/x"].float_list = listed(np.zeros(1280, np.float32))
    lights = {name: feature for name, feature in features.items() if name.startswith("traffic_light_state/future")}
    for name, feature in lights.items():
        values = (
            np.frombuffer(bytes(feature.float_list)[-4 * 1280 :], np.float32) if feature.float_list else np.ones(1280)
        )
        longer = np.concatenate((values, values))
        if feature.HasField("float_list"):
            features[name].float_list = listed(longer)
        else:
            features[name].int64_list = listed(longer.astype(np.int64))
    refused("step of a light is 170, outside 0..90")
    for name in lights:
        del features[name]
    features["state/is_sdc"].int64_list = listed(np.zeros(128, np.int64))
    refused("state/is_sdc marks 0 agents")
    features["traffic_light_state/current/valid"].int64_list = b""
    features["state/is_sdc"].int64_list = listed(np.eye(1, 128, dtype=np.int64)[0])
    refused("traffic_light_state/past/valid has 160 values for 0 slots")
    features["state/id"].float_list = listed(np.full(128, np.nan, np.float32))
    refused("state/id holds no ids")
    features["state/id"].float_list = b""
    refused("state/id holds no ids")


def test_an_example_without_a_name_is_counted(example):
    del example.features.feature["scenario/id"]
    tally = Counter()
    read_example(example.SerializeToString(), tally)
    assert tally["tf.Example records without scenario/id"] == 1


def test_a_varint_ends_within_ten_bytes():
    assert wire.varint(b"\x05\xac\x02", 1) == (300, 3)
    assert wire.varint(varint(2**64 - 1), 0) == (2**64 - 1, 10)
    # Without a bound this takes time by the square of the length.
    for data in (b"\xff" * 1_000_000, b"\x80" * 11 + b"\x01"):
        with pytest.raises(IndexError, match="ten bytes"):
            wire.varint(data, 0)
    assert not is_example(b"\x0a" + b"\xff" * 1_000_000)


@pytest.mark.parametrize(
    "write", [write_scenario, lambda scene: write_example(scene, rows=4000)], ids=["scenario", "example"]
)
def test_random_damage_is_read_or_refused(scene, write):
    """Behind the CRC anything may come: a ValueError or a scene, nothing else."""
    random, sound = np.random.default_rng(0), write(scene)
    outcomes = set()
    for trial in range(120):
        data = bytearray(sound)
        for place in random.integers(len(data) if trial % 2 else 3000, size=3):
            data[place] = random.integers(256)
        data = data[: random.integers(len(data))] if trial % 5 == 0 else data
        try:
            read = read_any(bytes(data))
        except ValueError:
            outcomes.add("refused")
        else:
            outcomes.add("read")
            assert read.positions.isfinite().all()
            assert read.valid.shape == read.headings.shape == (read.agents, read.steps)
    assert outcomes == {"refused", "read"}
