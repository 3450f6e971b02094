"""The whole metric on made scenes: the official code's results, laws of symmetry and of sums, and refusals by name."""

import compat  # noqa: F401, I001 - spawned processes import this file first

import copy
import math
import pickle

import pytest
import torch
from sim_agent_scenes import scene_and_states

from datamodules.scene import FeatureType
from tasks.metrics.realism import CHALLENGE_2023, CHALLENGE_2024, CHALLENGE_2025, COMPONENTS
from tasks.metrics.scene_features import scene_features
from tasks.metrics.sim_agents import SimAgents

NAMES = (
    "metametric",
    *(f"{name}_likelihood" for name in COMPONENTS),
    "average_displacement_error",
    "min_average_displacement_error",
    "simulated_collision_rate",
    "simulated_offroad_rate",
    "simulated_traffic_light_violation_rate",
)
# What waymo-open-dataset-tf-2-12-0 1.6.7 says of these scenes with the configuration of 2025, by seed, gaps and lights.
OFFICIAL = {
    (0, True, True): (
        0.6650862, 0.8813460, 0.9673478, 0.5647470, 0.9719713, 0.1003065, 0.6228447, 0.9539394, 0.3586890, 0.7154249,
        0.7577825, 2.4347939, 1.9043690, 0.30, 0.90, 0.65,
    ),
    (3, True, False): (
        0.8143381, 0.7463595, 0.9635883, 0.8647472, 0.9703220, 0.1669562, 0.8703765, 0.8816267, 0.2941955, 0.9997501,
        0.9997501, 2.9845424, 2.3639824, 0.90, 1.00, 0.00,
    ),
    (4, False, True): (
        0.7723230, 0.7823573, 0.9651091, 0.7461516, 0.9719713, 0.1559071, 0.7154249, 0.9971962, 0.3784524, 0.9438673,
        0.9997501, 3.9903302, 3.1015830, 0.40, 0.85, 0.60,
    ),
    (5, True, True): (
        0.6130029, 0.1938325, 0.9643346, 0.7751116, 0.9696740, 0.1493014, 0.1442483, 0.9971962, 0.3443680, 0.9997501,
        0.9997501, 3.6240654, 2.7967658, 0.55, 0.80, 0.10,
    ),
}  # fmt: skip


def score(*scenes, **options):
    metric = SimAgents(**options)
    for scene in scenes:
        metric.update(*scene)
    return metric.compute()


def close(one, other, tolerance=1e-12):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], atol=tolerance, rtol=0, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize(("seed", "gaps", "lights"), OFFICIAL)
def test_it_says_what_the_official_code_says(seed, gaps, lights):
    found = score(scene_and_states(seed, gaps=gaps, lights=lights))
    for name, expected in zip(NAMES, OFFICIAL[seed, gaps, lights], strict=True):
        assert found[name].item() == pytest.approx(expected, abs=1e-6), name


def test_the_years_agree_with_their_own_metric():
    scene = scene_and_states(1)
    both = score(scene)
    for challenge in (CHALLENGE_2023, CHALLENGE_2024, CHALLENGE_2025):
        own = score(scene, challenge=challenge)
        assert own["metametric"] == both[f"metametric_{challenge.year}"]
    assert both["metametric_2023"] != both["metametric_2024"] != both["metametric_2025"]


def test_replaying_a_clean_record_leaves_only_the_pseudocount():
    scene, _, index = scene_and_states(2, gaps=False, lights=False, agents=5)
    logged = torch.cat((scene.positions, scene.headings[..., None]), -1)[index, None, 11:].expand(-1, 32, -1, -1)
    far = scene._replace(sizes=scene.sizes * 0.05)  # boxes too small to touch
    found = score((far, logged.contiguous(), index))
    features = scene_features(far, logged, index)
    assert not features.collision_indication.any()
    assert found["collision_indication_likelihood"].item() == pytest.approx(0.99996875, abs=1e-8)
    assert found["traffic_light_violation_likelihood"].item() == pytest.approx(0.99996875, abs=1e-8)
    # The record is off the road always or never, and so is its replay.
    assert found["offroad_indication_likelihood"].item() == pytest.approx(0.99996875, abs=1e-8)
    assert found["average_displacement_error"] == 0
    assert found["min_future_displacement_error"] == 0


def test_displacement_errors_differ_by_the_history_in_the_denominator():
    scene, states, index = scene_and_states(3, gaps=False)
    found = score((scene, states, index))
    assert found["min_average_displacement_error"].item() == pytest.approx(
        found["min_future_displacement_error"].item() * 80 / 91, rel=1e-9
    )
    logged = torch.cat((scene.positions, scene.headings[..., None]), -1)[index, None, 11:]
    raised = logged.repeat(1, 2, 1, 1)
    raised[:, 0, :, 2] += 3  # heights count
    raised[:, 1, :, 0] += 4
    found = score((scene, raised, index))
    assert found["min_future_displacement_error"].item() == pytest.approx(3, abs=1e-3)
    assert found["average_displacement_error"].item() == pytest.approx(3.5 * 80 / 91, abs=1e-3)


