"""Scenario records of the Waymo Open Motion Dataset as `Scene`, and back, with neither TensorFlow nor Waymo's package.

A scenario holds some 25,000 tiny messages (states, map points). Those are left as bytes and viewed by numpy at once
(`waymo_tracks.py`, `waymo_map.py`); where a writer laid messages out in another way they are parsed field by field, with
equal results.

`recorded.py` tells what becomes of a scenario with odd values. Besides: a current_time_index that isn't set is 10, or the last
step of a shorter scenario; timestamps that aren't there are 0.1 s apart; objects of interest that name no track are left
out; a map feature of no known kind is left out and counted.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from datamodules.protos import scenario_pb2, scenario_raw_pb2
from datamodules.recorded import CURRENT, STEP, Recorded, indices_of, to_scene
from datamodules.scene import FeatureType, Scene
from datamodules.waymo_extra import DecodeError
from datamodules.waymo_map import KINDS, read_features, read_lights
from datamodules.waymo_tracks import read_tracks


def read_scenario(data: bytes, tally: Counter[str] | None = None) -> Scene:
    """The scene of a serialised Scenario.

    Args:
        data: the record.
        tally: counts what had to be left out, by name.

    Raises:
        ValueError: not a Scenario, or an inconsistent one; names the scenario and the object.
    """
    raw = scenario_raw_pb2.RawScenario()
    try:
        raw.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(f"not a Scenario: {error}") from error
    try:
        name = raw.scenario_id.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not a Scenario: its scenario_id is {raw.scenario_id[:40]!r}") from error
    if not raw.tracks:
        raise ValueError(f"scenario {name!r} holds no track; the record is damaged or not a Scenario")
    if not raw.HasField("sdc_track_index"):
        raise ValueError(f"scenario {name}: sdc_track_index is not set; the record is damaged")
    tally = Counter() if tally is None else tally
    try:
        return to_scene(_recorded(name, raw, tally), tally)
    except DecodeError as error:
        raise ValueError(f"scenario {name}: a track, map feature or light is damaged ({error})") from error


def _recorded(name: str, raw: scenario_raw_pb2.RawScenario, tally: Counter[str]) -> Recorded:
    times = np.array(raw.timestamps_seconds, np.float64)
    tracks = read_tracks(name, raw.tracks, len(times) or None)
    steps = tracks.valid.shape[1]
    if not len(times):
        times = STEP * np.arange(steps)
    lights = raw.dynamic_map_states
    if len(lights) > steps:
        raise ValueError(f"scenario {name}: {len(lights)} dynamic_map_states for {steps} steps; the record is damaged")
    wanted = np.array([(entry.track_index, entry.difficulty) for entry in raw.tracks_to_predict], np.int64).reshape(
        -1, 2
    )
    return Recorded(
        name,
        times,
        raw.current_time_index if raw.HasField("current_time_index") else min(CURRENT, steps - 1),
        *tracks,
        raw.sdc_track_index,
        wanted[:, 0],
        wanted[:, 1],
        indices_of(tracks.ids, raw.objects_of_interest),
        *read_features(raw.map_features, tally),
        *read_lights(lights),
    )


def write_scenario(scene: Scene) -> bytes:
    """The scene as a serialised Scenario, in the coordinates of its file (float64 origin + float32).

    A `Scene` knows nothing of speed limits, neighbours and boundaries of lanes, nor of the lanes of a stop sign: those stay
    unset. Read again it is the same scene where its origin is the one that `recorded.py` would choose.

    Raises:
        ValueError: a stop sign with other than one point.
    """
    message = scenario_pb2.Scenario(
        scenario_id=scene.scenario_id,
        timestamps_seconds=scene.times.tolist(),
        current_time_index=scene.current,
        sdc_track_index=scene.sdc,
        objects_of_interest=scene.agent_ids[scene.of_interest].tolist(),
    )
    for index, difficulty in zip(scene.to_predict.tolist(), scene.difficulties.tolist(), strict=True):
        message.tracks_to_predict.add(track_index=index, difficulty=difficulty)
    _write_tracks(message, scene)
    _write_map(message, scene)
    _write_lights(message, scene)
    return message.SerializeToString(deterministic=True)


def _write_tracks(message: scenario_pb2.Scenario, scene: Scene) -> None:
    places = (scene.positions.double() + scene.origin).tolist()
    sizes, headings, velocities = scene.sizes.tolist(), scene.headings.tolist(), scene.velocities.tolist()
    valid = scene.valid.tolist()
    for agent, (number, kind) in enumerate(zip(scene.agent_ids.tolist(), scene.agent_types.tolist(), strict=True)):
        track = message.tracks.add(id=number, object_type=kind)
        for step in range(scene.steps):
            if not valid[agent][step]:
                track.states.add(valid=False)
                continue
            (x, y, z), (length, width, height) = places[agent][step], sizes[agent][step]
            track.states.add(
                center_x=x,
                center_y=y,
                center_z=z,
                length=length,
                width=width,
                height=height,
                heading=headings[agent][step],
                velocity_x=velocities[agent][step][0],
                velocity_y=velocities[agent][step][1],
                valid=True,
            )


def _write_map(message: scenario_pb2.Scenario, scene: Scene) -> None:
    fields = {kind: (field, code) for field, value in KINDS.items() for code, kind in enumerate(value.types)}
    places = (scene.points.double() + scene.origin).tolist()
    starts = scene.feature_starts.tolist()
    for index, (number, code) in enumerate(zip(scene.feature_ids.tolist(), scene.feature_types.tolist(), strict=True)):
        points = [scenario_pb2.Point(x=x, y=y, z=z) for x, y, z in places[starts[index] : starts[index + 1]]]
        feature = message.map_features.add(id=number)
        if code == FeatureType.STOP_SIGN:
            if len(points) != 1:
                raise ValueError(f"scenario {scene.scenario_id}: stop sign {number} has {len(points)} points, not one")
            feature.stop_sign.position.CopyFrom(points[0])
            continue
        field, kind = fields[FeatureType(code)]
        part = getattr(feature, field)
        part.SetInParent()
        getattr(part, KINDS[field].points).extend(points)
        if len(KINDS[field].types) > 1:
            part.type = kind


def _write_lights(message: scenario_pb2.Scenario, scene: Scene) -> None:
    stops = (scene.light_stops.double() + scene.origin).tolist()
    lanes, states, valid = scene.light_lanes.tolist(), scene.light_states.tolist(), scene.light_valid.tolist()
    for step in range(scene.steps):
        entries = message.dynamic_map_states.add().lane_states
        for slot, lane in enumerate(lanes):
            if valid[step][slot]:
                x, y, z = stops[step][slot]
                entries.add(lane=lane, state=states[step][slot], stop_point=scenario_pb2.Point(x=x, y=y, z=z))
