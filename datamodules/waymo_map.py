"""Map features and traffic lights of a Scenario record as arrays, its thousands of points viewed at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from datamodules.protos import scenario_pb2, scenario_raw_pb2
from datamodules.scene import FeatureType
from datamodules.wire import by_length, gather, numbers, varint

_POINT = 29  # bytes of a point in its polyline: tag, length, and three doubles of nine bytes
_POINT_TAGS = {2: 0x09, 11: 0x11, 20: 0x19}  # byte → tag of x, y, z


class Kind(NamedTuple):
    """A kind of map feature.

    Attributes:
        header: (end, code) of the fields before the points, as every writer that sorts by number lays them out; IndexError
            where the data ends before.
        tag: byte before each point.
        message: class that parses it field by field.
        points: name of its points in `message`; a stop sign has one.
        types: `FeatureType` of the codes 0, 1, …; an unknown code counts as 0.
    """

    header: Callable[[bytes], tuple[int, int]]
    tag: int
    message: Any
    points: str
    types: tuple[int, ...]


class Features(NamedTuple):
    """`Recorded`'s fields of the map."""

    ids: np.ndarray
    types: np.ndarray
    sizes: np.ndarray
    points: np.ndarray


class Lights(NamedTuple):
    """`Recorded`'s fields of the lights."""

    steps: np.ndarray
    lanes: np.ndarray
    codes: np.ndarray
    stops: np.ndarray


def _lane_header(data: bytes) -> tuple[int, int]:
    at = code = 0
    if data[at] == 0x09:  # speed limit
        at += 9
    if data[at] == 0x10:
        code, at = varint(data, at + 1)
    if data[at] == 0x18:  # interpolating
        at += 2
    return at, code


def _line_header(data: bytes) -> tuple[int, int]:
    if data[0] != 0x08:
        return 0, 0
    code, at = varint(data, 1)
    return at, code


def _stop_sign_header(data: bytes) -> tuple[int, int]:
    at = 0
    while data[at] == 0x08:  # the lanes it rules
        at = varint(data, at + 1)[1]
    return at, 0


def _no_header(data: bytes) -> tuple[int, int]:
    return 0, 0


def _area(kind: FeatureType) -> Kind:
    return Kind(_no_header, 0x0A, scenario_pb2.Area, "polygon", (int(kind),))


_LINES = tuple(range(FeatureType.LINE_UNKNOWN, FeatureType.LINE_PASSING_DOUBLE_YELLOW + 1))
_EDGES = tuple(map(int, (FeatureType.EDGE_UNKNOWN, FeatureType.EDGE_BOUNDARY, FeatureType.EDGE_MEDIAN)))
KINDS = {
    "lane": Kind(_lane_header, 0x42, scenario_pb2.Lane, "polyline", tuple(range(FeatureType.LANE_BIKE + 1))),
    "road_line": Kind(_line_header, 0x12, scenario_pb2.Line, "polyline", _LINES),
    "road_edge": Kind(_line_header, 0x12, scenario_pb2.Line, "polyline", _EDGES),
    "crosswalk": _area(FeatureType.CROSSWALK),
    "speed_bump": _area(FeatureType.SPEED_BUMP),
    "driveway": _area(FeatureType.DRIVEWAY),
    "stop_sign": Kind(_stop_sign_header, 0x12, scenario_pb2.StopSign, "position", (int(FeatureType.STOP_SIGN),)),
}
"""By field of MapFeature."""


def read_features(features: Sequence[scenario_raw_pb2.RawMapFeature], tally: Counter[str]) -> Features:
    """The features in the order of the file; those of no known kind are counted in `tally` and left out.

    Raises:
        google.protobuf.message.DecodeError: a feature is damaged.
    """
    ids, payloads, kinds, begins, codes = [], [], [], [], []
    for feature in features:
        field = feature.WhichOneof("feature")
        if field is None:
            tally["map features of no kind"] += 1
            continue
        data = getattr(feature, field)
        kind = KINDS[field]
        try:
            begin, code = kind.header(data)
        except IndexError:
            begin, code = len(data), -1  # no point, or damaged
        ids.append(feature.id)
        payloads.append(data)
        kinds.append(kind)
        begins.append(begin)
        codes.append(code)
    lengths = np.array(list(map(len, payloads)), np.int64)
    tags = np.array([kind.tag for kind in kinds], np.uint8)
    starts = np.array(begins, np.int64)
    sizes, points = _points(b"".join(payloads), lengths, starts, tags)
    odd: dict[int, np.ndarray] = {}  # points of features that aren't laid out as usual
    ends = starts + sizes * _POINT
    for index, (kind, data, end, size) in enumerate(zip(kinds, payloads, ends.tolist(), sizes.tolist(), strict=True)):
        whole = end == len(data) or (kind is KINDS["lane"] and _holds_no_point(data[end:]))
        if not whole or not size or (kind is KINDS["stop_sign"] and size > 1):  # the last of two positions holds
            codes[index], odd[index] = _by_field(kind, data)
    if odd:
        parts = [points[end - size : end] for end, size in zip(np.cumsum(sizes).tolist(), sizes.tolist(), strict=True)]
        for index, part in odd.items():
            parts[index], sizes[index] = part, len(part)
        points = np.concatenate(parts)
    types = [kind.types[code if 0 <= code < len(kind.types) else 0] for kind, code in zip(kinds, codes, strict=True)]
    return Features(np.array(ids, np.int64), np.array(types, np.int64), sizes, points)


