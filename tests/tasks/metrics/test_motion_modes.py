"""Futures chosen among rollouts: clusters get their share of the votes, and what is chosen really happened."""

import pytest
import torch

from datamodules.synthetic_scenes import synthetic_scene
from tasks.metrics.motion_forecasting import MotionForecasting
from tasks.metrics.motion_modes import choose_modes, predictions_from_rollouts, predictions_of_scene
from tasks.metrics.motion_tracks import MotionTracks


def clusters(sizes, spread=0.3):
    """(r, 1, 2) ends around points 20 m apart, as many around each as `sizes` says."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.tensor([[20.0 * place, 5.0] for place, size in enumerate(sizes) for _ in range(size)])
    ends = centres + spread * (torch.rand(centres.shape, generator=generator) - 0.5)
    return ends[:, None], [place for place, size in enumerate(sizes) for _ in range(size)]


def test_clusters_get_their_share():
    ends, labels = clusters((9, 3, 14, 6))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    picked, shares = choose_modes(ends[order], modes=4)
    assert [labels[order[index]] for index in picked.tolist()] == [2, 0, 3, 1]
    assert shares.tolist() == [14 / 32, 9 / 32, 6 / 32, 3 / 32]


def test_spare_modes_go_to_the_farthest():
    ends, labels = clusters((30, 2), spread=1.0)
    picked, shares = choose_modes(ends, modes=6)
    assert len(set(picked.tolist())) == 6
    assert {labels[index] for index in picked.tolist()} == {0, 1}
    assert float(shares.sum()) == pytest.approx(1)
    distance = (ends[picked, 0] - ends[picked[0], 0]).norm(dim=-1)
    assert float(distance[1:].min()) > 0.2, "a spare future repeats one already chosen"


def test_moving_the_scene_changes_nothing():
    ends, _ = clusters((9, 3, 14, 6), spread=3.0)
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    first, second = choose_modes(ends), choose_modes(ends @ turn + 100)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_predictions_are_rollouts():
    states = torch.randn(5, 32, 80, 4, generator=torch.Generator().manual_seed(0)).cumsum(2)
    rows = torch.tensor([[4, -1], [1, 3]])
    agents = torch.tensor([[7, -1], [2, 5]])
    found = predictions_from_rollouts(states, rows, agents)
    assert found.trajectories.shape == (2, 6, 2, 16, 2)
    assert torch.equal(found.agents, agents)
    assert found.confidences.sum(1).tolist() == pytest.approx([1, 1])
    for group, mode in ((0, 0), (1, 3)):
        sampled = states[:, :, 4::5, :2]
        joint = [found.trajectories[group, mode, place] for place in range(2) if rows[group, place] >= 0]
        same = [
            rollout
            for rollout in range(32)
            if all(
                torch.equal(sampled[row, rollout], path)
                for row, path in zip(rows[group][rows[group] >= 0].tolist(), joint, strict=True)
            )
        ]
        assert len(same) == 1, "the agents of a group must come from one rollout"
    assert not found.trajectories[0, :, 1].any()


@pytest.mark.parametrize(
    ("states", "rows", "message"),
    [
        (torch.zeros(2, 32, 79, 4), torch.tensor([[0]]), "80"),
        (torch.zeros(2, 5, 80, 4), torch.tensor([[0]]), "6 futures can't be chosen among 5"),
        (torch.zeros(2, 32, 80, 4), torch.tensor([[2]]), "2 is no row"),
        (torch.zeros(2, 32, 80, 4), torch.tensor([[0, -1]]), "same groups"),
    ],
)
def test_bad_input_is_named(states, rows, message):
    agents = rows if message != "same groups" else torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match=message):
        predictions_from_rollouts(states, rows, agents)


@pytest.mark.parametrize("joint", [False, True])
def test_replayed_record_has_no_error(joint):
    scene = synthetic_scene(0, agents=12, gaps=0.0)
    index = scene.simulated().flip(0)
    future = slice(scene.current + 1, None)
    record = torch.cat((scene.positions[index, future], scene.headings[index, future, None]), -1)
    states = record[:, None].repeat(1, 32, 1, 1)
    states[:, 8:, :, 0] += 50.0  # a quarter of the rollouts is right
    prediction = predictions_of_scene(scene, states, index, joint)
    assert prediction.agents.shape == ((1, len(scene.to_predict)) if joint else (len(scene.to_predict), 1))
    assert prediction.confidences[:, :2].tolist() == [[0.75, 0.25]] * len(prediction.agents)
    metric = MotionForecasting()
    metric.update(prediction, MotionTracks.from_scene(scene))
    found = metric.compute()
    assert float(found["min_ade"]) == 0
    assert float(found["min_fde"]) == 0
    assert float(found["miss_rate"]) == 0
    metric = MotionForecasting()
    metric.update(prediction._replace(trajectories=prediction.trajectories[:, :1], confidences=prediction.confidences[:, :1]),
                  MotionTracks.from_scene(scene))  # fmt: skip
    assert float(metric.compute()["min_ade"]) == pytest.approx(50, abs=1e-4)
    assert float(metric.compute()["miss_rate"]) == 1
    keep = index != scene.to_predict[0]
    with pytest.raises(ValueError, match=rf"object {int(scene.agent_ids[scene.to_predict[0]])} is to be predicted"):
        predictions_of_scene(scene, states[keep], index[keep], joint)


def test_scene_too_short():
    scene = synthetic_scene(0, agents=2)._replace(current=11)
    with pytest.raises(ValueError, match=f"scenario {scene.scenario_id}: 79 steps"):
        MotionTracks.from_scene(scene)
