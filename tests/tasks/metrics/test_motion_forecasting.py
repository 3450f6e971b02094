"""Motion-forecasting metrics: equal to Waymo's op on random scenarios, additive, free of order, deaf to padding."""

import compat  # noqa: F401, I001 - spawned processes have no conftest

import json
import math
from pathlib import Path

import motion_scenarios
import pytest
import torch

from datamodules.scene import AgentType
from tasks.metrics.motion_average_precision import TrajectoryType, average_precision, buckets, trajectory_types
from tasks.metrics.motion_forecasting import MotionForecasting
from tasks.metrics.motion_miss_rate import speed_scale
from tasks.metrics.motion_tracks import MotionPrediction, MotionTracks

GOLDENS = json.loads(Path(__file__).with_name("motion_goldens.json").read_text())
NOW = motion_scenarios.NOW


def inputs(scenario):
    states = torch.tensor(scenario["states"])[:, NOW:]
    valid = torch.tensor(scenario["valid"])[:, NOW:]
    types = torch.tensor(scenario["types"])
    tracks = MotionTracks(states[..., :2], states[..., 2:4], states[..., 4], states[..., 5:], valid, types)
    agents = torch.where(torch.tensor(scenario["mask"]), torch.tensor(scenario["indices"]), -1)
    return MotionPrediction(torch.tensor(scenario["trajectories"]), torch.tensor(scenario["scores"]), agents), tracks


def measured(scenarios):
    metric = MotionForecasting()
    for scenario in scenarios:
        metric.update(*inputs(scenario))
    return metric.compute()


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        one, other = float(first[name]), float(second[name])
        assert one == pytest.approx(other, rel=0, abs=1e-12, nan_ok=True), name


def three_vehicles():
    """One drives straight at 10 m/s, one in an arc to the left at 6.2 m/s, one is parked; three predictions drift off."""
    t = 0.1 * torch.arange(81, dtype=torch.float64)
    positions, velocities = torch.zeros(3, 81, 2, dtype=torch.float64), torch.zeros(3, 81, 2, dtype=torch.float64)
    headings = torch.zeros(3, 81, dtype=torch.float64)
    speed, turn = 6.2, 0.2
    positions[0, :, 0], velocities[0, :, 0] = 10 * t, 10
    headings[1] = turn * t
    positions[1] = torch.stack((speed / turn * headings[1].sin(), 20 + speed / turn * (1 - headings[1].cos())), -1)
    velocities[1] = speed * torch.stack((headings[1].cos(), headings[1].sin()), -1)
    positions[2] = torch.tensor([30, 3.5])
    sizes = torch.tensor([4.8, 2.0]).expand(3, 81, 2)
    tracks = MotionTracks(
        positions, sizes, headings, velocities, torch.ones(3, 81, dtype=torch.bool), torch.ones(3).long()
    )
    drift = torch.tensor([[0.30, 0], [0, 0.12], [0, -0.25]], dtype=torch.float64)
    paths = positions[:, None, 5::5] + torch.arange(1, 17)[:, None] * drift[None, :, None]
    return MotionPrediction(
        paths[:, :, None], torch.tensor([[0.5, 0.3, 0.2]]).expand(3, 3), torch.arange(3)[:, None]
    ), tracks


def test_known_values():
    metric = MotionForecasting()
    metric.update(*three_vehicles())
    found = metric.compute()
    expected = {
        "min_ade": (0.42, 0.66, 1.02),
        "min_fde": (0.72, 1.2, 1.92),
        "miss_rate": (1 / 3, 1 / 3, 1 / 3),
        "overlap_rate": (0, 0, 0),
        "map": (0.5, 0.5, 0.5),
    }
    for name, values in expected.items():
        assert [float(found[f"{name}/vehicle/{s}s"]) for s in (3, 5, 8)] == pytest.approx(values, abs=1e-6)
        assert float(found[name]) == pytest.approx(sum(values) / 3, abs=1e-6)
    assert all(value.isnan() for name, value in found.items() if "pedestrian" in name)


@pytest.mark.parametrize("case", [name for name in motion_scenarios.CASES if not name.startswith("soft")])
def test_equal_to_the_official_op(case):
    found = measured(motion_scenarios.CASES[case]())
    for name, value in GOLDENS[case].items():
        # Where nothing was measured the op says 0 or −1.
        ours = float(found[name])
        assert (value in (0, -1)) if math.isnan(ours) else ours == pytest.approx(value, abs=1e-6), name


