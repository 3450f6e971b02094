"""Scenario records: round trips, fast and slow parsing alike, Waymo's own messages, and scenarios with odd values."""

from collections import Counter

import numpy as np
import pytest
import torch
from waymo_cases import differences, small_scene

from datamodules import waymo_map, waymo_tracks
from datamodules.protos import scenario_pb2
from datamodules.scene import AgentType, FeatureType, LightState
from datamodules.waymo_map import KINDS
from datamodules.waymo_scenario import read_scenario, write_scenario


@pytest.fixture(scope="module")
def scene():
    return small_scene()


@pytest.fixture
def message(scene):
    return scenario_pb2.Scenario.FromString(write_scenario(scene))


def read(message, tally=None):
    return read_scenario(message.SerializeToString(), tally)


def test_round_trip(scene):
    again = read_scenario(write_scenario(scene))
    assert differences(scene, again) == []
    assert scene.valid.any()
    assert not scene.valid.all()
    assert len(scene.light_lanes)
    assert set(scene.feature_types.tolist()) == {kind.value for kind in FeatureType}


def test_coordinates_are_those_of_the_messages(scene, message):
    for agent in range(scene.agents):
        for step in scene.valid[agent].nonzero().flatten().tolist():
            state = message.tracks[agent].states[step]
            ours = scene.positions[agent, step].double() + scene.origin
            assert ours.tolist() == [state.center_x, state.center_y, state.center_z]  # on the grid, so exactly
            assert scene.headings[agent, step].item() == state.heading


def test_the_origin_is_the_car_in_whole_metres(scene):
    assert torch.equal(scene.origin, scene.origin.round())
    assert scene.positions[scene.sdc, scene.current].abs().max() <= 0.5


def test_recentring_happens_in_float64(scene, message):
    """10,000 km away float32 would round to whole metres."""
    for track in message.tracks:
        for state in track.states:
            state.center_x += 1e7
    for feature in message.map_features:
        kind = feature.WhichOneof("feature")
        points = getattr(getattr(feature, kind), KINDS[kind].points)
        for point in [points] if kind == "stop_sign" else points:
            point.x += 1e7
    for step in message.dynamic_map_states:
        for entry in step.lane_states:
            entry.stop_point.x += 1e7
    far = read(message)
    assert (far.origin - scene.origin).tolist() == [1e7, 0, 0]
    assert differences(far, scene) == ["origin"]


def reparse_slowly(monkeypatch):
    """Every message field by field."""
    monkeypatch.setattr(waymo_tracks, "_together", lambda states: None)
    monkeypatch.setattr(waymo_map, "_lights_together", lambda records: None)
    unread = {name: kind._replace(header=lambda data: (len(data), 0)) for name, kind in KINDS.items()}
    monkeypatch.setattr(waymo_map, "KINDS", unread)


def test_parsing_field_by_field_is_the_same(scene, message, monkeypatch):
    for feature in message.map_features:  # fields around the points
        if feature.WhichOneof("feature") == "lane":
            feature.lane.speed_limit_mph, feature.lane.interpolating = 25.0, True
            feature.lane.entry_lanes.extend([1, 300])
            feature.lane.left_neighbors.add(feature_id=5, self_start_index=1).boundaries.add(boundary_type=3)
        elif feature.WhichOneof("feature") == "stop_sign":
            feature.stop_sign.lane.extend([4, 400])
    data = message.SerializeToString()
    fast = read_scenario(data)
    assert differences(fast, scene) == []
    with monkeypatch.context() as patched:
        reparse_slowly(patched)
        assert differences(read_scenario(data), scene) == []


