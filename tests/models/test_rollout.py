"""The closed loop: what the cache saves changes nothing, and every rollout is its own, whatever runs beside it."""

import math

import agent_cases as cases
import pytest
import torch
from agent_cases import agent_model, agents, moved, pieces, scene

from models.agent_tokens import AgentTokens
from models.rollout import ClosestToTruth, Sample, rollout, rollout_uniforms

NAMES = ["a1", "b2"]
every_pos = pytest.mark.parametrize("pos", cases.POS)
every_head = pytest.mark.parametrize("head", cases.HEADS)


def close(actual, expected, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def history(**arguments):
    return agents(steps=2, **arguments)


def run(model, past, map_tokens, names=NAMES, rollouts=range(3), **arguments):
    return rollout(model, past, map_tokens, scenario_ids=names, rollouts=rollouts, keep_predictions=True, **arguments)


def same(first, second, atol=1e-9):
    close(first.predictions, second.predictions, atol)
    close(first.poses, second.poses, atol)
    close(first.actions, second.actions, atol)


@pytest.mark.parametrize(
    ("pos", "head"), [*((pos, "token") for pos in cases.POS), ("drope_intra", "kinematic"), ("drope_intra", "mixture")]
)
def test_cached_equals_recomputed(pos, head):
    """At each of the 16 steps, longer than any token sees back, in a model of two blocks; float64."""
    model = agent_model(pos, "model.agent_layers=2", "model.tokens_back=3", head=head)
    past, map_tokens = history(), pieces()
    cached = run(model, past, map_tokens, top_k=20)
    same(cached, run(model, past, map_tokens, top_k=20, cached=False))
    assert cached.predictions.shape[:4] == (2, 6, 3, 16)
    spread = cached.poses[:, :, 0] - cached.poses[:, :, 1]
    assert spread.abs().max() > 0.1


@every_pos
def test_cached_equals_recomputed_in_single_precision(pos):
    model = agent_model(pos, "model.agent_layers=2").float()
    past, map_tokens = (type(t)(*(x.float() if x.is_floating_point() else x for x in t)) for t in (history(), pieces()))
    cached = run(model, past, map_tokens, temperature=0.0)
    plain = run(model, past, map_tokens, temperature=0.0, cached=False)
    assert torch.equal(cached.actions, plain.actions)
    close(cached.predictions, plain.predictions, 1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_history_fills_the_cache(steps):
    """Shorter and longer than the cache's three slots."""
    model = agent_model("drope_intra", "model.tokens_back=2")
    past, map_tokens = agents(steps=steps), pieces()
    same(run(model, past, map_tokens), run(model, past, map_tokens, cached=False))


@every_pos
def test_teacher_forcing_is_step_by_step(pos):
    model = agent_model(pos, "model.agent_layers=2", "model.tokens_back=3")
    tokens, map_tokens = agents(steps=9), pieces()
    whole = model(tokens, map_tokens)
    cache = model.cache()
    for step in range(9):
        now = AgentTokens(*(t[:, :, step : step + 1] for t in tokens[:4]), tokens.type, tokens.size)
        out = model(now, map_tokens if step == 0 else None, cache)[:, :, 0]
        seen = tokens.valid[:, :, step]
        close(out[seen], whole[:, :, step][seen])


@every_head
def test_rollouts_together_are_rollouts_alone(head):
    """32 at once, in chunks, and one by one; and each scene without the other."""
    model = agent_model("drope_intra", "model.agent_layers=2", head=head)
    past, map_tokens = history(count=3), pieces(count=6)
    together = run(model, past, map_tokens, rollouts=range(32), top_k=20)
    chunked = run(model, past, map_tokens, rollouts=range(32), top_k=20, rollouts_at_once=5)
    same(together, chunked)
    for field, other in zip(together.tokens, chunked.tokens, strict=True):
        close(field, other)
    for number in (0, 17):
        alone = run(model, past, map_tokens, rollouts=[number], top_k=20)
        close(alone.predictions[:, :, 0], together.predictions[:, :, number])
        close(alone.poses[:, :, 0], together.poses[:, :, number])
    for index in range(2):
        lone = run(model, scene(past, index), scene(map_tokens, index), NAMES[index : index + 1], range(32), top_k=20)
        close(lone.poses[0], together.poses[index])


@every_pos
def test_padding_changes_no_rollout(pos):
    model, past, map_tokens = agent_model(pos), history(), pieces()
    expected = run(model, past, map_tokens)

    def grow(t, extra=2):
        fill = float("nan") if t.is_floating_point() else 0
        return torch.cat((t, torch.full((t.shape[0], extra, *t.shape[2:]), fill, dtype=t.dtype)), 1)

    padded = run(model, type(past)(*map(grow, past)), type(map_tokens)(*map(grow, map_tokens)))
    close(padded.poses[:, :6], expected.poses)
    assert not padded.poses[:, 6:].any()
    assert not padded.tokens.valid[:, 6:].any()
    assert all(t.isfinite().all() for t in padded.tokens)


def test_agents_without_a_present_stay_out():
    model, past, map_tokens = agent_model(), history(), pieces()
    valid = past.valid.clone()
    valid[:, 2] = torch.tensor([True, False])
    out = run(model, past._replace(valid=valid), map_tokens)
    assert not out.poses[:, 2].any()
    valid[:, 2] = False
    without = run(model, past._replace(valid=valid), map_tokens)
    close(out.poses[:, 3:], without.poses[:, 3:])


@pytest.mark.parametrize(("pos", "rigid"), [("rpe", True), ("none", True), *((pos, False) for pos in cases.ROTARY)])
def test_a_moved_scene_moves_its_rollouts(pos, rigid):
    """With the same numbers: rigid motions for relative encodings, shifts for poses that turn queries and keys."""
    model, past, map_tokens = agent_model(pos), history(), pieces()
    expected = run(model, past, map_tokens)
    turn = 0.7 if rigid else 0.0
    out = run(model, moved(past, 120, -30, turn), moved(map_tokens, 120, -30, turn))
    c, s = math.cos(turn), math.sin(turn)
    x, y, heading = expected.poses.unbind(-1)
    close(out.poses[..., :2], torch.stack((c * x - s * y + 120, s * x + c * y - 30), -1), 1e-6)
    off = out.poses[..., 2] - heading - turn
    close(off - 2 * math.pi * (off / (2 * math.pi)).round(), torch.zeros_like(off), 1e-6)


@every_head
def test_poses_are_at_ten_hertz_and_wrapped(head):
    model, past, map_tokens = agent_model(head=head), history(), pieces()
    out = run(model, past, map_tokens, rollouts=range(32))
    assert out.poses.shape == (2, 6, 32, 80, 3)
    assert out.poses[..., 2].min() >= -math.pi
    assert out.poses[..., 2].max() < math.pi
    ends = out.tokens.pose[:, :, 2:].unflatten(0, (2, 32)).transpose(1, 2)  # (b, a, r, 16, 3)
    close(out.poses[..., 4::5, :], ends)
    jumps = out.poses[..., :2].diff(dim=3).norm(dim=-1)
    assert jumps.max() < 6  # metres in 0.1 s: no motion of any head, not even a drawn one, is a leap
    for name in ("pose", "motion", "speed"):
        kept = getattr(out.tokens, name)[::32, :, :2][past.valid]
        assert torch.equal(kept, getattr(past, name)[past.valid])
    assert torch.equal(out.tokens.valid[::32, :, :2], past.valid)


def test_tokens_of_a_rollout_train_in_closed_loop():
    """The predictions of a rollout are those of a teacher-forced pass over its tokens, this time with gradients."""
    model, past, map_tokens = agent_model("drope_intra", "model.agent_layers=2"), history(), pieces()
    out = run(model, past, map_tokens)
    assert not any(t.requires_grad for t in out.tokens)
    again = model(out.tokens, map_tokens)[:, :, 1:-1].unflatten(0, (2, 3)).transpose(1, 2)
    close(again, out.predictions)
    again.square().mean().backward()
    assert model.blocks[0].past.attention.key.weight.grad.abs().max() > 0


@every_head
def test_closest_to_the_truth(head):
    """Truth that the head's own motions made is found again, up to the head's resolution; where there is none, draws go on."""
    model, past, map_tokens = agent_model(head=head), history(), pieces()
    truth = run(model, past, map_tokens, rollouts=[0])
    futures = truth.poses[:, :, 0].unflatten(2, (16, 5))
    valid = torch.ones(2, 6, 16, dtype=torch.bool)
    valid[:, 1] = False
    drawn = Sample(model.head)
    choose = ClosestToTruth(
        model.head, torch.where(valid[..., None, None], futures, torch.nan), valid, drawn, among=None
    )
    out = run(model, past, map_tokens, rollouts=[1, 2], choose=choose)
    off = (out.poses - truth.poses)[..., :2].norm(dim=-1)
    # a bin of acceleration is 8 / 3 m/s², a third of a metre in 0.5 s, and the head weighs speed as well as place
    assert off[:, valid[0, :, 0]].max() < (1.0 if head == "kinematic" else 1e-6)
    assert off[:, 1].max() > 2.0
    among = ClosestToTruth(model.head, futures, valid, drawn, among=2)
    near = (run(model, past, map_tokens, rollouts=[1], choose=among).poses - truth.poses)[..., :2].norm(dim=-1)
    assert near[:, valid[0, :, 0]].max() > 1.0


def test_uniforms_depend_on_names_alone():
    drawn = rollout_uniforms(NAMES, range(32), 7, 16, 2, seed=3)
    assert drawn.shape == (2, 32, 7, 16, 2)
    assert 0 < drawn.min() < 1e-3
    assert 1 - 1e-3 < drawn.max() < 1
    assert torch.equal(rollout_uniforms(["b2"], [30], 7, 16, 2, seed=3)[0, 0], drawn[1, 30])
    assert torch.equal(rollout_uniforms(NAMES, [4], 5, 16, 2, seed=3)[:, 0], drawn[:, 4, :5])
    rows = torch.cat((drawn.flatten(0, 1), rollout_uniforms(NAMES, range(32), 7, 16, 2, seed=4).flatten(0, 1)))
    assert len(rows.flatten(1).unique(dim=0)) == 128


def test_the_map_is_read_once(monkeypatch):
    model, past, map_tokens = agent_model(), history(), pieces()
    calls = {"encode": 0, "keys": 0, "queries": 0}
    attention = model.blocks[0].map.attention

    def count(owner, name, counter):
        original = getattr(owner, name)

        def counted(*arguments, **others):
            calls[counter] += 1
            return original(*arguments, **others)

        monkeypatch.setattr(owner, name, counted)

    count(model, "encode_map", "encode")
    count(attention, "keys", "keys")
    count(attention, "forward", "queries")
    run(model, past, map_tokens, rollouts=range(6), rollouts_at_once=3)
    assert calls == {"encode": 1, "keys": 1, "queries": 1 + 2 * 15}
    run(model, past, map_tokens, rollouts=range(6), cached=False)
    assert calls["keys"] == 1 + 16


def test_what_it_refuses():
    model, past, map_tokens = agent_model(), history(), pieces()
    for arguments, message in (
        ({"names": ["a"]}, "1 scenario_ids for 2 scenes"),
        ({"rollouts": []}, "0 rollouts of 16 steps"),
        ({"steps": 0}, "3 rollouts of 0 steps"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, past, map_tokens, **arguments)