def test_soft_map_equals_map_without_repeated_matches():
    found = measured(motion_scenarios.CASES["hits and misses"]())
    compared = 0
    for name, value in GOLDENS["soft hits and misses"].items():
        if name.startswith("map/"):
            assert float(found[f"soft_{name}"]) == pytest.approx(value, abs=1e-6), name
            compared += float(found[name]) != pytest.approx(value, abs=1e-3)
    assert compared, "no case tells soft mAP from mAP"


def test_order_and_shards_do_not_matter():
    scenarios = motion_scenarios.CASES["pairs"]()
    whole = measured(scenarios)
    assert_same(whole, measured(scenarios[::-1]))
    shards = [MotionForecasting(), MotionForecasting(), MotionForecasting()]
    for shard, part in zip(shards, (scenarios[:5], [], scenarios[5:]), strict=True):
        for scenario in part:
            shard.update(*inputs(scenario))
    merged = MotionForecasting()
    for name, reduce in merged._reductions.items():
        states = [getattr(shard, name) for shard in shards]
        if isinstance(states[0], list):
            setattr(merged, name, [piece for state in states for piece in state])
        else:
            setattr(merged, name, reduce(torch.stack(states)))
    merged._update_count = 1
    assert_same(whole, merged.compute())


def test_agents_modes_and_padding_do_not_matter():
    scenarios = motion_scenarios.scenarios(7, members=2, modes=4)
    changed = []
    for scenario in scenarios:
        order = list(range(len(scenario["types"])))[::-1]
        place = {old: new for new, old in enumerate(order)}
        # Equal confidences are broken by order, so modes may only move if all differ.
        scores = [[0.1 * (mode + 1) for mode in range(4)] for _ in scenario["scores"]]
        scenario["scores"] = scores
        changed.append(
            {
                "trajectories": [
                    [[*joint[::-1], [[math.nan] * 2] * 16] for joint in group[::-1]]
                    for group in scenario["trajectories"]
                ],
                "scores": [row[::-1] for row in scores],
                "states": [scenario["states"][old] for old in order],
                "valid": [scenario["valid"][old] for old in order],
                "indices": [[*(place[index] for index in row[::-1]), 0] for row in scenario["indices"]],
                "mask": [[*row[::-1], False] for row in scenario["mask"]],
                "types": [scenario["types"][old] for old in order],
            }
        )
    assert_same(measured(scenarios), measured(changed))


def test_rigid_motion_does_not_matter():
    prediction, tracks = three_vehicles()
    angle, shift = torch.tensor(2.1, dtype=torch.float64), torch.tensor([300.0, -120.0], dtype=torch.float64)
    turn = torch.stack((torch.stack((angle.cos(), angle.sin())), torch.stack((-angle.sin(), angle.cos()))))
    moved = tracks._replace(
        positions=tracks.positions @ turn + shift,
        headings=tracks.headings + angle,
        velocities=tracks.velocities @ turn,
    )
    first, second = MotionForecasting(), MotionForecasting()
    first.update(prediction, tracks)
    second.update(prediction._replace(trajectories=prediction.trajectories @ turn + shift), moved)
    for name, value in first.compute().items():
        torch.testing.assert_close(second.compute()[name], value, rtol=0, atol=1e-9, equal_nan=True)


def test_rarest_type_and_manoeuvre_of_a_group_count():
    prediction, tracks = three_vehicles()
    tracks = tracks._replace(types=torch.tensor([AgentType.VEHICLE, AgentType.CYCLIST, AgentType.OTHER]))
    joint = MotionPrediction(
        prediction.trajectories.permute(2, 1, 0, 3, 4), prediction.confidences[:1], torch.tensor([[0, 1, 2]])
    )
    metric = MotionForecasting()
    metric.update(joint, tracks)
    found = metric.compute()
    assert found["min_ade/vehicle"].isnan()
    assert float(found["min_ade/cyclist/8s"]) == pytest.approx(1.02, abs=1e-6)
    assert buckets(tracks, torch.tensor([[0, 1, 2], [0, 2, -1], [2, -1, -1]]))[0].tolist() == [
        TrajectoryType.LEFT_TURN,
        TrajectoryType.STRAIGHT,
        TrajectoryType.STATIONARY,
    ]


