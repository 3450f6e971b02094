"""What reading traffic scenes costs: `python -m bench.data --json PATH`. One thread, files in the page cache.

The scenario is made up, as large as the one that Waymo gives as a sample (83 tracks, 91 steps, 301 map features, 953 kB), with
the fields that real ones carry besides those that are read. Every provider of a case starts from the same bytes:

- framing: a TFRecord file of 64 such records, both CRCs of each checked; `copy` copies the bytes and checks nothing.
- scenario: `ours` makes a `Scene`; `naive` parses the same bytes into typed messages and reads the same values field by
  field into arrays, without recentring them; `parse` is the part of that which the protobuf library does by itself.
- example: a tf.Example of the same scene.
- shard: the scene out of a shard that `tools.waymo_to_shards` would write, its CRC checked.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bench.harness import Row, interleave, one_thread, parser, report, rows_of
from datamodules.protos import scenario_pb2
from datamodules.scene_shards import SceneShards, ShardWriter
from datamodules.tfrecord import TFRecordFile, write_tfrecord
from datamodules.waymo_example import read_example, write_example
from datamodules.waymo_map import KINDS
from datamodules.waymo_scenario import read_scenario

TRACKS, STEPS, LIGHTS = 83, 91, 8
FEATURES = {"lane": 130, "road_line": 80, "road_edge": 55, "crosswalk": 8, "driveway": 20, "stop_sign": 8}
POINTS = {"lane": 50, "road_line": 60, "road_edge": 76, "crosswalk": 4, "driveway": 4}
RECORDS = 64


def scenario(seed: int = 0) -> bytes:
    """A serialised Scenario of the size above."""
    random = np.random.default_rng(seed)
    center = np.array([8392.4, -2311.9, 17.2])
    message = scenario_pb2.Scenario(
        scenario_id=f"{seed:016x}",
        timestamps_seconds=np.arange(STEPS) / 10,
        current_time_index=10,
        sdc_track_index=TRACKS - 1,
        objects_of_interest=[100, 103],
    )
    for index in range(8):
        message.tracks_to_predict.add(track_index=index, difficulty=index % 3)
    for index in range(TRACKS):
        track = message.tracks.add(id=100 + 17 * index, object_type=1 + index % 3)
        place, velocity = center + random.normal(size=3) * (40, 40, 0.1), random.normal(size=2) * 5
        first = 0 if index % 5 else random.integers(1, 40)  # a fifth appears later; states before are there, and zero
        for step in range(STEPS):
            seen = step >= first
            x, y, z = (place + 0.1 * step * np.append(velocity, 0)) * seen
            track.states.add(
                center_x=x,
                center_y=y,
                center_z=z,
                length=4.7 * seen,
                width=2.0 * seen,
                height=1.6 * seen,
                heading=0.3 * seen,
                velocity_x=velocity[0] * seen,
                velocity_y=velocity[1] * seen,
                valid=seen,
            )
    for number, kind in enumerate(kind for kind, count in FEATURES.items() for _ in range(count)):
        feature = message.map_features.add(id=number)
        part = getattr(feature, kind)
        part.SetInParent()
        start = center + random.normal(size=3) * (60, 60, 0.1)
        if kind == "stop_sign":
            part.lane.append(number % FEATURES["lane"])
            part.position.x, part.position.y, part.position.z = start
            continue
        steps = random.normal(0.35, 0.05, (POINTS[kind], 3)) * (1, 1, 0.01)
        points = getattr(part, KINDS[kind].points)
        for x, y, z in start + np.cumsum(steps, axis=0):
            points.add(x=x, y=y, z=z)
        if kind == "lane":
            _dress(part, number)
        elif kind in ("road_line", "road_edge"):
            part.type = 1 + number % 2
    for _ in range(STEPS):
        entries = message.dynamic_map_states.add().lane_states
        for lane in range(LIGHTS):
            x, y, z = center + lane
            entries.add(lane=lane, state=4 + lane % 3, stop_point=scenario_pb2.Point(x=x, y=y, z=z))
    return message.SerializeToString(deterministic=True)


def _dress(lane: scenario_pb2.Lane, number: int) -> None:
    """The fields of a lane that a `Scene` doesn't hold."""
    lane.speed_limit_mph, lane.type, lane.interpolating = 25.0, 2, False
    lane.entry_lanes.append(number + 1)
    lane.exit_lanes.extend((number + 2, number + 3))
    for side in (lane.left_boundaries, lane.right_boundaries):
        for piece in range(2):
            segment = {"lane_start_index": 20 * piece, "lane_end_index": 20 * piece + 19}
            side.add(**segment, boundary_feature_id=number + 130, boundary_type=2)
    span = {"self_start_index": 0, "self_end_index": 40, "neighbor_start_index": 1, "neighbor_end_index": 41}
    lane.left_neighbors.add(feature_id=number + 4, **span)


