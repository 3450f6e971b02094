"""The trajectory task: losses, closed loop, frames, and the policies that it is scored beside."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

from datamodules.scene_batches import scene_batch
from datamodules.synthetic_scenes import synthetic_scene
from launch import register_resolvers
from tasks.trajectory import Simulated, in_scenes, map_tokens, states_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
POS = sorted(path.stem for path in (CONFIGS / "pos").glob("*.yaml"))
HEADS = sorted(path.stem for path in (CONFIGS / "head").glob("*.yaml"))
register_resolvers()


def made(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=["task=trajectory", "threads=1", *overrides], return_hydra_config=True)
    cfg.hydra.runtime.output_dir = "outputs/test"
    HydraConfig.instance().set_config(cfg)
    pl.seed_everything(0, verbose=False)
    return instantiate(cfg.task)


@pytest.fixture(scope="module")
def scenes():
    return [synthetic_scene(seed, agents=agents) for seed, agents in ((1, 6), (2, 9))]


@pytest.fixture(scope="module")
def batch(scenes):
    return scene_batch(scenes)


def test_recorded_poses_come_back_in_the_coordinates_of_their_scene(scenes, batch):
    recorded = batch.agent_pose[:, :, 11:][:, :, None]  # (b, a, 1, 80, 3)
    for scene, (same, states, index) in zip(scenes, in_scenes(batch, recorded), strict=True):
        assert same.scenario_id == scene.scenario_id
        assert index.tolist() == scene.simulated().tolist()
        seen = scene.valid[index, 11:]
        torch.testing.assert_close(states[:, 0, :, :2][seen], scene.positions[index, 11:, :2][seen], rtol=0, atol=1e-3)
        turn = states[:, 0, :, 3][seen] - scene.headings[index, 11:][seen]
        assert (torch.remainder(turn + 0.5, 2 * torch.pi) - 0.5).abs().max() < 1e-4
        assert torch.equal(states[:, 0, 0, 2], scene.positions[index, scene.current, 2])
        assert states[..., 3].min() >= -torch.pi
        assert states[..., 3].max() < torch.pi


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("closed_loop", ["null", "8"])
def test_training_steps_have_finite_gradients(batch, head, closed_loop):
    task = made(f"head={head}", f"task.closed_loop={closed_loop}")
    task.on_fit_start = lambda: None
    loss = task.negative_log_likelihood(batch)
    loss.backward()
    assert loss.isfinite()
    gradients = [p.grad for p in task.parameters() if p.grad is not None]
    assert len(gradients) > 20
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("pos", POS)
def test_every_way_of_entering_poses_learns(batch, pos):
    task = made(f"pos={pos}")
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = task.negative_log_likelihood(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_batch_counts_tokens_not_scenes(scenes):
    task = made().eval()
    both, alone = scene_batch(scenes), [scene_batch([scene]) for scene in scenes]

    def counted(batch):
        found = task.tokens(batch)
        return int((found.tokens.valid & found.target_valid & batch.agent_trains[..., None]).sum())

    with torch.no_grad():
        mean = sum(task.negative_log_likelihood(b) * counted(b) for b in alone) / sum(map(counted, alone))
        torch.testing.assert_close(task.negative_log_likelihood(both), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_that_of_all_tokens_where_they_count(batch, head):
    """Value and gradient, against every token predicted and its loss masked afterwards."""
    task = made(f"head={head}").train()
    found = task.tokens(batch)
    each = task.model.head.loss(
        task.model(found.tokens, map_tokens(batch)), states_of(found.tokens), found.futures, task.smoothing
    )
    counted = found.tokens.valid & found.target_valid & batch.agent_trains[..., None]
    plain = torch.where(counted, each, 0.0).sum() / counted.sum()
    parameters = [p for p in task.parameters() if p.requires_grad]
    loss = task.negative_log_likelihood(batch)
    torch.testing.assert_close(loss, plain)
    expected = torch.autograd.grad(plain, parameters, allow_unused=True)
    for actual, want in zip(torch.autograd.grad(loss, parameters, allow_unused=True), expected, strict=True):
        if want is not None:  # float32: sums in another order
            torch.testing.assert_close(actual, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()) + 1e-7)


def test_a_batch_in_which_nobody_trains_costs_nothing(batch):
    task = made()
    loss = task.negative_log_likelihood(batch._replace(agent_trains=torch.zeros_like(batch.agent_trains)))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in task.parameters())


def test_following_all_actions_stays_at_the_record(batch):
    """With every action allowed, closest-to-truth unrolls what tokenising matched: both losses agree."""
    task = made("task.closed_loop=100000").eval()
    recorded = task.tokens(batch)
    followed = task.followed(batch, recorded)
    whole = (recorded.tokens.valid.all(-1) & recorded.target_valid[..., :-1].all(-1))[..., None, None]
    assert whole.any()
    difference = torch.where(whole, followed.pose - recorded.tokens.pose, 0)[..., :2]
    assert difference.abs().max() < 1e-3


def test_the_future_is_not_read_by_a_simulation(batch):
    task = made("task.rollouts=2").eval()
    scrambled = batch._replace(
        agent_pose=torch.cat((batch.agent_pose[:, :, :11], 100 * torch.randn_like(batch.agent_pose[:, :, 11:])), dim=2),
        agent_velocity=torch.cat((batch.agent_velocity[:, :, :11], batch.agent_velocity[:, :, 11:].flip(2)), dim=2),
        agent_valid=torch.cat((batch.agent_valid[:, :, :11], ~batch.agent_valid[:, :, 11:]), dim=2),
    )
    for one, other in zip(task.simulate(batch), task.simulate(scrambled), strict=True):
        assert torch.equal(one.states, other.states)


def test_log_replay_is_without_error_beside_the_model(batch):
    task = made("task.rollouts=6").eval()
    task.evaluate_at()
    task.measure(batch)
    scores = {name: policy.compute() for name, policy in task.policies.items()}
    assert scores["log_replay"]["min_ade"] < 1e-5
    assert 0 < scores["constant_velocity"]["min_ade"] < scores["model"]["min_ade"]  # untrained
    for found in scores.values():
        assert found["scenarios"] == len(batch.scenes)
        assert 0 < found["metametric"] < 1
    assert [s.scene.scenario_id for s in task.simulated] == [s.scenario_id for s in batch.scenes]
    assert all(isinstance(s, Simulated) and s.states.shape[1:] == (6, 80, 4) for s in task.simulated)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["token", "kinematic"])
def test_one_scene_is_learned_by_heart(head):
    """Cross entropy falls below a fifth of its start within 200 steps."""
    task = made(f"head={head}", "task.smoothing=0.0")
    batch = scene_batch([synthetic_scene(5, agents=8)])
    (optimizer,) = [task.make_optimizer(task.parameter_groups())]
    start = float(task.negative_log_likelihood(batch))
    for _ in range(200):
        optimizer.zero_grad()
        loss = task.negative_log_likelihood(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 0.5)
        optimizer.step()
        if float(loss) < 0.2 * start:
            break
    assert float(task.negative_log_likelihood(batch)) < 0.25 * start
    assert float(loss) < 0.2 * start