def test_manoeuvres():
    ends = {
        TrajectoryType.STATIONARY: (1.0, 0.5, 0.1, 0.5),
        TrajectoryType.STRAIGHT: (50.0, 2.4, 0.5, 8.0),
        TrajectoryType.STRAIGHT_LEFT: (50.0, 2.6, 0.5, 8.0),
        TrajectoryType.STRAIGHT_RIGHT: (50.0, -2.6, -0.5, 8.0),
        TrajectoryType.LEFT_TURN: (20.0, 20.0, 1.6, 8.0),
        TrajectoryType.RIGHT_TURN: (20.0, -20.0, -1.6, 8.0),
        TrajectoryType.LEFT_U_TURN: (-1.0, 12.0, 3.1, 8.0),
        TrajectoryType.RIGHT_U_TURN: (-1.0, -12.0, -3.1, 8.0),
    }
    a = len(ends)
    positions, velocities, headings = torch.zeros(a, 81, 2), torch.zeros(a, 81, 2), torch.zeros(a, 81)
    valid = torch.zeros(a, 81, dtype=torch.bool)
    valid[:, 0] = valid[:, 60] = True  # the last valid step counts, whatever stands behind it
    start = 3.0  # and headings are taken modulo a turn
    for row, (x, y, turn, speed) in enumerate(ends.values()):
        positions[row, 60] = torch.tensor(
            [x * math.cos(start) - y * math.sin(start), x * math.sin(start) + y * math.cos(start)]
        )
        headings[row], headings[row, 60], velocities[row, 60, 0] = start, start + turn - 2 * math.pi, speed
        positions[row, 61:] = 99.0
    tracks = MotionTracks(positions, torch.ones(a, 81, 2), headings, velocities, valid, torch.ones(a).long())
    kinds, known = trajectory_types(tracks)
    assert kinds.tolist() == [int(kind) for kind in ends]
    assert known.all()
    assert buckets(tracks, torch.tensor([[7]]))[0].item() == TrajectoryType.RIGHT_TURN
    for now, later in ((False, True), (True, False)):
        some = valid.clone()
        some[:, 0], some[:, 60] = now, later
        assert not trajectory_types(tracks._replace(valid=some))[1].any()


def test_average_precision():
    confidences, positive = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([True, False, True, False, False])
    assert average_precision(confidences, positive, 3) == pytest.approx(0.5555555556, abs=1e-9)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert average_precision(confidences[order], positive[order], 3) == pytest.approx(0.5555555556, abs=1e-9)
    assert average_precision(torch.tensor([0.9, 0.9]), torch.tensor([True, False]), 1) == 0.5
    assert average_precision(torch.tensor([]), torch.tensor([], dtype=torch.bool), 1) == 0


def test_speed_scale():
    speeds = torch.tensor([0, 1.39, 6.2, 11, 30], dtype=torch.float64)
    assert speed_scale(speeds).tolist() == pytest.approx([0.5, 0.5, 0.75, 1, 1], abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p._replace(trajectories=p.trajectories[..., :15, :]), "16, 2"),
        (lambda p: p._replace(trajectories=p.trajectories[:, :0], confidences=p.confidences[:, :0]), "no prediction"),
        (lambda p: p._replace(confidences=p.confidences[:2]), "confidences"),
        (lambda p: p._replace(agents=torch.tensor([[0], [1], [3]])), "3 is no index of the 3 tracks"),
        (lambda p: p._replace(agents=torch.tensor([[0], [1], [-1]])), "group 2 names no agent"),
        (
            lambda p: p._replace(
                trajectories=p.trajectories * torch.tensor([[1.0], [math.nan], [1.0]])[..., None, None, None]
            ),
            "agent 1",
        ),
        (lambda p: p._replace(confidences=-p.confidences), "confidences must be"),
        (
            lambda p: MotionPrediction(
                p.trajectories[:1].expand(1, 3, 2, 16, 2), p.confidences[:1], torch.tensor([[1, 1]])
            ),
            "same agent twice",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    prediction, tracks = three_vehicles()
    with pytest.raises(ValueError, match=message):
        MotionForecasting().update(change(prediction), tracks)


def test_scenario_without_groups_changes_nothing():
    prediction, tracks = three_vehicles()
    metric = MotionForecasting()
    metric.update(prediction, tracks)
    before = metric.compute()
    metric.update(
        MotionPrediction(prediction.trajectories[:0], prediction.confidences[:0], prediction.agents[:0]), tracks
    )
    assert_same(before, metric.compute())


def _one_of_two(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    metric = MotionForecasting()
    for scenario in motion_scenarios.CASES["pairs"]() if rank else ():  # the first process sees nothing
        metric.update(*inputs(scenario))
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_the_same(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    expected = measured(motion_scenarios.CASES["pairs"]())
    for rank in (0, 1):
        assert_same(expected, torch.load(tmp_path / f"{rank}.pt"))
