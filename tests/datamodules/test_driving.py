"""Scenes as batches: frames, caps, padding, scenes with little in them, and the loaders of the datamodule."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.utils.data import Dataset

from datamodules.driving import Driving
from datamodules.scene import AgentType
from datamodules.scene_batches import collate_scenes, scene_batch
from datamodules.scene_frames import SceneView, from_frame, to_frame, turned, view
from datamodules.scene_sources import SyntheticScenes, mixed
from datamodules.synthetic_scenes import synthetic_scene
from datamodules.windows import window, without_lights

PADDED = ("agent_pose", "agent_velocity", "agent_valid", "agent_trains", "agent_type", "agent_size", "agent_height")
MAP = ("map_pose", "map_points", "map_type", "map_light", "map_valid")


def moved(scene, angle, shift):
    """The scene turned by an angle, then shifted, in float64."""
    turn = torch.tensor(angle, dtype=torch.float64)

    def placed(points):
        flat = turned(points[..., :2].double(), turn) + torch.tensor(shift, dtype=torch.float64)
        return torch.cat((flat, points[..., 2:].double()), -1)

    return scene._replace(
        positions=torch.where(scene.valid[..., None], placed(scene.positions), 0.0),
        headings=torch.where(scene.valid, scene.headings.double() + angle, 0.0),
        velocities=turned(scene.velocities.double(), turn),
        points=placed(scene.points),
        light_stops=placed(scene.light_stops),
    )


def emptied(scene):
    return without_lights(
        scene._replace(
            feature_ids=scene.feature_ids[:0],
            feature_types=scene.feature_types[:0],
            feature_starts=scene.feature_starts[:1],
            points=scene.points[:0],
        )
    )


def same_heading(first, second, tolerance):
    difference = first - second
    assert difference.sin().abs().max() < tolerance
    assert difference.cos().min() > 1 - tolerance


@pytest.mark.parametrize("turns", [0, 2])
def test_a_rigid_motion_of_the_scene_leaves_the_canonical_batch_as_it_is(turns):
    scene = synthetic_scene(1, agents=24, turns=turns)
    before = scene_batch([scene])
    after = scene_batch([moved(scene, 2.5, (310.0, -120.0))])
    for name in PADDED + MAP:
        first, second = getattr(before, name), getattr(after, name)
        if name in ("agent_pose", "map_pose"):
            same_heading(first[..., 2], second[..., 2], 1e-5)
            first, second = first[..., :2], second[..., :2]
        # float32 of coordinates up to 300 m: 3e-5 is one unit in the last place.
        torch.testing.assert_close(first, second, atol=3.1e-5, rtol=0)
    assert before.agent_pose[0, -1, 10].abs().max() < 1e-6  # the self-driving car stands at the origin


def test_a_raw_frame_moves_with_the_scene():
    scene = synthetic_scene(1, agents=24)
    settings = SceneView(canonical=False, observed=None)
    before = scene_batch([scene], settings)
    after = scene_batch([moved(scene, 0.0, (50.0, 7.0))], settings)
    assert not before.frame.any()
    shift = (after.agent_pose - before.agent_pose)[before.agent_valid]
    torch.testing.assert_close(shift, torch.tensor([50.0, 7.0, 0.0]).expand_as(shift), atol=3.1e-5, rtol=0)
    torch.testing.assert_close(before.agent_pose[0, ..., 2], scene.headings)


def test_the_frame_leads_back_to_the_scene():
    scene = synthetic_scene(2, agents=16, turns=1)
    torch.manual_seed(3)
    batch = scene_batch([scene], SceneView(rotation=True, observed=None))
    assert abs(float(batch.frame[0, 2]) - float(scene.headings[scene.sdc, 10])) > 0.01
    back = from_frame(batch.agent_pose[0], batch.frame[0])
    seen = batch.agent_valid[0]
    torch.testing.assert_close(back[seen][:, :2].float(), scene.positions[seen][:, :2], atol=5e-5, rtol=0)
    torch.testing.assert_close(back[seen][:, 2].float(), scene.headings[seen], atol=1e-5, rtol=0)
    pose = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(from_frame(to_frame(pose, batch.frame[0]), batch.frame[0]), pose)
    speed = batch.agent_velocity[0].norm(dim=-1)
    torch.testing.assert_close(speed, scene.velocities.norm(dim=-1))


def test_scenes_of_a_batch_are_the_scenes_one_by_one():
    scenes = [synthetic_scene(seed, agents=count) for seed, count in ((0, 3), (1, 40), (2, 1))]
    scenes[2] = emptied(scenes[2])
    batch = scene_batch(scenes)
    assert batch.agent_pose.shape[:2] == (3, 40)
    for row, scene in enumerate(scenes):
        alone = scene_batch([scene])
        agents = len(scene.simulated())
        for name in (*PADDED, "agent_index"):
            assert torch.equal(getattr(batch, name)[row, :agents], getattr(alone, name)[0])
            assert (getattr(batch, name)[row, agents:] == (-1 if name == "agent_index" else 0)).all()
        pieces = int(alone.map_valid.sum())
        for name in MAP:
            assert torch.equal(getattr(batch, name)[row, :pieces], getattr(alone, name)[0, :pieces])
            assert not getattr(batch, name)[row, pieces:].any()
        assert batch.scenes[row] is scene
    assert batch.agent_index[1].tolist() == scenes[1].simulated().tolist()
    assert not batch.map_valid[2].any()
    assert batch.map_valid[1].any()


def test_an_agent_born_at_the_current_step_is_shown_and_one_born_after_is_not():
    scene = synthetic_scene(0, agents=6, gaps=0)
    valid = scene.valid.clone()
    valid[0, :10], valid[1, :11] = False, False
    scene = scene._replace(valid=valid)
    batch = scene_batch([scene])
    assert batch.agent_index.tolist() == [[0, 2, 3, 4, 5]]
    assert batch.agent_valid[0, 0, :11].tolist() == [False] * 10 + [True]
    assert not batch.agent_pose[0, 0, :10].any()
    assert batch.agent_pose[0, 0, 10].any()


def test_types():
    scene = synthetic_scene(0, agents=6)
    scene = scene._replace(agent_types=torch.tensor([0, 1, 2, 3, 4, 1]))
    assert scene_batch([scene]).agent_type.tolist() == [[0, 0, 1, 2, 0, 0]]
    assert AgentType.OTHER == 4


def test_what_counts_in_the_loss():
    scene = synthetic_scene(7, agents=120, gaps=0)
    distance = (scene.positions[:, 10, :2] - scene.positions[scene.sdc, 10, :2]).norm(dim=-1)
    roles = torch.zeros(120, dtype=torch.bool)
    roles[scene.scored()] = True
    valid = scene.valid.clone()
    late = int(torch.where(roles | (distance > 120), torch.inf, distance).argmin())
    valid[late, 15:] = False  # four valid future steps
    scene = scene._replace(valid=valid)
    seen = view(scene, SceneView(observed=None, trained=120.0, most_trained=20))
    assert seen.agent_trains.sum() == 20
    assert seen.agent_trains[roles].all()
    assert not seen.agent_trains[late]
    others = seen.agent_trains & ~roles
    within = (distance < 120) & ~roles & (scene.valid[:, 11:].sum(1) >= 5)
    assert distance[others].max() < distance[within & ~others].min()
    all_of_them = view(scene, SceneView(observed=None, trained=120.0, most_trained=1000)).agent_trains
    assert torch.equal(all_of_them, within | roles)


def test_states_out_of_sight_are_dropped():
    scene = synthetic_scene(7, agents=120)
    seen = view(scene, SceneView(observed=80.0))
    far = seen.agent_pose[..., :2].norm(dim=-1)
    assert far[seen.agent_valid].max() <= 80.001
    assert len(seen.agent_index) < 120
    assert seen.agent_valid.sum() < scene.valid[seen.agent_index].sum()
    assert not seen.agent_pose[~seen.agent_valid].any()


def test_the_cap_keeps_the_nearest_and_those_with_a_role():
    scene = synthetic_scene(7, agents=120)
    distance = (scene.positions[:, 10, :2] - scene.positions[scene.sdc, 10, :2]).norm(dim=-1)
    farthest = distance.argmax()
    scene = scene._replace(to_predict=farthest[None], difficulties=torch.ones(1, dtype=torch.int64))
    with pytest.warns(UserWarning, match="max_agents=20"):
        seen = view(scene, SceneView(observed=None, max_agents=20))
    assert len(seen.agent_index) == 20
    assert farthest in seen.agent_index
    assert scene.sdc in seen.agent_index
    kept = torch.zeros(120, dtype=torch.bool)
    kept[seen.agent_index] = True
    kept[scene.of_interest] = True
    without_roles = kept.clone()
    without_roles[torch.cat((scene.scored(), scene.of_interest))] = False
    assert distance[without_roles].max() <= distance[~kept].min()
    with pytest.raises(ValueError, match=r"synthetic-7: 120 agents.*max_agents is 20; raise it"):
        view(scene, SceneView(observed=None, max_agents=20, drop_agents=False))
    with pytest.raises(ValueError, match="with a role, and max_agents is 1"):
        view(scene, SceneView(observed=None, max_agents=1))


def test_the_cap_keeps_the_pieces_nearest_to_agents():
    scene = synthetic_scene(3, agents=2)
    everything, some = view(scene, SceneView()), view(scene, SceneView(max_pieces=50))
    agents = everything.agent_pose[:, 10, :2]
    nearest = torch.cdist(everything.map_pose[:, :2], agents).amin(1).sort().values
    kept = torch.cdist(some.map_pose[:, :2], agents).amin(1).sort().values
    torch.testing.assert_close(kept, nearest[:50], atol=1e-3, rtol=0)
    order = [everything.map_pose.tolist().index(pose) for pose in some.map_pose.tolist()]
    assert order == sorted(order)


def test_bad_scenes_are_named():
    scene = synthetic_scene(0, agents=3)
    unseen = scene.valid.clone()
    unseen[scene.sdc, 10] = False
    with pytest.raises(ValueError, match="synthetic-0: its self-driving car, agent 102, is not valid"):
        scene_batch([scene._replace(valid=unseen)])
    velocities = scene.velocities.clone()
    velocities[1, 20] = math.nan
    valid = scene.valid.clone()
    valid[1, 20] = True
    with pytest.raises(ValueError, match=r"synthetic-0: agent 101 .*not finite at step 20"):
        scene_batch([scene._replace(velocities=velocities, valid=valid)])
    valid[1, 20] = False
    assert scene_batch([scene._replace(velocities=velocities, valid=valid)]).agent_velocity.isfinite().all()
    with pytest.raises(ValueError, match=r"synthetic-0@5 has 50 steps.*synthetic-0 in the same batch has 91"):
        collate_scenes([view(scene, SceneView()), view(window(scene, 5, 50), SceneView())])


def driving(**others):
    options = {"batch_size": 3, "max_agents": 12, "max_pieces": 64, **others}
    train = partial(SyntheticScenes, 8, 0, (4, 20))
    held_out = partial(SyntheticScenes, 7, 1000, (4, 20))
    return Driving(train, held_out, held_out, **options)


def test_held_out_batches_hold_every_agent_and_training_is_capped():
    data = driving(repeats=3)
    data.setup()
    train, held_out = list(data.train_dataloader()), list(data.val_dataloader())
    assert len(train) == 8
    assert sum(len(batch.scenes) for batch in held_out) == 7
    assert max(batch.agent_pose.shape[1] for batch in train) == 12
    for batch in held_out:
        for row, scene in enumerate(batch.scenes):
            index = batch.agent_index[row]
            assert torch.equal(index[index >= 0], scene.simulated())
    names = [scene.scenario_id for batch in train for scene in batch.scenes]
    assert {names.count(name) for name in set(names)} == {3}
    assert len(set(names)) == 8


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_held_out_scenes_exactly(world, monkeypatch):
    seen = []
    for rank in range(world):
        data = driving()
        monkeypatch.setattr(data, "_rank_and_world", lambda rank=rank: (rank, world))
        data.setup("test")
        seen += [scene.scenario_id for batch in data.test_dataloader() for scene in batch.scenes]
    assert sorted(seen) == sorted(f"synthetic-{seed}" for seed in range(1000, 1007))


def test_fewer_held_out_scenes_than_ranks_are_refused_by_all(monkeypatch):
    for rank in (0, 7):
        data = driving()
        monkeypatch.setattr(data, "_rank_and_world", lambda rank=rank: (rank, 8))
        data.setup("validate")
        with pytest.raises(ValueError, match=r"datamodule\.val: 7 scenes for 8 ranks"):
            data.val_dataloader()


def test_an_interrupted_epoch_goes_on():
    def names(batches):
        return [[scene.scenario_id for scene in batch.scenes] for batch in batches]

    def loader():
        data = driving(repeats=2)
        data.setup("fit")
        return data.train_dataloader()

    whole = names(loader())
    first = loader()
    iterator = iter(first)
    begun = names([next(iterator), next(iterator)])
    resumed = loader()
    resumed.load_state_dict(first.state_dict())
    assert begun + names(resumed) == whole


def test_workers_read_the_same_scenes():
    data, alone = driving(num_workers=1), driving()
    for each in (data, alone):
        each.setup("validate")
    for first, second in zip(data.val_dataloader(), alone.val_dataloader(), strict=True):
        assert torch.equal(first.agent_pose, second.agent_pose)
        assert torch.equal(first.map_pose, second.map_pose)


class Nothing(Dataset):
    def __len__(self):
        return 0


def test_sources_mix_and_too_few_scenes_are_refused():
    both = mixed([partial(SyntheticScenes, 2, 10), partial(SyntheticScenes, 3, 20)])
    names = [both[index].scenario_id for index in range(len(both))]
    assert names == ["synthetic-10", "synthetic-11", "synthetic-20", "synthetic-21", "synthetic-22"]
    data = driving(batch_size=9)
    data.setup()
    with pytest.raises(ValueError, match=r"8 training scenes make no batch of 9.*repeats"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"datamodule\.train"):
        Driving(Nothing, Nothing, Nothing).setup("fit")


def test_stretching_multiplies_distances_and_speeds_alone():
    scene = synthetic_scene(1, agents=24)
    plain, stretched = view(scene, SceneView()), view(scene, SceneView(stretch=2.0))
    factor = float(stretched.agent_velocity.norm() / plain.agent_velocity.norm())
    assert 0.5 <= factor <= 2
    assert abs(factor - 1) > 1e-3
    scale = torch.tensor([factor, factor, 1.0])
    torch.testing.assert_close(stretched.agent_pose, plain.agent_pose * scale, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stretched.map_pose, plain.map_pose * scale, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stretched.map_points, plain.map_points * factor, rtol=1e-5, atol=1e-5)
    assert torch.equal(stretched.agent_size, plain.agent_size)


def test_held_out_scenes_are_never_stretched_or_turned():
    source = partial(SyntheticScenes, count=2, agents=4)
    driving = Driving(source, source, source, rotation=True, stretch=2.0)
    assert driving.held_out_view.stretch == 1.0
    assert not driving.held_out_view.rotation
    with pytest.raises(ValueError, match=r"stretch is 0\.5"):
        Driving(source, source, source, stretch=0.5)
