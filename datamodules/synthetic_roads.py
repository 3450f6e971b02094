"""A made-up town: signalled crossings on a grid with the bent roads, bike lanes, sidewalks and kerbs that join them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from datamodules.scene import FeatureType

HALF = 75.0  # metres from the middle of a crossing to where the next one's roads begin
_STOP, _ARC = 16.0, 12.0  # where lanes end at a crossing and where turning begins
_LANE, _BIKE, _LINE, _KERB = 2.0, 4.7, 3.75, 6.0  # offsets from the middle of the road
_SIDEWALKS = (7.5, 8.5)
_KERB_CENTRE = 10.0  # corners of kerbs, bike lanes and sidewalks are arcs about (±10, ±10)
_SPACING = 1.0
_BEND, _WAVE = 6.0, 240.0  # metres: roads are sine waves of this amplitude and length
_TURNS = (0, 1, -1)  # quarter turns of the three ways through a crossing: straight, left, right


class Tile(NamedTuple):
    """One crossing about the origin, before roads are bent.

    Attributes:
        lines: what traffic follows: 4 lanes in, 4 out, 12 through (3 for each way in), 4 bike lanes, 8 sidewalks.
        drawn: the other map features.
        kinds: `FeatureType` of `lines` without the sidewalks, then of `drawn`.
    """

    lines: tuple[np.ndarray, ...]
    drawn: tuple[np.ndarray, ...]
    kinds: tuple[FeatureType, ...]


class Roads(NamedTuple):
    """n lines of p points in all that traffic follows, g crossings.

    Attributes:
        points: (p, 2) float64.
        starts: (n + 1,) int64; line j is points[starts[j] : starts[j + 1]].
        arc: (p,) metres along the line.
        heading: (p,) radians, continuous along a line.
        length: (n,) metres.
        successors: (n, 3) lines that go on where one ends, −1 where there is none.
        curve_speed: (n,) metres a second that its bends allow.
        signalled: (12 g,) lines through crossings, 12 a crossing, 3 for each of its 4 ways in.
        way_in, way_out: lines for vehicles; bike, walk: for the others.
        features: map features as (kind, points (k, 2)).
        signalled_features: (12 g,) index among `features` of the signalled lines.
    """

    points: np.ndarray
    starts: np.ndarray
    arc: np.ndarray
    heading: np.ndarray
    length: np.ndarray
    successors: np.ndarray
    curve_speed: np.ndarray
    signalled: np.ndarray
    way_in: np.ndarray
    way_out: np.ndarray
    bike: np.ndarray
    walk: np.ndarray
    features: list[tuple[FeatureType, np.ndarray]]
    signalled_features: np.ndarray


def _arc(centre: tuple[float, float], radius: float, start: float, turn: int) -> np.ndarray:
    angles = start + turn * np.linspace(0.0, np.pi / 2, 12)
    return np.stack((centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)), 1)


def _even(points: np.ndarray) -> np.ndarray:
    arc = np.concatenate(([0.0], np.hypot(*np.diff(points, axis=0).T).cumsum()))
    at = np.linspace(0.0, arc[-1], max(2, int(np.ceil(arc[-1] / _SPACING)) + 1))
    return np.stack((np.interp(at, arc, points[:, 0]), np.interp(at, arc, points[:, 1])), 1)


def _corner(offset: float) -> np.ndarray:
    """Right of a road that comes from the west, round the corner, right of the one that goes south."""
    arc = _arc((-_KERB_CENTRE, -_KERB_CENTRE), _KERB_CENTRE - offset, np.pi / 2, -1)
    return np.concatenate(([[-HALF, -offset]], arc, [[-offset, -HALF]]))


def _through(turn: int) -> np.ndarray:
    if turn == 0:
        return np.array([[-_STOP, -_LANE], [_STOP, -_LANE]])
    side = float(turn)
    radius = _ARC + turn * _LANE
    arc = _arc((-_ARC, side * _ARC), radius, -side * np.pi / 2, turn)
    return np.concatenate(([[-_STOP, -_LANE]], arc, [[turn * _LANE, side * _STOP]]))


@functools.cache
def tile() -> Tile:
    """The crossing that every other is a copy of."""
    quarter = [np.array([[c, s], [-s, c]], np.float64) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]

    def turned(line: np.ndarray) -> list[np.ndarray]:
        return [_even(line) @ rotation for rotation in quarter]

    lanes_in = turned(np.array([[-HALF, -_LANE], [-_STOP, -_LANE]]))
    lanes_out = turned(np.array([[_STOP, -_LANE], [HALF, -_LANE]]))
    through = [line for way in zip(*(turned(_through(turn)) for turn in _TURNS), strict=True) for line in way]
    bikes = turned(_corner(_BIKE))
    walks = turned(_corner(_SIDEWALKS[0])) + [line[::-1] for line in turned(_corner(_SIDEWALKS[1]))]
    middle = turned(np.array([[-HALF, 0.0], [-_STOP, 0.0]]))
    white = turned(np.array([[-HALF, -_LINE], [-_STOP, -_LINE]])) + turned(np.array([[_STOP, -_LINE], [HALF, -_LINE]]))
    crosswalk = np.array([[-15.0, -_KERB], [-12.5, -_KERB], [-12.5, _KERB], [-15.0, _KERB]])
    drawn = middle + white + turned(_corner(_KERB)) + [crosswalk @ rotation for rotation in quarter]
    kinds = [FeatureType.LANE_SURFACE] * 20 + [FeatureType.LANE_BIKE] * 4 + [FeatureType.LINE_SOLID_YELLOW] * 4
    kinds += [FeatureType.LINE_BROKEN_WHITE] * 8 + [FeatureType.EDGE_BOUNDARY] * 4 + [FeatureType.CROSSWALK] * 4
    return Tile((*lanes_in, *lanes_out, *through, *bikes, *walks), tuple(drawn), tuple(kinds))


_LINES, _TRAFFIC_FEATURES = 32, 24  # lines of a tile, and those of them that are map features


def build_roads(side: int, bends: tuple[float, float]) -> Roads:
    """Returns a town of side × side crossings about the origin.

    Args:
        side: crossings a side.
        bends: phases in radians of the waves that bend the roads.
    """
    one = tile()
    steps = (np.arange(side) - (side - 1) / 2) * 2 * HALF
    centres = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)  # (g, 2), x slower than y

    def placed(line: np.ndarray) -> np.ndarray:
        points = line + centres[:, None]  # (g, k, 2)
        x, y = points[..., 0], points[..., 1]
        wave = 2 * np.pi / _WAVE
        return np.stack((x + _BEND * np.sin(wave * y + bends[0]), y + _BEND * np.sin(wave * x + bends[1])), -1)

    lines, drawn = [placed(line) for line in one.lines], [placed(line) for line in one.drawn]
    crossings = len(centres)
    ordered = [line[g] for g in range(crossings) for line in lines]
    starts = np.cumsum([0, *map(len, ordered)])
    points = np.concatenate(ordered)
    step = np.hypot(*np.diff(points, axis=0).T)
    step[starts[1:-1] - 1] = 0.0
    total = np.concatenate(([0.0], step.cumsum()))
    line_of = np.repeat(np.arange(len(ordered)), np.diff(starts))
    arc = total - total[starts[:-1]][line_of]
    base = np.arange(crossings)[:, None] * _LINES
    signalled = (base + np.arange(8, 20)).reshape(-1)
    curve_speed = np.full(len(ordered), 30.0)
    curve_speed.reshape(crossings, _LINES)[:, 8:20] = np.tile((30.0, 7.0, 5.0), 4)
    curve_speed.reshape(crossings, _LINES)[:, 20:24] = 4.0
    features = [
        (kind, line[g])
        for g in range(crossings)
        for kind, line in zip(one.kinds, (*lines[:_TRAFFIC_FEATURES], *drawn), strict=True)
    ]
    return Roads(
        points=points,
        starts=starts,
        arc=arc,
        heading=_headings(points, starts, line_of),
        length=arc[starts[1:] - 1],
        successors=_successors(side),
        curve_speed=curve_speed,
        signalled=signalled,
        way_in=(base + np.arange(4)).reshape(-1),
        way_out=(base + np.arange(4, 8)).reshape(-1),
        bike=(base + np.arange(20, 24)).reshape(-1),
        walk=(base + np.arange(24, 32)).reshape(-1),
        features=features,
        signalled_features=(np.arange(crossings)[:, None] * len(one.kinds) + np.arange(8, 20)).reshape(-1),
    )


def _headings(points: np.ndarray, starts: np.ndarray, line_of: np.ndarray) -> np.ndarray:
    """(p,) direction at every point, the mean of its two segments, without jumps inside a line."""
    ahead = np.minimum(np.arange(len(points)) + 1, starts[1:][line_of] - 1)
    behind = np.maximum(np.arange(len(points)) - 1, starts[:-1][line_of])
    chord = points[ahead] - points[behind]
    heading = np.arctan2(chord[:, 1], chord[:, 0])
    jumps = np.round(np.diff(heading) / (2 * np.pi))
    jumps[starts[1:-1] - 1] = 0.0
    turns = np.concatenate(([0.0], jumps.cumsum()))
    return heading - 2 * np.pi * (turns - turns[starts[:-1]][line_of])


def _successors(side: int) -> np.ndarray:
    """(n, 3): in → three ways through → out → in of the next crossing; bike lanes and sidewalks likewise."""
    successors = np.full((side, side, _LINES, 3), -1)
    base = np.arange(side * side).reshape(side, side) * _LINES
    for way in range(4):
        for choice, turn in enumerate(_TURNS):
            through = 8 + 3 * way + choice
            successors[:, :, way, choice] = base + through
            successors[:, :, through, :] = (base + 4 + (way + turn) % 4)[..., None]
        across = _shift(base, way)
        successors[:, :, 4 + way, :] = np.where(across >= 0, across + way, -1)[..., None]
        # The right turn of way `way` leaves in direction way − 1; the sidewalks of even offset run against it.
        across = _shift(base, (way - 1) % 4)
        successors[:, :, 20 + way, :] = np.where(across >= 0, across + 20 + (way - 1) % 4, -1)[..., None]
        successors[:, :, 24 + way, :] = np.where(across >= 0, across + 24 + (way - 1) % 4, -1)[..., None]
        across = _shift(base, (way + 2) % 4)  # backwards out of the way in
        successors[:, :, 28 + way, :] = np.where(across >= 0, across + 28 + (way + 1) % 4, -1)[..., None]
    return successors.reshape(-1, 3)


def _shift(base: np.ndarray, way: int) -> np.ndarray:
    """The crossing next to each in direction `way` (0 is +x, 1 is +y), −1 beyond the border."""
    moved = np.full_like(base, -1)
    if way == 0:
        moved[:-1] = base[1:]
    elif way == 1:
        moved[:, :-1] = base[:, 1:]
    elif way == 2:
        moved[1:] = base[:-1]
    else:
        moved[:, 1:] = base[:, :-1]
    return moved
