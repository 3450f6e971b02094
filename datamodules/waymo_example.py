"""tf.Example records of the Waymo Open Motion Dataset as `Scene`, and back; `read_any` takes those and Scenario records.

A tf.Example is a dictionary of flat lists: agents in slots (128), map samples in rows (20,000 or 30,000, read from the data),
lights in slots (16) for each step, −1 wherever there is nothing. Rows of one feature id and type are one feature, in the order
of their first row. Other than a Scenario it can't hold:

- coordinates finer than float32 in the frame of the file (0.5 mm at 6 km), times finer than a microsecond;
- the time of a step at which no agent is valid (taken as 0.1 s from the nearest step that has one);
- more agents, map points or lights at one step than slots; ids of agents above 2²⁴ (they are float32);
- map features without points;
- the order of agents to predict and of interest, which `Scene` sorts anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from datamodules.protos import example_pb2
from datamodules.recorded import STEP, Recorded, to_scene
from datamodules.scene import FeatureType, Scene
from datamodules.waymo_extra import DecodeError
from datamodules.waymo_scenario import read_scenario
from datamodules.wire import varint, varints

AGENT_SLOTS, LIGHT_SLOTS, MAP_ROWS = 128, 16, 30_000
_PARTS = ("past", "current", "future")
_MICROSECONDS = 1e6


def read_any(data: bytes, tally: Counter[str] | None = None) -> Scene:
    """The scene of a record of either kind, told apart by the bytes: a tf.Example is a single field that fills the record.

    Raises:
        ValueError: as `read_scenario` and `read_example`.
    """
    return read_example(data, tally) if is_example(data) else read_scenario(data, tally)


def is_example(data: bytes) -> bool:
    """Whether a record is one length-delimited field 1 from beginning to end."""
    if data[:1] != b"\x0a":
        return False
    try:
        length, begin = varint(data, 1)
    except IndexError:
        return False
    return begin + length == len(data)


class _Lists:
    """The lists of one tf.Example by name; errors name the scenario and the list."""

    def __init__(self, data: bytes) -> None:
        try:
            example = example_pb2.Example.FromString(data)
        except DecodeError as error:
            raise ValueError(f"not a tf.Example: {error}") from error
        self._features: Mapping[str, example_pb2.Feature] = example.features.feature
        self._counts: dict[str, int] = {}
        self.scenario = "(no scenario/id)"
        if "scenario/id" in self._features:
            values = self._features["scenario/id"].bytes_list.value
            self.scenario = values[0].decode(errors="replace") if values else self.scenario

    def __contains__(self, name: str) -> bool:
        return name in self._features

    def __call__(self, name: str, count: int | None = None) -> np.ndarray:
        """(n,) float32 or int64 values of a list; `count` is the n that it must have."""
        if name not in self._features:
            raise ValueError(f"scenario {self.scenario}: the tf.Example has no {name}; is it of the motion dataset?")
        feature = self._features[name]
        try:
            values = _floats(feature.float_list) if feature.HasField("float_list") else _integers(feature.int64_list)
        except (ValueError, IndexError) as error:
            raise ValueError(f"scenario {self.scenario}: {name} is damaged ({error})") from error
        if count is not None and len(values) != count:
            raise ValueError(f"scenario {self.scenario}: {name} has {len(values)} values, expected {count}")
        return values

    def steps(self, group: str, name: str, slots: int, slots_last: bool) -> np.ndarray:
        """(slots, t) values of a list that comes in the parts in which `valid` does, as long as that."""
        parts = []
        for part in _PARTS:
            valid, key = f"{group}/{part}/valid", f"{group}/{part}/{name}"
            if valid not in self:
                continue  # no such steps
            if valid not in self._counts:
                self._counts[valid] = len(self(valid))
            count = self._counts[valid]
            if not slots or count % slots:
                raise ValueError(f"scenario {self.scenario}: {valid} has {count} values for {slots} slots")
            values = self(key, count)
            parts.append(values.reshape(-1, slots).T if slots_last else values.reshape(slots, -1))
        if not parts:
            raise ValueError(f"scenario {self.scenario}: the tf.Example has no {group}/current/valid")
        return np.concatenate(parts, axis=1)


def _packed(data: bytes) -> np.ndarray:
    """Bytes of a packed list, field 1 of the message around it."""
    if not data:
        return np.zeros(0, np.uint8)
    length, begin = varint(data, 1)
    if data[0] != 0x0A or begin + length != len(data):
        raise ValueError("it isn't packed as one list")
    return np.frombuffer(data, np.uint8, offset=begin)


def _floats(data: bytes) -> np.ndarray:
    if data[:1] == b"\x0d":  # one tag a number
        rows = np.frombuffer(data, np.uint8).reshape(-1, 5)
        if (rows[:, 0] != 0x0D).any():
            raise ValueError("it isn't a list of floats")
        return np.ascontiguousarray(rows[:, 1:]).view("<f4")[:, 0]
    return _packed(data).view("<f4")


def _integers(data: bytes) -> np.ndarray:
    if data[:1] == b"\x08":
        numbers = varints(np.frombuffer(data, np.uint8))  # tag, value, tag, value, …
        if len(numbers) % 2 or (numbers[::2] != 0x08).any():
            raise ValueError("it isn't a list of integers")
        return numbers[1::2]
    return varints(_packed(data))


def read_example(data: bytes, tally: Counter[str] | None = None) -> Scene:
    """The scene of a serialised tf.Example.

    Args:
        data: the record.
        tally: counts what had to be left out, by name.

    Raises:
        ValueError: not a tf.Example of the motion dataset, or a damaged one; names the scenario and the list.
    """
    lists = _Lists(data)
    tally = Counter() if tally is None else tally
    if "scenario/id" not in lists:
        tally["tf.Example records without scenario/id"] += 1
    ids = lists("state/id")
    slots = len(ids)
    if not slots or not np.isfinite(ids).all():
        raise ValueError(f"scenario {lists.scenario}: state/id holds no ids of agents")
    ids = ids.astype(np.int64)

    def over_steps(names: Iterable[str]) -> np.ndarray:
        return np.stack([lists.steps("state", name, slots, False) for name in names], axis=-1)

    valid = lists.steps("state", "valid", slots, False) > 0
    used = (ids >= 0) | valid.any(axis=1)
    current = len(lists("state/past/valid")) // slots if "state/past/valid" in lists else 0
    cars = np.flatnonzero(lists("state/is_sdc", slots)[used] > 0)
    if len(cars) != 1:
        raise ValueError(f"scenario {lists.scenario}: state/is_sdc marks {len(cars)} agents, expected one")
    wanted = np.flatnonzero(lists("state/tracks_to_predict", slots)[used] > 0)
    difficulties = np.zeros(slots, np.int64)
    if "state/difficulty_level" in lists:
        difficulties = lists("state/difficulty_level", slots).astype(np.int64)
    interest = np.zeros(slots, np.int64)
    if "state/objects_of_interest" in lists:
        interest = lists("state/objects_of_interest", slots)
    recorded = Recorded(
        lists.scenario,
        _times(lists.steps("state", "timestamp_micros", slots, False), valid, current),
        current,
        ids[used],
        lists("state/type", slots)[used].astype(np.int64),
        over_steps("xyz")[used].astype(np.float64),
        over_steps(("length", "width", "height"))[used],
        over_steps(["bbox_yaw"])[used][..., 0],
        over_steps(("velocity_x", "velocity_y"))[used],
        valid[used],
        int(cars[0]),
        wanted,
        np.maximum(difficulties[used][wanted], 0),
        np.flatnonzero(interest[used] > 0),
        *_map(lists),
        *_lights(lists),
    )
    return to_scene(recorded, tally)


def _times(micros: np.ndarray, valid: np.ndarray, current: int) -> np.ndarray:
    """(t,) float64 seconds of steps at which some agent is valid, the others 0.1 s from the nearest of those."""
    told = valid & (micros >= 0)
    known = np.flatnonzero(told.any(axis=0))
    steps = np.arange(valid.shape[1])
    if not known.size:
        return STEP * steps
    seconds = micros[told.argmax(axis=0), steps] / _MICROSECONDS
    nearest = known[np.abs(steps[:, None] - known).argmin(axis=1)]
    return seconds[nearest] + STEP * (steps - nearest)


def _map(lists: _Lists) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`Recorded`'s fields of the map."""
    valid = lists("roadgraph_samples/valid") > 0
    ids = lists("roadgraph_samples/id", len(valid))[valid].astype(np.int64)
    types = lists("roadgraph_samples/type", len(valid))[valid].astype(np.int64)
    points = lists("roadgraph_samples/xyz", 3 * len(valid)).reshape(-1, 3)[valid].astype(np.float64)
    types[~np.isin(types, [kind.value for kind in FeatureType])] = FeatureType.LANE_UNDEFINED
    fresh = np.ones(len(ids), bool)  # rows that begin a run of one feature
    fresh[1:] = (ids[1:] != ids[:-1]) | (types[1:] != types[:-1])
    runs = np.stack((ids[fresh], types[fresh]), axis=1)
    _, first, run = np.unique(runs, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    if len(first) < len(runs):  # a feature in several runs: its rows are brought together
        rank = np.empty(len(first), np.int64)
        rank[order] = np.arange(len(first))
        owner = rank[run.reshape(-1)][np.cumsum(fresh) - 1]
        points, sizes = points[np.argsort(owner, kind="stable")], np.bincount(owner)
    else:
        sizes = np.diff(np.append(fresh.nonzero()[0], len(ids)))
    chosen = runs[first[order]]
    return np.ascontiguousarray(chosen[:, 0]), np.ascontiguousarray(chosen[:, 1]), sizes, points


def _lights(lists: _Lists) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`Recorded`'s fields of the lights."""
    group = "traffic_light_state"
    current = f"{group}/current/valid"
    if current not in lists:
        return (np.zeros(0, np.int64),) * 3 + (np.zeros((0, 3)),)
    slots = len(lists(current))
    entry = lists.steps(group, "valid", slots, True).T > 0  # (t, slots)
    lanes, codes, x, y, z = (lists.steps(group, name, slots, True).T[entry] for name in ("id", "state", "x", "y", "z"))
    stops = np.stack((x, y, z), axis=-1).astype(np.float64)
    return entry.nonzero()[0], lanes.astype(np.int64), codes.astype(np.int64), stops


def write_example(scene: Scene, rows: int = MAP_ROWS) -> bytes:
    """The scene as a serialised tf.Example, in the coordinates of its file.

    Args:
        scene: what to write.
        rows: map samples that there is room for.

    Raises:
        ValueError: more agents, map points or lights than fit, naming the scenario.
    """
    for name, count, room in (("agents", scene.agents, AGENT_SLOTS), ("map points", len(scene.points), rows)):
        if count > room:
            raise ValueError(f"scenario {scene.scenario_id}: {count} {name}, a tf.Example has room for {room}")
    lists = _agent_lists(scene) | _map_lists(scene, rows) | _light_lists(scene)
    message = example_pb2.Example()
    message.features.feature["scenario/id"].bytes_list.value.append(scene.scenario_id.encode())
    for name, values in lists.items():
        if values.dtype == np.float32:
            message.features.feature[name].float_list = _list_of(values.tobytes())
        else:
            message.features.feature[name].int64_list = _list_of(_varint_bytes(values.ravel()))
    return message.SerializeToString(deterministic=True)


def _split(scene: Scene) -> dict[str, slice]:
    """Part → its steps."""
    return dict(
        zip(
            _PARTS,
            (slice(scene.current), slice(scene.current, scene.current + 1), slice(scene.current + 1, None)),
            strict=True,
        )
    )


def _agent_lists(scene: Scene) -> dict[str, np.ndarray]:
    def slotted(values: np.ndarray) -> np.ndarray:
        room = np.full((AGENT_SLOTS, *values.shape[1:]), -1, values.dtype)
        room[: len(values)] = values
        return room

    def flags(indices: np.ndarray) -> np.ndarray:
        marked = np.zeros(scene.agents, np.int64)
        marked[indices] = 1
        return marked

    valid = scene.valid.numpy()
    places = (scene.positions.double() + scene.origin).numpy().astype(np.float32)
    velocities, headings = scene.velocities.numpy(), scene.headings.numpy()
    micros = np.rint(scene.times.numpy() * _MICROSECONDS).astype(np.int64)
    steps = {name: places[..., axis] for axis, name in enumerate("xyz")}
    steps |= {name: scene.sizes.numpy()[..., axis] for axis, name in enumerate(("length", "width", "height"))}
    steps |= {"bbox_yaw": headings, "velocity_x": velocities[..., 0], "velocity_y": velocities[..., 1]}
    steps |= {"speed": np.hypot(*velocities.T).T, "vel_yaw": np.arctan2(velocities[..., 1], velocities[..., 0])}
    steps |= {"timestamp_micros": np.broadcast_to(micros, valid.shape)}
    lists = {}
    for part, chosen in _split(scene).items():
        lists[f"state/{part}/valid"] = np.maximum(slotted(valid[:, chosen].astype(np.int64)), 0)
        for name, values in steps.items():
            hidden = np.where(valid, values, values.dtype.type(-1))
            lists[f"state/{part}/{name}"] = slotted(hidden[:, chosen])
    difficulty = np.zeros(scene.agents, np.int64)
    difficulty[scene.to_predict.numpy()] = scene.difficulties.numpy()
    whole = {
        "id": scene.agent_ids.numpy().astype(np.float32),
        "type": scene.agent_types.numpy().astype(np.float32),
        "is_sdc": flags(np.array([scene.sdc])),
        "tracks_to_predict": flags(scene.to_predict.numpy()),
        "difficulty_level": difficulty,
        "objects_of_interest": flags(scene.of_interest.numpy()),
    }
    return lists | {f"state/{name}": slotted(values) for name, values in whole.items()}


def _map_lists(scene: Scene, rows: int) -> dict[str, np.ndarray]:
    sizes = np.diff(scene.feature_starts.numpy())
    points = (scene.points.double() + scene.origin).numpy()
    along = np.zeros_like(points)  # to the next point of the feature
    along[:-1] = np.diff(points, axis=0)
    along[scene.feature_starts.numpy()[1:][sizes > 0] - 1] = 0
    along /= np.maximum(np.linalg.norm(along, axis=-1, keepdims=True), 1e-12)

    def filled(values: np.ndarray) -> np.ndarray:
        room = np.full((rows, *values.shape[1:]), -1, values.dtype)
        room[: len(values)] = values
        return room

    return {
        "roadgraph_samples/xyz": filled(points.astype(np.float32)),
        "roadgraph_samples/dir": filled(along.astype(np.float32)),
        "roadgraph_samples/id": filled(np.repeat(scene.feature_ids.numpy(), sizes)),
        "roadgraph_samples/type": filled(np.repeat(scene.feature_types.numpy(), sizes)),
        "roadgraph_samples/valid": np.maximum(filled(np.ones(len(points), np.int64)), 0),
    }


def _light_lists(scene: Scene) -> dict[str, np.ndarray]:
    present = scene.light_valid.numpy()
    most = int(present.sum(axis=1).max(initial=0))
    if most > LIGHT_SLOTS:
        raise ValueError(
            f"scenario {scene.scenario_id}: {most} lights at a step, a tf.Example has room for {LIGHT_SLOTS}"
        )
    step, light = present.nonzero()
    slot = (np.cumsum(present, axis=1) - 1)[step, light]
    stops = (scene.light_stops.double() + scene.origin).numpy().astype(np.float32)[step, light]
    entries = {"id": scene.light_lanes.numpy()[light], "state": scene.light_states.numpy()[step, light]}
    entries |= {name: stops[:, axis] for axis, name in enumerate("xyz")}
    lists = {}
    for name, values in (entries | {"valid": np.ones(len(step), np.int64)}).items():
        table = np.full((scene.steps, LIGHT_SLOTS), 0 if name == "valid" else -1, values.dtype)
        table[step, slot] = values
        for part, chosen in _split(scene).items():
            lists[f"traffic_light_state/{part}/{name}"] = table[chosen]
    return lists


def _varint_bytes(values: Iterable[int]) -> bytes:
    out = bytearray()
    for value in values:
        rest = int(value) & 0xFFFFFFFFFFFFFFFF
        while rest >= 0x80:
            out.append(rest & 0x7F | 0x80)
            rest >>= 7
        out.append(rest)
    return bytes(out)


def _list_of(packed: bytes) -> bytes:
    return b"\x0a" + _varint_bytes([len(packed)]) + packed
