"""Driving as a whole: a moved recording, what a simulation hands over, half precision, other devices, scenes without a map."""

import math
import time

import pytest
import torch
from agent_cases import agent_model, pieces
from safetensors.torch import save_file

import models.agents
from datamodules.embedded_scenes import load_embedded
from datamodules.embedded_source import SourceError
from datamodules.scene import Scene
from datamodules.scene_batches import scene_batch
from datamodules.scene_frames import SceneView
from datamodules.synthetic_scenes import synthetic_scene
from datamodules.windows import MostTravelled, window
from models.agent_tokens import MotionState
from models.kinematic_head import KinematicHead
from models.near_blocks import blocks_within
from models.poses import compose, wrap
from models.rollout import rollout
from models.tokenise import tokenise
from models.vocabulary import load
from rotary.frequencies import Directional
from tasks.baselines import constant_velocity, log_replay
from tasks.metrics.sim_agents import SimAgents
from tasks.trajectory import in_scenes, map_tokens

WINDOW = 11  # steps that a simulation sees


def simulated(model, batch, rollouts=3, steps=16):
    """Rollouts in float64, in the frames of the batch."""
    batch = batch._replace(
        **{k: v.double() for k, v in batch._asdict().items() if torch.is_tensor(v) and v.is_floating_point()}
    )
    now = (batch.agent_pose[:, :, :WINDOW], batch.agent_velocity[:, :, :WINDOW], batch.agent_valid[:, :, :WINDOW])
    history = tokenise(model.head, *now, batch.agent_type, batch.agent_size).tokens
    names = [scene.scenario_id for scene in batch.scenes]
    return rollout(model, history, map_tokens(batch), scenario_ids=names, rollouts=range(rollouts), steps=steps).poses


def moved(scene, angle, shift):
    """The scene turned, then shifted; in float64, and so not rounded."""
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)

    def placed(points):
        flat = points[..., :2].double() @ turn + torch.tensor(shift, dtype=torch.float64)
        return torch.cat((flat, points[..., 2:].double()), -1)

    return scene._replace(
        positions=torch.where(scene.valid[..., None], placed(scene.positions), 0.0),
        headings=torch.where(scene.valid, scene.headings.double() + angle, 0.0),
        velocities=scene.velocities.double() @ turn,
        points=placed(scene.points),
        light_stops=placed(scene.light_stops),
    )


@pytest.mark.parametrize(("canonical", "angle", "moves"), [(True, 2.1, True), (False, 0.0, True), (False, 2.1, False)])
def test_a_moved_recording_moves_its_simulation(canonical, angle, moves):
    """With equal random numbers: in the car's frame by any rigid motion, in the recording's by shifts alone."""
    scene, shift = synthetic_scene(4, agents=8), (64.0, -32.0)
    model = agent_model("drope_intra")
    view = SceneView(canonical=canonical, observed=None)
    first, second = (scene_batch([each], view) for each in (scene, moved(scene, angle, shift)))
    poses = [compose(b.frame[:, None, None, None], simulated(model, b)) for b in (first, second)]
    motion = torch.tensor([*shift, angle], dtype=torch.float64)
    apart = poses[1] - compose(motion, poses[0])
    worst = float(max(apart[..., :2].abs().max(), wrap(apart[..., 2]).abs().max()))
    # a batch is float32: in the car's frame the same numbers, of coordinates of the recording the last place is lost
    assert (worst < (1e-6 if canonical else 3e-5)) is moves
    assert moves or worst > 0.1
    spread = poses[0][:, :, 0] - poses[0][:, :, 1]
    assert spread[..., :2].abs().max() > 1


def test_a_simulation_has_the_shape_that_the_rules_ask_for():
    """32 rollouts of 80 steps of every agent that is there, at the height of the current step, headings in [−π, π)."""
    scenes = [synthetic_scene(seed, agents=agents, turns=1) for seed, agents in ((1, 3), (2, 7))]
    batch = scene_batch(scenes)
    poses = simulated(agent_model(head="kinematic"), batch, rollouts=32)
    for scene, (same, states, index) in zip(scenes, in_scenes(batch, poses), strict=True):
        assert same is scene
        assert torch.equal(index, scene.simulated())
        assert states.shape == (len(index), 32, 80, 4)
        assert states.isfinite().all()
        assert torch.equal(states[..., 2], scene.positions[index, scene.current, 2, None, None].expand(-1, 32, 80))
        assert states[..., 3].min() >= -math.pi
        assert states[..., 3].max() < math.pi
        start = scene.positions[index, scene.current, :2]
        assert (states[:, :, 0, :2] - start[:, None]).norm(dim=-1).max() < 6  # metres in 0.1 s


