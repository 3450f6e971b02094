"""`Recorded`: a scenario in the coordinates of its file, and what makes a `Scene` of it, the same for every format.

How a scene comes of it:

- Coordinates are recentred in float64, then become float32. The origin is the self-driving car at the current step (or the
  nearest step where it is valid; without one, any valid agent; without any, the first map point), rounded to whole metres:
  that subtracts exactly, and formats that store coordinates as float32 find the same origin.
- A state with a value that isn't finite counts as invalid, a map point or a light's entry with one is dropped; a tally
  counts them. So are map features left without points. A time that isn't finite or an id of two tracks is an error.
- `to_predict` and `of_interest` are sorted and hold each agent once.
- Lights are ordered by the id of their lane, which needn't be in the map; of two entries for a lane at one step the last
  holds.
- Codes beyond those of `AgentType` become OTHER (negative ones UNSET); other unknown codes become the unknown of their kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from datamodules.scene import AgentType, LightState, Scene

STEP = 0.1
"""Seconds between steps."""
MOST_LIGHTS = 1 << 22
"""Steps times lights of a scenario; the dataset has thousands. More would fill the memory from a small, damaged record."""
CURRENT = 10
"""Index of the current step where a file doesn't tell."""


class Recorded(NamedTuple):
    """Arrays of one scenario as its file has them, fresh and contiguous.

    There are a agents, t steps, m map features with p points in all and n light entries.

    Attributes:
        scenario_id: as in the file.
        times: (t,) float64 seconds.
        current: index of the current step.
        ids: (a,) int64.
        types: (a,) int64 codes of the file.
        positions: (a, t, 3) float64 metres.
        sizes: (a, t, 3) float32: length, width, height.
        headings: (a, t) float32.
        velocities: (a, t, 2) float32.
        valid: (a, t) bool.
        sdc: index of the self-driving car.
        to_predict: (k,) int64 indices of agents.
        difficulties: (k,) int64.
        of_interest: (i,) int64 indices of agents.
        feature_ids: (m,) int64.
        feature_types: (m,) int64 `FeatureType`.
        feature_sizes: (m,) int64 how many points each has.
        points: (p, 3) float64.
        light_steps: (n,) int64 step of an entry.
        light_lanes: (n,) int64 feature id.
        light_codes: (n,) int64 codes of the file.
        light_stops: (n, 3) float64.
    """

    scenario_id: str
    times: np.ndarray
    current: int
    ids: np.ndarray
    types: np.ndarray
    positions: np.ndarray
    sizes: np.ndarray
    headings: np.ndarray
    velocities: np.ndarray
    valid: np.ndarray
    sdc: int
    to_predict: np.ndarray
    difficulties: np.ndarray
    of_interest: np.ndarray
    feature_ids: np.ndarray
    feature_types: np.ndarray
    feature_sizes: np.ndarray
    points: np.ndarray
    light_steps: np.ndarray
    light_lanes: np.ndarray
    light_codes: np.ndarray
    light_stops: np.ndarray


def to_scene(recorded: Recorded, tally: Counter[str] | None = None) -> Scene:
    """The scene, which takes the arrays over; what it had to leave out is added to `tally`.

    Raises:
        ValueError: naming the scenario and the index that lies outside it.
    """
    agents, steps = recorded.valid.shape
    _check_index(recorded, "current_time_index", recorded.current, steps)
    _check_index(recorded, "sdc_track_index", recorded.sdc, agents)
    for index in recorded.to_predict.tolist():
        _check_index(recorded, "tracks_to_predict", index, agents)
    _check_index(recorded, "step of a light", int(recorded.light_steps.max(initial=0)), steps)
    _check_values(recorded)
    tally = Counter() if tally is None else tally

    valid = recorded.valid
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows float32 is found by isfinite below
        origin = _origin(recorded)
        positions = (recorded.positions - origin).astype(np.float32)
        points = (recorded.points - origin).astype(np.float32)
        stops = (recorded.light_stops - origin).astype(np.float32)
    states = (positions, recorded.sizes, recorded.headings[..., None], recorded.velocities)
    if not all(np.isfinite(values).all() for values in states):
        finite = np.logical_and.reduce([np.isfinite(values).all(-1) for values in states])
        tally["states not finite"] += int((valid & ~finite).sum())
        valid = valid & finite
    if not valid.all():
        hidden = ~valid
        for values in states:
            values[hidden] = 0

    features, starts, points = _features(recorded, points, tally)
    lights = _lights(recorded, stops, steps, tally)
    to_predict, first = np.unique(recorded.to_predict, return_index=True)
    types = np.where(recorded.types > AgentType.OTHER, AgentType.OTHER, np.maximum(recorded.types, AgentType.UNSET))
    return Scene(
        recorded.scenario_id,
        torch.from_numpy(origin),
        torch.from_numpy(recorded.times),
        recorded.current,
        torch.from_numpy(recorded.ids),
        torch.from_numpy(types),
        torch.from_numpy(positions),
        torch.from_numpy(recorded.sizes),
        torch.from_numpy(recorded.headings),
        torch.from_numpy(recorded.velocities),
        torch.from_numpy(valid),
        recorded.sdc,
        torch.from_numpy(to_predict),
        torch.from_numpy(recorded.difficulties[first]),
        torch.from_numpy(np.unique(recorded.of_interest)),
        torch.from_numpy(recorded.feature_ids[features]),
        torch.from_numpy(recorded.feature_types[features]),
        torch.from_numpy(starts),
        torch.from_numpy(points),
        *(torch.from_numpy(values) for values in lights),
    )