def test_the_usual_layout_needs_no_slow_path(scene, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("parsed field by field")

    monkeypatch.setattr(waymo_tracks, "_one_by_one", refuse)
    monkeypatch.setattr(waymo_map, "_lights_one_by_one", refuse)
    monkeypatch.setattr(waymo_map, "_by_field", refuse)
    assert differences(read_scenario(write_scenario(scene)), scene) == []


@pytest.mark.parametrize("seed", range(4))
def test_any_layout_of_fields(scene, message, seed, monkeypatch):
    """Fields left out, reordered and repeated: the reader of bytes agrees with that of messages."""
    random = np.random.default_rng(seed)
    for track in message.tracks:
        for state in track.states:
            for field in random.choice([f.name for f in state.DESCRIPTOR.fields], random.integers(4)):
                state.ClearField(field)
    for feature in message.map_features:
        kind = feature.WhichOneof("feature")
        part = getattr(feature, kind)
        points = getattr(part, KINDS[kind].points)
        for point in [points] if kind == "stop_sign" else points:
            if random.random() < 0.02:
                point.ClearField("xyz"[random.integers(3)])
        if random.random() < 0.3 and "type" in part.DESCRIPTOR.fields_by_name:
            part.ClearField("type")
    for step in message.dynamic_map_states:
        for entry in step.lane_states:
            if random.random() < 0.3:
                entry.ClearField(["lane", "state", "stop_point"][random.integers(3)])
    twice = message.map_features[0].lane  # a type behind the points holds, as the last of a field does
    data = message.SerializeToString()
    body = twice.SerializeToString() + scenario_pb2.Lane(type=3).SerializeToString()
    late = b"\x1a" + _varint(len(body)) + body
    feature = message.map_features[0].SerializeToString()
    moved = b"\x08\x07" + late
    data = data.replace(b"\x42" + _varint(len(feature)) + feature, b"\x42" + _varint(len(moved)) + moved, 1)
    fast = read_scenario(data)
    assert fast.feature_types[0] == FeatureType.LANE_BIKE
    reparse_slowly(monkeypatch)
    assert differences(fast, read_scenario(data)) == []


def _varint(value):
    out = []
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def test_waymos_messages_read_the_same_bytes(scene):
    theirs = pytest.importorskip("waymo_open_dataset.protos.scenario_pb2", reason="waymo_open_dataset isn't installed")
    data = write_scenario(scene)
    scenario = theirs.Scenario.FromString(data)
    assert scenario.SerializeToString(deterministic=True) == data  # no field unknown to them
    assert scenario.scenario_id == scene.scenario_id
    kinds = {feature.WhichOneof("feature_data") for feature in scenario.map_features}
    assert kinds == {"lane", "road_line", "road_edge", "stop_sign", "crosswalk", "speed_bump", "driveway"}
    state = scenario.tracks[scene.sdc].states[scene.current]
    assert state.valid
    assert state.length == scene.sizes[scene.sdc, scene.current, 0]
    places = (scene.positions[scene.sdc, scene.current].double() + scene.origin).tolist()
    assert [state.center_x, state.center_y, state.center_z] == places


# ---- odd scenarios


def test_no_map_and_no_lights(message):
    message.ClearField("map_features")
    message.ClearField("dynamic_map_states")
    scene = read(message)
    assert scene.points.shape == (0, 3)
    assert scene.feature_starts.tolist() == [0]
    assert scene.light_states.shape == (91, 0)
    assert differences(scene, read_scenario(write_scenario(scene))) == []


def test_one_agent_born_at_the_current_step(message):
    for state in message.tracks[7].states[:10]:
        state.Clear()
    track = scenario_pb2.Track.FromString(message.tracks[7].SerializeToString())
    del message.tracks[:]
    message.tracks.append(track)
    message.sdc_track_index = 0
    message.ClearField("tracks_to_predict")
    scene = read(message)
    assert scene.agents == 1
    assert scene.valid[0].nonzero().flatten()[0] == 10
    assert scene.simulated().tolist() == scene.scored().tolist() == [0]
    assert scene.positions[0, :10].abs().max() == 0


def test_sizes_vary_with_the_step(scene, message):
    message.tracks[scene.sdc].states[12].length = 9.5
    read_back = read(message)
    assert read_back.sizes[scene.sdc, 11:14, 0].tolist() == [
        *scene.sizes[scene.sdc, 11:12, 0].tolist(),
        9.5,
        scene.sizes[scene.sdc, 13, 0].item(),
    ]


def test_a_feature_of_no_kind_and_one_without_points(scene, message):
    message.map_features[1].ClearField("feature")
    message.map_features[2].lane.ClearField("polyline")
    tally = Counter()
    read_back = read(message, tally)
    assert tally == {"map features of no kind": 1, "map features without points": 1}
    assert read_back.feature_ids.tolist() == [n for i, n in enumerate(scene.feature_ids.tolist()) if i not in (1, 2)]
    one, two = scene.feature_starts[3], read_back.feature_starts[1]
    assert torch.equal(scene.points[one:], read_back.points[two:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_are_not_finite(scene, message, value):
    steps = scene.valid[0].nonzero().flatten()[[3, 7]].tolist()
    message.tracks[0].states[steps[0]].center_x = value
    message.tracks[0].states[steps[1]].center_z = value
    message.tracks[scene.sdc].states[20].velocity_x = float("nan")
    message.map_features[0].lane.polyline[1].y = value
    first = message.dynamic_map_states[5].lane_states[2]
    first.stop_point.z = value
    tally = Counter()
    read_back = read(message, tally)
    assert tally == {"states not finite": 3, "map points not finite": 1, "light entries not finite": 1}
    changed = (read_back.valid != scene.valid).nonzero().tolist()
    assert changed == [[0, steps[0]], [0, steps[1]], [scene.sdc, 20]]
    for values in read_back:
        if isinstance(values, torch.Tensor):
            assert values.isfinite().all()
    assert read_back.positions[0, steps].abs().max() == 0
    assert len(read_back.points) == len(scene.points) - 1
    assert read_back.feature_starts[1] == scene.feature_starts[1] - 1
    slot = scene.light_lanes.tolist().index(first.lane)
    assert (read_back.light_valid != scene.light_valid).nonzero().tolist() == [[5, slot]]


def test_a_car_that_is_never_valid(scene, message):
    for state in message.tracks[scene.sdc].states:
        state.valid = False
    read_back = read(message)
    assert not read_back.valid[scene.sdc].any()
    others = [agent for agent in range(scene.agents) if agent != scene.sdc]
    moved = read_back.positions[others].double() + read_back.origin
    expected = scene.positions[others].double() + scene.origin
    assert torch.equal(moved[scene.valid[others]], expected[scene.valid[others]])


def test_codes_that_nobody_knows(message):
    message.tracks[0].object_type, message.tracks[1].object_type, message.tracks[2].object_type = 9, -3, 0
    message.map_features[0].lane.type = 77
    message.dynamic_map_states[0].lane_states[0].state = 50
    scene = read(message)
    assert scene.agent_types[:3].tolist() == [AgentType.OTHER, AgentType.UNSET, AgentType.UNSET]
    assert scene.feature_types[0] == FeatureType.LANE_UNDEFINED
    lane = scene.light_lanes.tolist().index(message.dynamic_map_states[0].lane_states[0].lane)
    assert scene.light_states[0, lane] == LightState.UNKNOWN
    assert scene.light_valid[0, lane]


def test_lights_come_and_go(scene, message):
    del message.dynamic_map_states[50:]
    message.dynamic_map_states[3].ClearField("lane_states")
    repeated = message.dynamic_map_states[4].lane_states.add()
    repeated.CopyFrom(message.dynamic_map_states[4].lane_states[0])
    repeated.state = LightState.FLASHING_STOP
    read_back = read(message)
    assert not read_back.light_valid[3].any()
    assert not read_back.light_valid[50:].any()
    assert read_back.light_states[50:].max() == 0
    assert LightState.FLASHING_STOP in read_back.light_states[4]  # the last entry holds
    assert torch.equal(read_back.light_states[5:50], scene.light_states[5:50])


def test_what_a_file_may_leave_unset(scene, message):
    message.ClearField("current_time_index")
    message.ClearField("timestamps_seconds")
    message.objects_of_interest.append(123456)
    read_back = read(message)
    assert read_back.current == 10
    torch.testing.assert_close(read_back.times, scene.times, rtol=0, atol=1e-12)
    assert torch.equal(read_back.of_interest, scene.of_interest)


def test_the_first_eleven_steps_alone(scene, message):
    for track in message.tracks:
        del track.states[11:]
    del message.timestamps_seconds[11:]
    del message.dynamic_map_states[11:]
    read_back = read(message)
    assert (read_back.steps, read_back.current) == (11, 10)
    assert torch.equal(read_back.positions, scene.positions[:, :11])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "sdc_track_index", 8), "sdc_track_index is 8, outside 0..7"),
        (lambda m: setattr(m, "sdc_track_index", -1), "sdc_track_index is -1"),
        (lambda m: m.ClearField("sdc_track_index"), "sdc_track_index is not set"),
        (lambda m: setattr(m, "current_time_index", 91), "current_time_index is 91, outside 0..90"),
        (lambda m: m.tracks_to_predict.add(track_index=55), "tracks_to_predict is 55"),
        (lambda m: m.tracks[3].states.pop(), r"track \d+ has 90 states for 91 steps"),
        (lambda m: m.dynamic_map_states.add(), "92 dynamic_map_states for 91 steps"),
        (lambda m: m.ClearField("tracks"), "holds no track"),
        (lambda m: setattr(m.tracks[2], "id", m.tracks[5].id), r"2 tracks have the id \d+"),
        (lambda m: m.timestamps_seconds.__setitem__(3, float("nan")), "the time of step 3 is not finite"),
        (
            lambda m: [m.dynamic_map_states[0].lane_states.add(lane=lane) for lane in range(50_000)],
            r"500\d\d lights over 91 steps",
        ),
    ],
)
def test_an_inconsistent_scenario_is_named(scene, message, change, words):
    change(message)
    with pytest.raises(ValueError, match=words) as caught:
        read(message)
    assert scene.scenario_id in str(caught.value)


def test_bytes_that_are_no_scenario(scene):
    for data in (b"", b"hello", b"\xff" * 50, b"\x0a\x05hello"):
        with pytest.raises(ValueError, match="not a Scenario"):
            read_scenario(data)
    data = write_scenario(scene)
    with pytest.raises(ValueError, match="not a Scenario"):
        read_scenario(data[: len(data) // 2])


def test_a_damaged_state_names_the_scenario(scene, message):
    data = message.SerializeToString()
    state = message.tracks[scene.sdc].states[20].SerializeToString()
    broken = b"\xfc" * len(state)  # no tag
    with pytest.raises(ValueError, match=rf"scenario {scene.scenario_id}: a track, map feature or light is damaged"):
        read_scenario(data.replace(state, broken, 1))