@pytest.mark.parametrize("drive", [constant_velocity, log_replay])
def test_baselines_stay_on_the_device_of_their_scene(drive, monkeypatch):
    """On a device that holds shapes alone, which refuses to mix with the CPU's tensors as any other does."""
    scene = synthetic_scene(1, agents=4)
    index = scene.simulated().to("meta")
    monkeypatch.setattr(Scene, "simulated", lambda scene: index)  # its length depends on values
    away = scene._replace(**{k: v.to("meta") for k, v in scene._asdict().items() if torch.is_tensor(v)})
    states, agents = drive(away, 3)
    assert states.shape == (len(index), 3, 80, 4)
    assert states.device.type == agents.device.type == "meta"


def test_autocast_changes_no_kinematic_target():
    """Controls are found in full precision: half precision has the speed of the record wrong by a bin."""
    generator = torch.Generator().manual_seed(0)
    head, n = KinematicHead(8), 500
    speed = 25 * torch.rand(n, generator=generator)
    state = MotionState(torch.zeros(n, 3), speed, torch.zeros(n, dtype=torch.long), torch.ones(n, 3))
    action = torch.randint(0, 31 * 31, (n,), generator=generator)
    motion, _ = head.advance(state, action)
    expected = head.nearest(state, motion)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.nearest(state, motion), expected)


@pytest.fixture
def no_luck():
    """Memory that isn't written holds the worst of values."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("no_luck")
def test_a_first_scene_without_a_map_beside_one_with_a_large_map(monkeypatch):
    model, used = agent_model("drope_intra", "model.map_radius=15"), []
    valid = torch.zeros(2, 200, dtype=torch.bool)
    valid[1] = True
    both = pieces(200, spread=150.0)._replace(valid=valid)

    def counted(*args):
        used.append(blocks_within(*args))
        return used[-1]

    monkeypatch.setattr(models.agents, "blocks_within", counted)
    blocked = model.encode_map(both).hidden
    assert used[0] is not None
    assert not used[0].real.all()
    monkeypatch.setattr(models.agents, "blocks_within", lambda *args: None)
    torch.testing.assert_close(blocked[1], model.encode_map(both).hidden[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wavelengths": (0, 800)}, "wavelengths must be positive and ascending, got 0 and 800"),
        ({"wavelengths": (800, 4)}, "got 800 and 4"),
        ({"base": 100, "heading_share": 1.5}, r"heading_share=1\.5"),
        ({"base": 100, "heading_heads": 1.5}, r"heading_heads=1\.5"),
    ],
)
def test_frequencies_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Directional(**settings)(8, 4)


@pytest.mark.parametrize(
    ("name", "value"), [("counts", '"many"'), ("counts", "[4, 4.5, 4]"), ("tolerances", "0.05"), ("tolerances", "[]")]
)
def test_a_vocabulary_with_odd_metadata_is_named(name, value, tmp_path):
    path = tmp_path / "odd.safetensors"
    metadata = {"format": "1", "counts": "[4, 4, 4]", "tolerances": "[0.05, 0.05, 0.05]", name: value}
    save_file({"motions": torch.zeros(3, 4, 5, 3)}, path, metadata)
    with pytest.raises(ValueError, match=rf"odd\.safetensors: {name} are .*, expected 3 numbers"):
        load(path)


@pytest.mark.slow
def test_a_crowded_recording_is_scored_in_seconds():
    """The second recording with 32 rollouts: the official code takes minutes."""
    try:
        recording = load_embedded()[1]
    except SourceError as error:
        pytest.skip(f"embedded scenes: {error}")
    scene = window(recording, to_predict=MostTravelled(8))
    metric, (states, index) = SimAgents(), constant_velocity(scene, 32)
    assert states.shape[1] == 32
    assert len(index) > 70
    start = time.process_time()  # of all threads, and whatever else the machine is doing
    metric.update(scene, states, index)
    score = metric.compute()["metametric_2025"]
    assert time.process_time() - start < 5
    assert 0.6 < score < 0.7
