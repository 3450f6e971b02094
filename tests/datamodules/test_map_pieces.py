"""Pieces of a map: short, covering what they are cut from, moving with it, each with its type and light."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from datamodules.map_pieces import MapPieceType, map_pieces
from datamodules.scene import FeatureType, LightState
from datamodules.scene_frames import turned
from datamodules.synthetic_scenes import synthetic_scene


def with_map(scene, lines, types, ids=None):
    points = torch.cat([torch.zeros(0, 3), *(torch.as_tensor(line, dtype=torch.float32) for line in lines)])
    return scene._replace(
        feature_ids=torch.tensor(ids or list(range(len(lines))), dtype=torch.int64),
        feature_types=torch.tensor(types, dtype=torch.int64),
        feature_starts=torch.tensor(np.cumsum([0, *map(len, lines)]), dtype=torch.int64),
        points=points,
    )


def in_scene(pieces):
    """(m, 3, 2) start, middle and end in the scene's coordinates."""
    offsets = turned(pieces.points, pieces.pose[:, None, 2].expand(-1, 2))
    start = pieces.pose[:, None, :2]
    return torch.cat((start, start + offsets), 1)


@pytest.fixture
def scene():
    return synthetic_scene(0, agents=4)


def straight(length, step=0.5):
    x = np.append(np.arange(0, length, step), length)
    return np.stack((x, np.zeros_like(x), np.zeros_like(x)), 1)


def test_pieces_cover_their_polyline_and_are_short(scene):
    pieces = map_pieces(scene)
    corners = in_scene(pieces)
    assert pieces.points.norm(dim=-1).max() <= 5.0 + 1e-9
    # Ends of pieces lie on the map, and every point of it is near a chord: bends are gentle, of at least 1.5 m radius.
    starts, ends = corners[:, 0], corners[:, 2]
    features = scene.feature_types != FeatureType.STOP_SIGN
    assert features.all()
    middles = corners[:, 1]
    points = scene.points[:, :2].double()
    far = torch.inf * torch.ones(len(points), dtype=torch.float64)
    for first, second in ((starts, middles), (middles, ends)):
        along = second - first
        share = ((points[:, None] - first) * along).sum(-1) / along.square().sum(-1)
        foot = first + share.clamp(0, 1)[..., None] * along
        far = torch.minimum(far, (points[:, None] - foot).norm(dim=-1).amin(1))
    assert far.max() < 0.5


def test_total_length_of_a_straight_line_is_kept(scene):
    for length in (0.5, 4.9, 5.0, 5.1, 12.0, 100.0):
        pieces = map_pieces(with_map(scene, [straight(length)], [FeatureType.LANE_SURFACE]))
        assert len(pieces.pose) == math.ceil(length / 5)
        each = length / len(pieces.pose)
        torch.testing.assert_close(pieces.pose[:, 0], torch.arange(len(pieces.pose)).double() * each, atol=1e-5, rtol=0)
        torch.testing.assert_close(pieces.points[:, 1, 0].sum().item(), length, atol=1e-4, rtol=0)
        torch.testing.assert_close(pieces.points[:, 0] * 2, pieces.points[:, 1], atol=1e-5, rtol=0)
        assert pieces.pose[:, 2].abs().max() < 1e-6


def test_gaps_break_and_repeated_points_do_not(scene):
    line = straight(20.0)
    line = np.concatenate((line[:20], line[19:20], line[30:]))  # 10 m, a repeated point, then 5.5 m left out
    pieces = map_pieces(with_map(scene, [line], [FeatureType.LINE_BROKEN_WHITE]))
    corners = in_scene(pieces)[..., 0]
    assert not ((corners.amin(1) < 14.9) & (corners.amax(1) > 9.6)).any()
    assert len(pieces.pose) == 3


def test_polygons_become_their_sides(scene):
    square = np.array([[0, 0, 0], [8, 0, 0], [8, 4, 0], [0, 4, 0]], np.float64)
    pieces = map_pieces(with_map(scene, [square], [FeatureType.CROSSWALK]))
    assert pieces.type.tolist() == [MapPieceType.CROSSWALK] * 6
    headings = [0.0, 0.0, math.pi / 2, math.pi, math.pi, -math.pi / 2]
    torch.testing.assert_close(pieces.pose[:, 2], torch.tensor(headings, dtype=torch.float64))
    torch.testing.assert_close(pieces.points[..., 1], torch.zeros(6, 2, dtype=torch.float64))
    assert pieces.points[:, 1, 0].sum() == 24


@pytest.mark.parametrize("far", [1e4, 1e9, 1e30])
def test_sides_of_absurd_length_are_left_out(scene, far):
    corners = np.array([[0, 0, 0], [8, 0, 0], [8, 4, 0], [far, 4, 0]], np.float64)
    pieces = map_pieces(with_map(scene, [corners], [FeatureType.DRIVEWAY]))
    assert pieces.points[:, 1, 0].sum() == 12
    assert pieces.pose.isfinite().all()


def test_rigid_motion_moves_the_poses_and_nothing_else(scene):
    angle, shift = torch.tensor(2.2, dtype=torch.float64), torch.tensor([30.0, -12.0], dtype=torch.float64)
    moved = scene.points.double().clone()
    moved[:, :2] = turned(scene.points[:, :2].double(), angle) + shift
    before, after = map_pieces(scene), map_pieces(scene._replace(points=moved))
    torch.testing.assert_close(after.points, before.points)
    torch.testing.assert_close(after.pose[:, :2], turned(before.pose[:, :2], angle) + shift)
    turn = after.pose[:, 2] - before.pose[:, 2] - angle
    torch.testing.assert_close(turn.cos(), torch.ones_like(turn))
    assert torch.equal(after.type, before.type)
    assert torch.equal(after.light, before.light)


def test_lights_of_the_current_step_colour_their_lane(scene):
    lines = [straight(12.0), straight(12.0), straight(12.0)]
    made = with_map(scene, lines, [FeatureType.LANE_SURFACE] * 3, ids=[30, 10, 20])
    states = torch.full((91, 3), LightState.GO, dtype=torch.int64)
    states[10, 0] = LightState.STOP
    told = torch.ones(91, 3, dtype=torch.bool)
    told[10, 1] = False
    made = made._replace(
        light_lanes=torch.tensor([10, 30, 99]), light_states=states, light_stops=torch.zeros(91, 3, 3), light_valid=told
    )
    assert map_pieces(made).light.tolist() == [0] * 3 + [LightState.STOP] * 3 + [0] * 3


def test_points_stop_signs_and_nothing_give_no_pieces(scene):
    point = np.zeros((1, 3))
    made = with_map(scene, [point, point, np.zeros((4, 3)), np.zeros((0, 3)), straight(3.0)], [2, 17, 18, 15, 3])
    assert map_pieces(made).type.tolist() == [MapPieceType.LANE_BIKE]
    empty = map_pieces(with_map(scene, [], []))
    assert empty.pose.shape == (0, 3)
    assert empty.points.shape == (0, 2, 2)
    assert empty.light.shape == (0,)


def test_every_known_type_has_a_piece_and_unknown_ones_are_named(scene):
    for kind in FeatureType:
        pieces = map_pieces(with_map(scene, [straight(4.0)], [kind]))
        assert (len(pieces.pose) == 0) == (kind == FeatureType.STOP_SIGN)
    for kind in (14, 22, -1):
        with pytest.raises(ValueError, match=f"synthetic-0: map feature 0 has unknown type {kind}"):
            map_pieces(with_map(scene, [straight(4.0)], [kind]))
