"""Tracks of a Scenario record as arrays, its thousands of states viewed at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from datamodules.protos import scenario_pb2, scenario_raw_pb2
from datamodules.wire import by_length, numbers

_POSITION, _SIZE, _HEADING, _VELOCITY, _VALID = (2, 3, 4), (5, 6, 7), (8,), (9, 10), 11
_FIELDS = {1: _POSITION, 5: _SIZE + _HEADING + _VELOCITY, 0: (_VALID,)}  # wire type → fields
_WIDTHS = {1: 8, 5: 4, 0: 1}  # wire type → bytes of a value; valid is a varint of one byte


class Tracks(NamedTuple):
    """`Recorded`'s fields of the agents."""

    ids: np.ndarray
    types: np.ndarray
    positions: np.ndarray
    sizes: np.ndarray
    headings: np.ndarray
    velocities: np.ndarray
    valid: np.ndarray


def read_tracks(scenario: str, tracks: Sequence[scenario_raw_pb2.RawTrack], steps: int | None) -> Tracks:
    """The tracks in the order of the file.

    Args:
        scenario: its name, for errors.
        tracks: at least one.
        steps: states that each track must have; None for as many as the first has.

    Raises:
        ValueError: a track with another number of states, or no state at all.
        google.protobuf.message.DecodeError: a state is damaged.
    """
    steps = len(tracks[0].states) if steps is None else steps
    if not steps:
        raise ValueError(f"scenario {scenario}: no timestamps and no states; the record is damaged")
    states: list[bytes] = []
    for track in tracks:
        if len(track.states) != steps:
            raise ValueError(
                f"scenario {scenario}: track {track.id} has {len(track.states)} states for {steps} steps; "
                "the record is damaged"
            )
        states += track.states[:]
    arrays = _States.empty(len(states))
    for chosen, records in by_length(states):
        for array, values in zip(arrays, _together(records) or _one_by_one(records), strict=True):
            array[chosen] = values
    ids = np.array([track.id for track in tracks], np.int64)
    types = np.array([track.object_type for track in tracks], np.int64)
    return Tracks(ids, types, *(array.reshape(len(tracks), steps, *array.shape[1:]) for array in arrays))


class _States(NamedTuple):
    """`Tracks` without ids and types, of n states."""

    positions: np.ndarray
    sizes: np.ndarray
    headings: np.ndarray
    velocities: np.ndarray
    valid: np.ndarray

    @classmethod
    def empty(cls, count: int) -> _States:
        size, heading, velocity = (np.zeros((count, *shape), np.float32) for shape in ((3,), (), (2,)))
        return cls(np.zeros((count, 3)), size, heading, velocity, np.zeros(count, bool))


def _together(states: np.ndarray) -> _States | None:
    """States (n, bytes) that are laid out alike; None where they aren't."""
    layout = _layout(states)
    if layout is None:
        return None
    made = _States.empty(len(states))
    columns = [(made.positions, _POSITION, "<f8"), (made.sizes, _SIZE, "<f4"), (made.velocities, _VELOCITY, "<f4")]
    columns.append((made.headings[:, None], _HEADING, "<f4"))
    for values, fields, dtype in columns:
        for column, field in enumerate(fields):
            if field in layout:
                values[:, column] = numbers(states, layout[field], dtype)
    if _VALID in layout:
        np.not_equal(states[:, layout[_VALID]], 0, out=made.valid)
    return made


def _layout(states: np.ndarray) -> dict[int, int] | None:
    """Field → byte at which its value begins, if all states (n, bytes) have the fields of the first in the same places."""
    first: list[int] = states[0].tolist()
    layout, tags, at = {}, [], 0
    while at < len(first):
        field, wire = first[at] >> 3, first[at] & 7
        if field not in _FIELDS.get(wire, ()) or field in layout:
            return None
        tags.append(at)
        layout[field] = at + 1
        at += 1 + _WIDTHS[wire]
    if at != len(first) or (states[:, tags] != states[0, tags]).any():
        return None
    if _VALID in layout and (states[:, layout[_VALID]] > 1).any():
        return None
    return layout


def _one_by_one(states: np.ndarray) -> _States:
    """What `_together` gives, of states laid out in any way."""
    made = _States.empty(len(states))
    for index, data in enumerate(states):
        state = scenario_pb2.ObjectState.FromString(data.tobytes())
        made.positions[index] = state.center_x, state.center_y, state.center_z
        made.sizes[index] = state.length, state.width, state.height
        made.headings[index] = state.heading
        made.velocities[index] = state.velocity_x, state.velocity_y
        made.valid[index] = state.valid
    return made