def test_shards_reduce_to_one_update_in_any_order():
    scenes = [scene_and_states(seed) for seed in range(4)]
    whole = score(*scenes)
    close(whole, score(*reversed(scenes)))
    parts = [SimAgents(), SimAgents()]
    for place, scene in enumerate(scenes):
        parts[place % 2].update(*scene)
    merged = SimAgents()
    for name in merged._reductions:
        setattr(merged, name, sum(getattr(part, name) for part in parts))
    merged._update_count = 4
    close(whole, merged.compute())
    assert whole["scenarios"] == 4
    single = [score(scene)["metametric"].item() for scene in scenes]
    assert whole["metametric"].item() == pytest.approx(sum(single) / 4, abs=1e-12)


def test_reset_copies_and_pickles():
    metric = SimAgents()
    metric.update(*scene_and_states(0))
    first = metric.compute()
    close(first, pickle.loads(pickle.dumps(metric)).compute())
    other = copy.deepcopy(metric)
    other.reset()
    other.update(*scene_and_states(1))
    close(first, metric.compute())
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in first.values())


@pytest.mark.parametrize("parity", [True, False])
def test_the_order_of_agents_and_rollouts_is_nothing(parity):
    scene, states, index = scene_and_states(6)
    order = torch.randperm(len(index))
    plain = score((scene, states, index), parity=parity)
    close(plain, score((scene, states[order], index[order]), parity=parity), 1e-9)
    close(plain, score((scene, states[:, torch.tensor([2, 0, 3, 1])], index), parity=parity), 1e-9)


@pytest.mark.parametrize("parity", [True, False])
def test_agents_that_are_never_valid_pad_nothing(parity):
    scene, states, index = scene_and_states(6)
    wider = {
        name: torch.cat((getattr(scene, name), torch.full_like(getattr(scene, name)[:2], 0)))
        for name in ("agent_ids", "agent_types", "positions", "sizes", "headings", "velocities", "valid")
    }
    wider["agent_ids"][-2:] = torch.tensor([900, 901])
    padded = scene._replace(**wider)
    close(score((scene, states, index), parity=parity), score((padded, states, index), parity=parity))


def moved(scene, states, angle, shift):
    """The scene in float64, turned about its origin and shifted, and its states."""
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    plane = torch.tensor(shift, dtype=torch.float64)

    def move(points):
        points = points.double()
        return torch.cat((points[..., :2] @ turn + plane, points[..., 2:]), -1)

    scene = scene._replace(
        positions=move(scene.positions),
        headings=scene.headings.double() + angle,
        points=move(scene.points),
        light_stops=move(scene.light_stops),
    )
    return scene, torch.cat((move(states[..., :3]), states[..., 3:].double() + angle), -1)


def test_a_rigid_motion_changes_nothing_when_corrected():
    for seed in range(3):
        scene, states, index = scene_and_states(seed)
        still, turned = moved(scene, states, 0, (0, 0)), moved(scene, states, 2.1, (300, -200))
        first = scene_features(*still, index, parity=False)
        second = scene_features(*turned, index, parity=False)
        for name, one, other in zip(first._fields, first, second, strict=True):
            if one.dtype == torch.bool:
                assert torch.equal(one, other), name
            else:
                # Where the record is not valid its placeholder does not move along.
                seen = torch.ones_like(one, dtype=torch.bool)
                if one.shape[1] == 5:
                    seen[:, 0] = first.valid
                elif name == "displacement":
                    seen &= first.valid[:, None]
                torch.testing.assert_close(one[seen], other[seen], atol=1e-6, rtol=0, equal_nan=True, msg=name)
        close(score((*still, index), parity=False), score((*turned, index), parity=False), 1e-6)


def test_in_parity_only_rounding_of_the_coordinates_moves():
    scene, states, index = scene_and_states(4, gaps=False, lights=False)
    first = scene_features(scene, states, index)
    second = scene_features(*moved(scene, states, 0.4, (100, 50)), index)
    for name, tolerance in {
        "linear_speed": 5e-3,  # twice the rounding of 2.4e-4 m at 4 km over 0.2 s
        "angular_speed": 1e-4,
        "distance_to_nearest_object": 2e-3,
        "distance_to_road_edge": 2e-3,
        "displacement": 2e-3,
    }.items():
        one, other = getattr(first, name).double(), getattr(second, name)
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0, equal_nan=True, msg=name)


def test_corrected_is_another_score():
    scenes = [scene_and_states(seed) for seed in range(3)]
    official, corrected = score(*scenes), score(*scenes, parity=False)
    assert official["metametric"] != corrected["metametric"]
    assert all(0 < corrected[f"{name}_likelihood"] < 1 for name in COMPONENTS)


def without(scene, kinds):
    return scene._replace(
        feature_types=torch.where(torch.isin(scene.feature_types, torch.tensor(kinds)), 12, scene.feature_types)
    )


EDGES = [int(FeatureType.EDGE_BOUNDARY), int(FeatureType.EDGE_MEDIAN), int(FeatureType.EDGE_UNKNOWN)]