def indices_of(ids: np.ndarray, wanted: Iterable[int]) -> np.ndarray:
    """Index in `ids` of each wanted id; those that aren't there are left out."""
    index = {value: number for number, value in enumerate(ids.tolist())}
    return np.array([index[value] for value in wanted if value in index], np.int64)


def _check_index(recorded: Recorded, key: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ValueError(
            f"scenario {recorded.scenario_id}: {key} is {index}, outside 0..{count - 1}; the record is damaged"
        )


def _check_values(recorded: Recorded) -> None:
    name = f"scenario {recorded.scenario_id}"
    told = np.isfinite(recorded.times)
    if not told.all():
        raise ValueError(f"{name}: the time of step {told.argmin()} is not finite; the record is damaged")
    ids, counts = np.unique(recorded.ids, return_counts=True)
    if len(ids) < len(recorded.ids):
        raise ValueError(f"{name}: {counts.max()} tracks have the id {ids[counts.argmax()]}; the record is damaged")
    lights = len(np.unique(recorded.light_lanes))
    if lights * len(recorded.times) > MOST_LIGHTS:
        raise ValueError(f"{name}: {lights} lights over {len(recorded.times)} steps; the record is damaged")


def _origin(recorded: Recorded) -> np.ndarray:
    """(3,) float64 whole metres."""
    place: np.ndarray | None = None
    steps = _usable(recorded.positions[recorded.sdc], recorded.valid[recorded.sdc])
    if steps.size:
        place = recorded.positions[recorded.sdc, steps[np.abs(steps - recorded.current).argmin()]]
    elif (others := _usable(recorded.positions.reshape(-1, 3), recorded.valid.reshape(-1))).size:
        place = recorded.positions.reshape(-1, 3)[others[0]]
    elif (points := _usable(recorded.points, np.ones(len(recorded.points), bool))).size:
        place = recorded.points[points[0]]
    return np.zeros(3) if place is None else np.rint(place) + 0.0  # + 0.0: no negative zero


def _usable(positions: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Indices of those valid positions (n, 3) that are finite and on Earth."""
    return (valid & (np.abs(positions) < 1e9).all(-1)).nonzero()[0]


def _features(recorded: Recorded, points: np.ndarray, tally: Counter[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices (m',) of the features that have points, their starts (m' + 1,) and the points that are finite."""
    sizes = recorded.feature_sizes
    finite = np.isfinite(points)
    if not finite.all():
        finite = finite.all(-1)
        tally["map points not finite"] += int((~finite).sum())
        owner = np.repeat(np.arange(len(sizes)), sizes)
        points, sizes = points[finite], np.bincount(owner[finite], minlength=len(sizes))
    kept = sizes.nonzero()[0]
    if len(kept) < len(sizes):
        tally["map features without points"] += len(sizes) - len(kept)
    starts = np.zeros(len(kept) + 1, np.int64)
    np.cumsum(sizes[kept], out=starts[1:])
    return kept, starts, points


def _lights(
    recorded: Recorded, stops: np.ndarray, steps: int, tally: Counter[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lanes (l,), states (t, l), stop points (t, l, 3) and whether there is an entry (t, l)."""
    step, lane, code = recorded.light_steps, recorded.light_lanes, recorded.light_codes
    finite = np.isfinite(stops)
    if not finite.all():
        finite = finite.all(-1)
        tally["light entries not finite"] += int((~finite).sum())
        step, lane, code, stops = step[finite], lane[finite], code[finite], stops[finite]
    code = np.where((code < 0) | (code > LightState.FLASHING_CAUTION), LightState.UNKNOWN, code)
    lanes, slot = np.unique(lane, return_inverse=True)
    states = np.full((steps, len(lanes)), LightState.UNKNOWN, np.int64)
    places = np.zeros((steps, len(lanes), 3), np.float32)
    present = np.zeros((steps, len(lanes)), bool)
    states[step, slot], places[step, slot], present[step, slot] = code, stops, True
    return lanes, states, places, present
