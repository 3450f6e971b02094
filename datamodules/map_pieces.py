"""Cuts the map of a scene into short pieces with a pose of their own: what the model sees of roads, lines and kerbs."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.scene import FeatureType, Scene

LENGTH = 5.0  # metres, the greatest of a piece
GAP = 3.0  # metres; a polyline with a longer step is two
SIDE = 1000.0  # metres; a longer side of a polygon is damage and left out: it would be cut into millions of pieces
TANGENT = 0.5  # metres over which the heading at the start of a piece is taken
_SHORTEST = 0.05  # metres; less has no heading to speak of


class MapPieceType(IntEnum):
    """What a piece is part of. Stop signs are points, have no heading and give no pieces."""

    LANE_UNDEFINED = 0
    LANE_FREEWAY = 1
    LANE_SURFACE = 2
    LANE_BIKE = 3
    LINE_BROKEN = 4
    LINE_SOLID = 5
    LINE_DOUBLE = 6
    EDGE_BOUNDARY = 7
    EDGE_MEDIAN = 8
    CROSSWALK = 9
    SPEED_BUMP = 10
    DRIVEWAY = 11


_PIECE_TYPES = {
    FeatureType.LANE_UNDEFINED: MapPieceType.LANE_UNDEFINED,
    FeatureType.LANE_FREEWAY: MapPieceType.LANE_FREEWAY,
    FeatureType.LANE_SURFACE: MapPieceType.LANE_SURFACE,
    FeatureType.LANE_BIKE: MapPieceType.LANE_BIKE,
    FeatureType.LINE_UNKNOWN: MapPieceType.LINE_BROKEN,
    FeatureType.LINE_BROKEN_WHITE: MapPieceType.LINE_BROKEN,
    FeatureType.LINE_SOLID_WHITE: MapPieceType.LINE_SOLID,
    FeatureType.LINE_DOUBLE_WHITE: MapPieceType.LINE_DOUBLE,
    FeatureType.LINE_BROKEN_YELLOW: MapPieceType.LINE_BROKEN,
    FeatureType.LINE_BROKEN_DOUBLE_YELLOW: MapPieceType.LINE_BROKEN,
    FeatureType.LINE_SOLID_YELLOW: MapPieceType.LINE_SOLID,
    FeatureType.LINE_DOUBLE_YELLOW: MapPieceType.LINE_DOUBLE,
    FeatureType.LINE_PASSING_DOUBLE_YELLOW: MapPieceType.LINE_DOUBLE,
    FeatureType.EDGE_BOUNDARY: MapPieceType.EDGE_BOUNDARY,
    FeatureType.EDGE_MEDIAN: MapPieceType.EDGE_MEDIAN,
    FeatureType.EDGE_UNKNOWN: MapPieceType.EDGE_BOUNDARY,
    FeatureType.CROSSWALK: MapPieceType.CROSSWALK,
    FeatureType.SPEED_BUMP: MapPieceType.SPEED_BUMP,
    FeatureType.DRIVEWAY: MapPieceType.DRIVEWAY,
}
_TABLE = np.full(max(FeatureType) + 1, -1)
for _feature, _piece in _PIECE_TYPES.items():
    _TABLE[_feature] = _piece
_POLYGONS = (FeatureType.CROSSWALK, FeatureType.SPEED_BUMP, FeatureType.DRIVEWAY)


class MapPieces(NamedTuple):
    """m pieces of at most 5 m, in the order of the features they are cut from.

    Attributes:
        pose: (m, 3) float64: x, y of the start and the heading there, in the scene's coordinates.
        points: (m, 2, 2) float64: middle and end by arc length, in the piece's own frame (x along its heading).
        type: (m,) int64 `MapPieceType`.
        light: (m,) int64 `LightState` at the current step of the lane a piece is of, 0 where there is none.
    """

    pose: Tensor
    points: Tensor
    type: Tensor
    light: Tensor


def map_pieces(scene: Scene) -> MapPieces:
    """Cuts every polyline, broken where its points are over 3 m apart, into equal pieces of at most 5 m.

    Start, middle and end are interpolated on the polyline, the heading is that of its first 0.5 m. The sides of
    crosswalks, speed bumps and driveways are polylines each, the closing one too; one longer than 1 km is left out, as are
    features shorter than 0.05 m.

    Raises:
        ValueError: if a feature has an unknown type; names scene and feature.
    """
    types = scene.feature_types.numpy()
    unknown = (
        (types < 0) | (types >= len(_TABLE)) | ((_TABLE[types % len(_TABLE)] < 0) & (types != FeatureType.STOP_SIGN))
    )
    if unknown.any():
        first = int(unknown.argmax())
        raise ValueError(
            f"scene {scene.scenario_id}: map feature {int(scene.feature_ids[first])} has unknown type {types[first]}"
        )
    points = scene.points[:, :2].double().numpy()
    begin, end, feature, joined = _segments(points, scene.feature_starts.numpy(), types)
    length = np.hypot(*(points[end] - points[begin]).T)
    limit = np.where(np.isin(types[feature], _POLYGONS), SIDE, GAP)
    usable = (length > 0) & (length <= limit) & (_TABLE[types[feature]] >= 0)
    # A break left out is not joined over: it ends a run, a repeated point doesn't.
    broken = np.cumsum(length > limit)[usable]
    begin, end, feature, joined, length = begin[usable], end[usable], feature[usable], joined[usable], length[usable]
    new_run = np.ones(len(length), bool)
    new_run[1:] = (feature[1:] != feature[:-1]) | (broken[1:] != broken[:-1]) | ~joined[1:]
    starts = np.flatnonzero(new_run)
    runs = np.add.reduceat(length, starts) if len(starts) else np.zeros(0)
    pieces = np.where(runs >= _SHORTEST, np.ceil(runs / LENGTH - 1e-9), 0).astype(np.int64)
    run = np.repeat(np.arange(len(runs)), pieces)  # (m,)
    number = np.arange(len(run)) - (np.cumsum(pieces) - pieces)[run]
    each = runs[run] / pieces[run]
    total = np.concatenate(([0.0], length.cumsum()))  # arc length over all runs, one after the other
    offset = total[starts[run]] if len(run) else np.zeros(0)
    last = np.append(starts[1:], len(length))[run] - 1 if len(run) else run

    def at(distance: np.ndarray) -> np.ndarray:
        place = offset + distance
        index = np.searchsorted(total, place, side="right") - 1
        index = np.clip(index, starts[run], last) if len(run) else index
        share = np.clip((place - total[index]) / length[index], 0.0, 1.0)[:, None]
        return points[begin[index]] + share * (points[end[index]] - points[begin[index]])

    start = at(number * each)
    ahead = at(number * each + np.minimum(TANGENT, each)) - start
    heading = np.arctan2(ahead[:, 1], ahead[:, 0])
    others = np.stack((at((number + 0.5) * each), at((number + 1) * each)), 1) - start[:, None]
    cosine, sine = np.cos(heading)[:, None], np.sin(heading)[:, None]
    local = np.stack(
        (cosine * others[..., 0] + sine * others[..., 1], cosine * others[..., 1] - sine * others[..., 0]), -1
    )
    source = feature[starts[run]] if len(run) else run
    return MapPieces(
        pose=torch.from_numpy(np.concatenate((start, heading[:, None]), 1)),
        points=torch.from_numpy(local),
        type=torch.from_numpy(_TABLE[types[source]].astype(np.int64)),
        light=torch.from_numpy(_lights(scene)[source]),
    )


def _segments(
    points: np.ndarray, starts: np.ndarray, types: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Point each segment begins and ends at, its feature, and whether it goes on where the one before it ends."""
    counts = np.diff(starts)
    feature_of = np.repeat(np.arange(len(counts)), counts)
    closes = np.isin(types, _POLYGONS) & (counts > 2)
    begin = np.arange(len(points))
    end = begin + 1
    is_last = np.zeros(len(points), bool)
    is_last[starts[1:][counts > 0] - 1] = True
    end[is_last] = starts[:-1][feature_of[is_last]]
    keep = ~is_last | closes[feature_of]
    return begin[keep], end[keep], feature_of[keep], ~np.isin(types[feature_of[keep]], _POLYGONS)


def _lights(scene: Scene) -> np.ndarray:
    """(m,) light state of every feature at the current step."""
    states = np.zeros(len(scene.feature_ids), np.int64)
    told = scene.light_valid[scene.current].numpy()
    lanes, shown = scene.light_lanes.numpy()[told], scene.light_states[scene.current].numpy()[told]
    order = np.argsort(scene.feature_ids.numpy(), kind="stable")
    ordered = scene.feature_ids.numpy()[order]
    place = np.searchsorted(ordered, lanes)
    found = place < len(ordered)
    found[found] = ordered[place[found]] == lanes[found]
    states[order[place[found]]] = shown[found]
    return states
