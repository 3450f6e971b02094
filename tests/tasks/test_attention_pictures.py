"""Pictures of attention in an evaluation: the agent that was asked for, keys where they are in the scene, or an error."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from datamodules.scene_batches import scene_batch
from datamodules.synthetic_scenes import synthetic_scene
from launch import register_resolvers
from tasks.attention_pictures import AttentionPictures

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
register_resolvers()
RADIUS = 25.0


@pytest.fixture(scope="module")
def batch():
    return scene_batch([synthetic_scene(3, agents=7), synthetic_scene(5, agents=12)])


@pytest.fixture(scope="module")
def task():
    radii = [f"model.agent_radius={RADIUS}", f"model.map_agent_radius={RADIUS}", "model.agent_layers=2"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=["task=trajectory", *radii])
    torch.manual_seed(0)
    return instantiate(cfg.task).eval()


def end_batch(callback, task, batch, rank=0):
    trainer = SimpleNamespace(is_global_zero=rank == 0)
    with torch.inference_mode():  # as the trainer evaluates
        callback.on_test_batch_end(trainer, task, {}, batch, 0)
        callback.on_validation_batch_end(trainer, task, {}, batch, batch_idx=1, dataloader_idx=0)


def test_the_first_scenes_are_drawn_once(task, batch, tmp_path, capsys):
    callback = AttentionPictures(tmp_path, scenes=3)
    end_batch(callback, task, batch)
    names = [f"{s.scenario_id}-attention-{int(s.agent_ids[s.sdc])}.png" for s in batch.scenes]
    assert [path.name for path in callback.drawn] == [*names, names[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert capsys.readouterr().out.count("attention: ") == 3
    end_batch(AttentionPictures(tmp_path / "none", scenes=0), task, batch)
    end_batch(AttentionPictures(tmp_path / "none"), task, batch, rank=1)
    assert not (tmp_path / "none").exists()


def test_keys_lie_where_they_are_in_the_scene(task, batch):
    """Which keys are seen follows from distances, so that a weight at the wrong place would show."""
    callback = AttentionPictures("unused", layer=0)
    hidden = 0
    for number, scene in enumerate(batch.scenes):
        for query in scene.simulated().tolist():
            here = scene.positions[query, scene.current, :2]
            pieces, agents = callback.keys(task, batch, number, query)
            others = scene.positions[scene.simulated(), scene.current, :2]
            far = (others - here).norm(dim=-1)
            if ((far - RADIUS).abs() < 0.5).any():  # tokens stand some centimetres beside the record
                continue
            hidden += int((far > RADIUS).sum())
            torch.testing.assert_close(agents.positions, others[far < RADIUS], rtol=0, atol=1e-5)
            # middles of pieces: up to half of 5 m farther than their starts
            assert (pieces.positions - here).norm(dim=-1).max() < RADIUS + 3
            lines = torch.cdist(pieces.positions, scene.points[:, :2].double()).min(-1).values
            assert lines.max() < 3  # on the map
            for kind in (pieces, agents):
                assert float(kind.weights.sum()) == pytest.approx(1, abs=1e-5)
    assert hidden > 10


def test_heads_and_layers(task, batch, tmp_path):
    query = batch.scenes[1].sdc

    def weights(**options):
        return AttentionPictures(tmp_path, **options).keys(task, batch, 1, query)[0].weights

    torch.testing.assert_close((weights(head=0) + weights(head=1)) / 2, weights())
    assert not torch.allclose(weights(head=0), weights(head=1))
    assert torch.equal(weights(layer=1), weights())
    assert not torch.allclose(weights(layer=0), weights())
    (name, _, _), _ = AttentionPictures(tmp_path, head=-1).keys(task, batch, 1, query)
    assert name == "map pieces, layer 1, head 1"


def test_any_agent_can_be_asked_for(task, batch, tmp_path):
    scene = batch.scenes[0]
    query = next(i for i in scene.simulated().tolist() if i != scene.sdc)
    callback = AttentionPictures(tmp_path, agent=int(scene.agent_ids[query]))
    end_batch(callback, task, batch)
    assert [path.name for path in callback.drawn] == [
        f"{scene.scenario_id}-attention-{int(scene.agent_ids[query])}.png"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agent": 98765}, "no object 98765 at the current step"),
        ({"layer": 2}, "layer=2, the model has 2"),
        ({"head": -3}, "head=-3, the model has 2"),
    ],
)
def test_what_is_not_there_is_named(task, batch, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        end_batch(AttentionPictures(tmp_path, **options), task, batch)
    assert not list(tmp_path.iterdir())


def test_an_agent_left_out_of_the_batch_is_named(task, batch):
    scene = batch.scenes[0]
    fewer = batch._replace(agent_index=torch.where(batch.agent_index == scene.sdc, -1, batch.agent_index))
    with pytest.raises(ValueError, match=f"object {int(scene.agent_ids[scene.sdc])} is not among the agents"):
        AttentionPictures("unused").keys(task, fewer, 0, scene.sdc)