def naive(data: bytes) -> tuple[np.ndarray, ...]:
    """What anyone writes first: typed messages, read field by field."""
    message = scenario_pb2.Scenario.FromString(data)
    states = [
        (
            *(state.center_x, state.center_y, state.center_z, state.length, state.width, state.height, state.heading),
            *(state.velocity_x, state.velocity_y, state.valid),
        )
        for track in message.tracks
        for state in track.states
    ]
    lights = [
        (entry.lane, entry.state, entry.stop_point.x, entry.stop_point.y, entry.stop_point.z)
        for step in message.dynamic_map_states
        for entry in step.lane_states
    ]
    points = [(point.x, point.y, point.z) for feature in message.map_features for point in _points(feature)]
    return np.array(states), np.array(lights), np.array(points)


def _points(feature: scenario_pb2.MapFeature) -> Iterator[scenario_pb2.Point]:
    kind = feature.WhichOneof("feature")
    if kind == "stop_sign":
        yield feature.stop_sign.position
    elif kind is not None:
        yield from getattr(getattr(feature, kind), KINDS[kind].points)


def _drain(records: Iterator[object]) -> None:
    for _ in records:
        pass


def measure(folder: Path, rounds: int) -> list[Row]:
    data = scenario()
    records = folder / "bench.tfrecord"
    write_tfrecord(records, [data] * RECORDS)
    content = np.frombuffer(records.read_bytes(), np.uint8)
    room = np.empty_like(content)
    file = TFRecordFile(records)
    seconds = interleave(
        {
            "ours": lambda: _drain(file.views()),
            "ours_bytes": lambda: _drain(iter(file)),
            "ours_opened": lambda: _drain(TFRecordFile(records).views()),
            "copy": lambda: np.copyto(room, content),
        },
        rounds=rounds,
    )
    rows = [
        Row("data", "framing", name, "speed", len(content) / statistics.median(times) / 1e9, "GB/s")
        for name, times in seconds.items()
    ]

    scene = read_scenario(data)
    example = write_example(scene)
    with ShardWriter(folder / "bench.scenes") as writer:
        for _ in range(RECORDS):
            writer.add(scene)
    shards = SceneShards(folder)
    numbers = iter(range(1 << 62))
    cases: dict[str, dict[str, Callable[[], object]]] = {
        f"scenario {len(data) / 1e3:.0f}kB": {
            "ours": lambda: read_scenario(data),
            "naive": lambda: naive(data),
            "parse": lambda: scenario_pb2.Scenario.FromString(data),
        },
        f"example {len(example) / 1e3:.0f}kB": {"ours": lambda: read_example(example)},
        f"shard {(folder / 'bench.scenes').stat().st_size / RECORDS / 1e3:.0f}kB": {
            "ours": lambda: shards[next(numbers) % RECORDS]
        },
    }
    for case, providers in cases.items():
        rows += rows_of("data", case, interleave(providers, rounds=rounds))
    return rows


def main() -> None:
    arguments = parser("Reading traffic scenes.")
    arguments.add_argument("--rounds", type=int, default=21)
    options = arguments.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        report(measure(Path(folder), options.rounds), options.json)


if __name__ == "__main__":
    main()