def _by_field(kind: Kind, data: bytes) -> tuple[int, np.ndarray]:
    """(code, points (n, 3)) of a feature laid out in any way."""
    message = kind.message.FromString(data)
    if kind is KINDS["stop_sign"]:
        return 0, _coordinates([message.position] if message.HasField("position") else [])
    return (message.type if len(kind.types) > 1 else 0), _coordinates(getattr(message, kind.points))


def read_lights(states: Sequence[scenario_raw_pb2.RawDynamicMapState]) -> Lights:
    """Every entry of every step; an entry without a stop point stands at (0, 0, 0) of the file.

    Raises:
        google.protobuf.message.DecodeError: an entry is damaged.
    """
    entries: list[bytes] = []
    for state in states:
        entries += state.lane_states[:]
    steps = np.repeat(np.arange(len(states)), [len(state.lane_states) for state in states])
    lanes, codes = np.zeros(len(entries), np.int64), np.zeros(len(entries), np.int64)
    stops = np.zeros((len(entries), 3))
    for chosen, records in by_length(entries):
        lanes[chosen], codes[chosen], stops[chosen] = _lights_together(records) or _lights_one_by_one(records)
    return Lights(steps, lanes, codes, stops)


def _lights_together(records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Lanes (n,), codes (n,) and stop points (n, 3) of entries (n, bytes) laid out as usual; None where they aren't.

    That is a lane of some bytes, a code of one byte, a stop point.
    """
    count, length = records.shape
    width = length - 1 - 2 - _POINT  # bytes of the lane
    if not 1 <= width <= 8:
        return None
    lane = records[:, 1 : 1 + width]
    tags = {0: 0x08, 1 + width: 0x10, 3 + width: 0x1A, 4 + width: _POINT - 2}
    tags |= {3 + width + place: tag for place, tag in _POINT_TAGS.items()}
    usual = (lane[:, :-1] >= 0x80).all() and (lane[:, -1] < 0x80).all() and (records[:, 2 + width] < 0x80).all()
    if not usual or any((records[:, place] != tag).any() for place, tag in tags.items()):
        return None
    weights = 1 << 7 * np.arange(width)
    stops = np.empty((count, 3))
    for axis in range(3):
        stops[:, axis] = numbers(records, 6 + width + 9 * axis, "<f8")
    return (lane & 0x7F) @ weights, records[:, 2 + width].astype(np.int64), stops


def _lights_one_by_one(records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `_lights_together` gives, of entries laid out in any way."""
    entries = [scenario_pb2.LaneState.FromString(data.tobytes()) for data in records]
    lanes, codes = ([getattr(entry, field) for entry in entries] for field in ("lane", "state"))
    return np.array(lanes, np.int64), np.array(codes, np.int64), _coordinates(entry.stop_point for entry in entries)


def _points(data: bytes, lengths: np.ndarray, begins: np.ndarray, tags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many whole points follow one another from the beginning of each part of `data`, and those points (p, 3) float64.

    Args:
        data: the parts, one after the other.
        lengths: (m,) bytes of each part.
        begins: (m,) byte of a part where its points begin.
        tags: (m,) uint8 tag of a point.
    """
    most = np.maximum(lengths - begins, 0) // _POINT
    owner = np.repeat(np.arange(len(most)), most)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(most) - most, most)
    places = (np.cumsum(lengths) - lengths + begins)[owner] + _POINT * number
    padded = np.frombuffer(data + bytes(_POINT), np.uint8)
    records = gather(padded, places, _POINT)
    found = records[:, 0] == tags[owner]
    found &= records[:, 1] == _POINT - 2
    for place, tag in _POINT_TAGS.items():
        found &= records[:, place] == tag
    sizes = most.copy()
    missed = (~found).nonzero()[0]
    np.minimum.at(sizes, owner[missed], number[missed])
    kept = number < sizes[owner]
    records = records if kept.all() else gather(padded, places[kept], _POINT)
    points = np.empty((len(records), 3))
    for axis in range(3):
        points[:, axis] = numbers(records, 3 + 9 * axis, "<f8")
    return sizes, points


def _holds_no_point(tail: bytes) -> bool:
    """Whether what follows the points of a lane neither adds a point nor changes its type."""
    message = scenario_raw_pb2.RawLane.FromString(tail)
    return not message.polyline and not message.HasField("type")


def _coordinates(points: Iterable[scenario_pb2.Point]) -> np.ndarray:
    """(n, 3) float64, field by field."""
    return np.array([(point.x, point.y, point.z) for point in points], np.float64).reshape(-1, 3)