def test_a_scene_without_road_edges():
    scene, states, index = scene_and_states(1)
    bare = without(scene, EDGES)
    metric = SimAgents()
    with pytest.raises(ValueError, match=r"scenario made1: no road edges.*parity=False"):
        metric.update(bare, states, index)
    assert metric.scenarios == 0
    alone = score((bare, states, index), parity=False)
    assert alone["distance_to_road_edge_likelihood"].isnan()
    assert alone["simulated_offroad_rate"].isnan()
    assert 0 < alone["metametric"] < 1
    both = score((bare, states, index), (scene, states, index), parity=False)
    full = score((scene, states, index), parity=False)
    for name in ("distance_to_road_edge_likelihood", "offroad_indication_likelihood", "simulated_offroad_rate"):
        assert both[name] == full[name]  # the mean is over the scenes that have it


@pytest.mark.parametrize("parity", [True, False])
def test_a_scene_without_lanes_or_lights_has_no_violations(parity):
    scene, states, index = scene_and_states(1)
    dark = scene_and_states(1, lights=False)[0]
    for other in (without(scene, [int(FeatureType.LANE_SURFACE)]), dark):
        found = score((other, states, index), parity=parity)
        assert found["simulated_traffic_light_violation_rate"] == 0


def test_an_empty_map_and_one_agent():
    scene, _, _ = scene_and_states(0, agents=1, gaps=False, lights=False)
    empty = scene._replace(
        valid=torch.ones_like(scene.valid),
        feature_ids=scene.feature_ids[:0],
        feature_types=scene.feature_types[:0],
        feature_starts=torch.zeros(1, dtype=torch.int64),
        points=scene.points[:0],
    )
    states = torch.cat((scene.positions, scene.headings[..., None]), -1)[:, None, 11:]
    found = score((empty, states, torch.tensor([0])), parity=False)
    assert found["simulated_collision_rate"] == 0
    assert 0 < found["metametric"] < 1


def test_no_scored_vehicle_has_no_time_to_collision():
    scene, states, index = scene_and_states(1)
    walking = scene._replace(agent_types=torch.full_like(scene.agent_types, 2))
    with pytest.raises(ValueError, match=r"scenario made1: .*no valid value of time_to_collision"):
        score((walking, states, index))
    assert score((walking, states, index), parity=False)["time_to_collision_likelihood"].isnan()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scene, states, index: (scene, states[:, :, :79], index), r"made0: states must be .*79"),
        (lambda scene, states, index: (scene, states[..., :3], index), r"made0: states must be"),
        (lambda scene, states, index: (scene, states[:, :0], index), r"made0: states must be"),
        (lambda scene, states, index: (scene, states.half(), index), r"made0: .*float16"),
        (lambda scene, states, index: (scene, states, index[:-1]), r"made0: index"),
        (lambda scene, states, index: (scene, states[1:], index[1:]), r"made0: object 3 is missing"),
        (lambda scene, states, index: (scene, states, index.where(index != 2, 1)), r"made0: object 10 is given twice"),
        (lambda scene, states, index: (scene, states, index.where(index != 2, 8)), r"made0: object 59 .* not valid"),
        (lambda scene, states, index: (scene, states, index.where(index != 2, 50)), r"made0: index 50"),
        (
            lambda scene, states, index: (scene._replace(to_predict=torch.tensor([8])), states, index),
            r"made0: object 59 is to be scored, but",
        ),
        (
            lambda scene, states, index: (scene._replace(times=scene.times[:60]), states, index),
            r"made0: needs 80 steps .* has 49",
        ),
        (
            lambda scene, states, index: (scene, states.index_fill(0, torch.tensor([2]), math.nan), index),
            r"made0: object 17 has a state that is not finite",
        ),
        (
            lambda scene, states, index: (scene, states.index_fill(0, torch.tensor([1]), math.inf), index),
            r"made0: object 10 has a state that is not finite",
        ),
    ],
)
def test_refusals_name_scenario_and_object(change, message):
    metric = SimAgents()
    with pytest.raises(ValueError, match=message) as caught:
        metric.update(*change(*scene_and_states(0)))
    assert "\n" not in str(caught.value)
    assert metric.scenarios == 0


@pytest.mark.gpu
@pytest.mark.parametrize("parity", [True, False])
def test_a_gpu_says_the_same(parity):
    scene, states, index = scene_and_states(0)
    metric = SimAgents(parity=parity).cuda()
    metric.update(scene, states.double().cuda(), index.cuda())
    found = {name: value.cpu() for name, value in metric.compute().items()}
    close(score((scene, states.double(), index), parity=parity), found, 1e-6)


def _one_rank(rank, path, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    metric = SimAgents()
    for seed in range(rank, 3, 2):  # two scenes on one rank, one on the other
        metric.update(*scene_and_states(seed))
    results[rank] = {name: value.item() for name, value in metric.compute().items()}
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        ranks = [context.Process(target=_one_rank, args=(rank, tmp_path / "store", results)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(100)
            assert rank.exitcode == 0
        found = dict(results)
    whole = {name: value.item() for name, value in score(*(scene_and_states(seed) for seed in range(3))).items()}
    assert found[0] == found[1] == pytest.approx(whole, abs=1e-12)
