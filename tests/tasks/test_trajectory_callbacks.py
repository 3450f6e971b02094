"""Callbacks of an evaluation: what they log of which split, and for how many ranks."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from datamodules.scene_batches import scene_batch
from datamodules.synthetic_scenes import synthetic_scene
from launch import register_resolvers
from tasks.attention_pictures import AttentionPictures
from tasks.fully_shard import FullyShard
from tasks.trajectory_callbacks import FrameProbe, SceneCost

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
register_resolvers()


@pytest.fixture(scope="module")
def batch():
    return scene_batch([synthetic_scene(3, agents=4), synthetic_scene(5, agents=6)])


@pytest.fixture
def logged(monkeypatch):
    """A task, and what it is asked to log: name → (value, arguments)."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=["task=trajectory", "task.rollouts=2", "pos=rope"])
    torch.manual_seed(0)
    task, found = instantiate(cfg.task).eval(), {}
    monkeypatch.setattr(task, "log", lambda name, value, **given: found.update({name: (float(value), given)}))
    monkeypatch.setattr(
        task, "log_dict", lambda values, **given: found.update({k: (v, given) for k, v in values.items()})
    )
    return task, found


def end_batch(callback, task, batch, split, number=0):
    with torch.inference_mode():  # as the trainer evaluates
        getattr(callback, f"on_{split}_batch_end")(None, task, {}, batch, number)


@pytest.mark.parametrize(("split", "stage"), [("test", "test"), ("validation", "val")])
def test_poses_written_otherwise_are_probed_on_either_split(logged, batch, split, stage):
    task, found = logged
    end_batch(FrameProbe(), task, batch, split)
    assert found.keys() == {f"{stage}/model/loss_whole_turns", f"{stage}/model/loss_half_turned_frame"}
    plain = float(task.negative_log_likelihood(batch).detach())
    for value, given in found.values():
        assert abs(value - plain) > 1e-4  # pos=rope notices both
        assert given["sync_dist"]  # a mean over the scenes of all ranks, as the loss beside it
        assert given["batch_size"] == 2


@pytest.mark.parametrize(("split", "stage"), [("test", "test"), ("validation", "val")])
def test_the_first_batch_tells_what_a_scene_costs(logged, batch, split, stage):
    task, found = logged
    end_batch(SceneCost(), task, batch, split, 1)
    assert not found
    end_batch(SceneCost(), task, batch, split)
    assert found.keys() == {f"{stage}/model/{name}" for name in ("saved_bytes", "train_step_s", "rollout_step_ms")}
    assert all(value > 0 for value, _ in found.values())
    assert all(p.grad is None for p in task.parameters())


def test_attention_of_sharded_weights_is_refused(tmp_path):
    class Trainer:
        strategy = FullyShard()

    AttentionPictures(tmp_path, scenes=0).setup(Trainer(), None, "test")
    with pytest.raises(ValueError, match=r"evaluation\.callbacks\.attention\.scenes.*use trainer=ddp"):
        AttentionPictures(tmp_path, scenes=1).setup(Trainer(), None, "test")
