"""Recordings: refused when altered, broken or hostile; what the real ones hold; windows of them."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import subprocess

import numpy as np
import pytest
import torch

from datamodules import embedded_scenes
from datamodules.embedded_scenes import NOTICE, RECORDINGS, load_embedded, read_recording, scene_of_record
from datamodules.embedded_source import SourceError, cache_folder
from datamodules.restricted_pickle import NUMPY_GLOBALS, read_pickle
from datamodules.scene import FeatureType
from datamodules.scene_sources import EmbeddedWindows
from datamodules.synthetic_scenes import synthetic_scene
from datamodules.windows import MostTravelled, most_travelled, window, without_lights, wrap_headings


@pytest.fixture(scope="session")
def recorded():
    try:
        return load_embedded()
    except SourceError as error:
        pytest.skip(f"the embedded scenes cannot be fetched: {error}")


class Hostile:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("call", [os.system, subprocess.check_output, eval, pickle.loads, np.load, getattr])
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, call):
    proof = tmp_path / "proof"
    content = pickle.dumps({"id": "x", "tracks": [Hostile(call, f"touch {proof}")]})
    path = tmp_path / "hostile.pkl"
    path.write_bytes(content)
    with pytest.raises(
        SourceError, match=rf"hostile\.pkl: pickle names the global \S*{call.__name__}, which is refused"
    ):
        read_recording(path, hashlib.md5(content).hexdigest())
    assert not proof.exists()


def test_arrays_pass_and_everything_else_numpy_has_does_not():
    array = np.arange(6.0).reshape(2, 3)
    for protocol in (3, 4):
        np.testing.assert_array_equal(read_pickle(pickle.dumps(array, protocol), NUMPY_GLOBALS, "a.pkl"), array)
    with pytest.raises(SourceError, match="refused"):
        read_pickle(pickle.dumps(np.random.default_rng(0)), NUMPY_GLOBALS, "a.pkl")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_pickle_names_its_file(tmp_path, share):
    content = pickle.dumps(record(), 3)  # protocol 2 writes bytes by a global of its own
    cut = content[: int(share * len(content))]
    with pytest.raises(SourceError, match=r"short\.pkl: not a readable pickle"):
        read_pickle(cut, embedded_scenes._GLOBALS, tmp_path / "short.pkl")


def test_wrong_md5_is_refused_before_unpickling(tmp_path):
    path = tmp_path / "0.pkl"
    path.write_bytes(pickle.dumps(Hostile(os.system, "false")))
    with pytest.raises(SourceError, match=r"0\.pkl: md5 is \w+, expected 00.*delete"):
        read_recording(path, "00")
    with pytest.raises(SourceError, match=r"1\.pkl: cannot be read"):
        read_recording(tmp_path / "1.pkl", "00")


def record(steps=12):
    state = np.zeros((steps, 10))
    state[:, 0], state[:, 1], state[:, 3:6] = 6000.0 + np.arange(steps) / 10, -3000.0, (4.0, 2.0, 1.5)
    state[:, 6], state[:, 7], state[:, 9] = 7.0, 1.0, 1.0
    line = np.stack((np.arange(5.0) + 6000, np.full(5, -3000.0), np.zeros(5)), 1)
    return {
        "id": "made", "ts": [step / 10 for step in range(steps)], "sdc_index": 7,
        "tracks": {3: {"type": 2, "state": state.copy()}, 7: {"type": 1, "state": state}},
        "dynamic_map_states": [{21: {"state": 4, "stop_point": [6001.0, -3000.0, 0.0]}}],
        "map": {
            21: {"type": "center_lane", "polyline": line},
            22: {"type": {"odd": None}, "polygon": line},
            23: {"type": "stop_sign", "pos": [6002.0, -3000.0, 0.0], "lanes": [21]},
            24: {"type": None, "sign": "cross_walk", "polygon": line},
        },
    }  # fmt: skip


def test_a_record_becomes_a_scene():
    made = record()
    made["tracks"][3]["state"][:10, 9] = 0  # born at step 10
    scene = scene_of_record(made, "made.pkl")
    assert scene.sdc == 1
    assert scene.agent_types.tolist() == [2, 1]
    assert scene.origin.tolist() == [6000.0, -3000.0, 0.0]
    assert scene.feature_types.tolist() == [FeatureType.LANE_SURFACE, FeatureType.STOP_SIGN, FeatureType.CROSSWALK]
    assert scene.feature_starts.tolist() == [0, 5, 6, 11]
    assert not scene.positions[0, :10].any()
    assert not scene.headings[0, :10].any()
    assert scene.headings[0, 10] == 7.0
    assert scene.light_lanes.tolist() == [21]
    assert scene.light_states.shape == (12, 1)
    torch.testing.assert_close(scene.light_stops[5], torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(scene.positions[1, :, 0], torch.arange(12) / 10)


def spoilt(what):
    made = record()
    if what == "nan":
        made["tracks"][3]["state"][4, 7] = math.nan
    elif what == "shape":
        made["tracks"][3]["state"] = made["tracks"][3]["state"][:5]
    elif what == "unseen":
        made["tracks"][7]["state"][:, 9] = 0
    elif what == "light":
        made["dynamic_map_states"][0][21]["state"] = 77
    elif what == "map":
        made["map"][21]["polyline"] = np.full((2, 3), np.inf)
    elif what == "empty":
        made["tracks"] = {}
    else:
        del made[what]
    return made


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "bad.pkl: track 3 has a state that is not finite at step 4"),
        ("shape", r"bad.pkl: track 3 has states \(5, 10\)"),
        ("unseen", "bad.pkl: the self-driving car, track 7, is never valid"),
        ("light", r"bad.pkl: light states \[77\]"),
        ("map", "bad.pkl: map feature 21"),
        ("empty", "bad.pkl: no tracks"),
        ("ts", "bad.pkl: recording lacks the key 'ts'"),
    ],
)
def test_a_spoilt_record_is_named(what, message):
    with pytest.raises(SourceError, match=message):
        scene_of_record(spoilt(what), "bad.pkl")


@pytest.mark.parametrize("other", [[1, 2], None, 7, {"ts": 3, "tracks": [4]}])
def test_another_object_is_not_a_recording(other):
    with pytest.raises(SourceError, match=r"bad\.pkl: not a recording"):
        scene_of_record(other, "bad.pkl")


FACTS = {  # steps, agents, most valid at once, share of headings outside [−π, π), points, lights, usable in windows
    "2831b6fde0420b0d": (199, 19, 15, 0.33, 31_718, 0, 110),
    "1446dc44bd6fd420": (200, 163, 78, 0.32, 13_623, 5, 728),
    "8d3d061e518531d0": (197, 34, 18, 0.17, 17_553, 0, 147),
}


def test_facts_of_the_recordings(recorded):
    assert [scene.scenario_id for scene in recorded] == [recording.scenario_id for recording in RECORDINGS]
    for scene in recorded:
        outside = ((scene.headings < -math.pi) | (scene.headings >= math.pi))[scene.valid].double().mean()
        windows = [window(scene, start) for start in range(0, scene.steps - 90, 10)]
        usable = sum(int((cut.valid[:, 10] & (cut.valid[:, 11:].sum(1) >= 5)).sum()) for cut in windows)
        most = int(scene.valid.sum(0).max())
        facts = (scene.steps, scene.agents, most, round(float(outside), 2), len(scene.points), len(scene.light_lanes))
        assert (*facts, usable) == FACTS[scene.scenario_id]
        assert len(windows) == 11
        assert scene.valid[scene.sdc].all()
        assert scene.positions.abs().max() < 1000
        assert scene.origin.abs().max() > 1000


def test_loading_again_is_free(recorded):
    assert all(first is second for first, second in zip(recorded, load_embedded(), strict=True))


def test_terms_are_printed_once_a_cache(recorded, tmp_path, capsys):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for path in (cache_folder() / "wheels").glob(RECORDINGS[0].wheel.pattern):
        (wheels / path.name).symlink_to(path)
    load_embedded(cache=tmp_path)
    assert capsys.readouterr().err.count(NOTICE) == 1
    assert "https://waymo.com/open/terms" in NOTICE
    embedded_scenes._load.cache_clear()  # as in another process
    load_embedded(cache=tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("place", "start", "count", "ids"),
    [
        (1, 0, 8, [655, 658, 663, 665, 669, 677, 683, 696, 913]),
        (2, 20, 6, [0, 4, 9, 39]),
        (0, 0, 8, [1515, 1516, 1519, 1520, 1522, 1525, 1538]),
    ],
)
def test_scored_agents_of_windows(recorded, place, start, count, ids):
    cut = window(recorded[place], start, to_predict=MostTravelled(count))
    assert cut.agent_ids[cut.scored()].sort().values.tolist() == ids


def test_splits_share_no_step(recorded):
    seen = {}
    for split in ("train", "val", "test"):
        source = EmbeddedWindows(split)
        assert len(source) == {"train": 25, "val": 12, "test": 109}[split]
        seen[split] = set()
        for cut in source:
            name, start = cut.scenario_id.split("@")
            seen[split] |= {(name, step) for step in range(int(start), int(start) + cut.steps)}
            assert len(cut.light_lanes) == 0 or start == "0"
    assert not seen["train"] & seen["val"]
    assert not (seen["train"] | seen["val"]) & seen["test"]
    assert not {name for name, _ in seen["test"]} & {name for name, _ in seen["train"] | seen["val"]}


def test_a_window_keeps_what_its_steps_hold():
    scene = synthetic_scene(2, agents=12, later=6)
    cut = window(scene, 20, steps=30, current=10)
    assert cut.scenario_id == "synthetic-2@20"
    assert cut.steps == 30
    assert cut.times[0] == 0
    assert cut.agent_ids[cut.sdc] == scene.agent_ids[scene.sdc]
    assert cut.valid.any(1).all()
    chosen = torch.isin(scene.agent_ids, cut.agent_ids)
    torch.testing.assert_close(cut.positions, scene.positions[chosen, 20:50])
    torch.testing.assert_close(cut.light_states, scene.light_states[20:50])
    kept = torch.isin(scene.agent_ids[scene.to_predict], cut.agent_ids)
    assert cut.agent_ids[cut.to_predict].tolist() == scene.agent_ids[scene.to_predict][kept].tolist()
    for start, steps, current in ((-1, 30, 10), (80, 30, 10), (0, 30, 30)):
        with pytest.raises(ValueError, match="synthetic-2: steps"):
            window(scene, start, steps, current)


def test_of_equal_distances_the_smaller_id_comes_first():
    scene = synthetic_scene(0, agents=6)
    standing = scene.positions[:, :1].expand_as(scene.positions).clone()
    scene = scene._replace(
        positions=standing, valid=torch.ones_like(scene.valid), agent_ids=torch.tensor([9, 4, 7, 1, 5, 0])
    )
    assert scene.agent_ids[most_travelled(scene, 3)].tolist() == [1, 4, 5]


def test_wrapped_headings_are_the_same_directions():
    scene = synthetic_scene(1, agents=16, turns=3)
    extremes = torch.tensor([math.pi, -math.pi, 3 * math.pi, math.nextafter(math.pi, 4)])
    scene.headings[0, :4] = extremes
    wrapped = wrap_headings(scene).headings
    assert wrapped.double().min() >= -math.pi
    assert wrapped.double().max() < math.pi
    assert scene.headings.abs().max() > math.pi
    # 20 radians in float32 are 2e-6 apart.
    torch.testing.assert_close(wrapped.cos(), scene.headings.cos(), atol=4e-6, rtol=0)
    torch.testing.assert_close(wrapped.sin(), scene.headings.sin(), atol=4e-6, rtol=0)
    assert without_lights(scene).light_stops.shape == (91, 0, 3)
