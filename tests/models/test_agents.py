"""The agent model's laws, for every way that poses can enter: what it may see, what it must not, and what padding is."""

import math

import agent_cases as cases
import pytest
import torch
from agent_cases import agent_model, agents, moved, pieces, scene

from models.agent_tokens import AgentTokens, MapTokens

every_pos = pytest.mark.parametrize("pos", cases.POS)
every_head = pytest.mark.parametrize("head", cases.HEADS)


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def hostile(tokens, extra, value):
    """Padding appended to the second axis that holds `value`, and integers that no table knows."""

    def grow(t):
        fill = False if t.dtype == torch.bool else (value if t.is_floating_point() else 10**6)
        return torch.cat((t, torch.full((t.shape[0], extra, *t.shape[2:]), fill, dtype=t.dtype)), 1)

    return type(tokens)(*(grow(t) for t in tokens))


@every_pos
def test_padding_changes_nothing_and_gradients_stay_finite(pos):
    model, tokens, pieces_ = agent_model(pos), agents(), pieces()
    expected = model(tokens, pieces_)
    for value in (float("nan"), float("inf"), 1e30):
        padded = hostile(tokens, 3, value)
        inside = ~tokens.valid  # invalid tokens of agents that are there
        dirty = padded.pose.clone()
        dirty[:, :6][inside] = value
        model.zero_grad()
        out = model(padded._replace(pose=dirty), hostile(pieces_, 4, value))
        close(out[:, :6][tokens.valid], expected[tokens.valid])
        assert out.isfinite().all()
        out.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_pos
def test_agents_permute_and_map_pieces_do_not_matter(pos):
    model, tokens, map_tokens = agent_model(pos), agents(), pieces()
    expected = model(tokens, map_tokens)
    order = torch.randperm(6)
    assert not torch.equal(order, torch.arange(6))
    close(model(AgentTokens(*(t[:, order] for t in tokens)), map_tokens), expected[:, order])
    order = torch.randperm(12)
    close(model(tokens, MapTokens(*(t[:, order] for t in map_tokens))), expected)


@every_pos
def test_a_batch_is_its_scenes(pos):
    model, tokens, map_tokens = agent_model(pos), agents(), pieces()
    together = model(tokens, map_tokens)
    for index in range(2):
        close(model(scene(tokens, index), scene(map_tokens, index)), together[index : index + 1])


@every_pos
def test_the_future_never_reaches_the_past(pos):
    model, tokens, map_tokens = agent_model(pos), agents(), pieces()
    other = agents(seed=7)
    expected = model(tokens, map_tokens)
    for step in range(1, 5):
        mixed = [
            torch.cat((old[:, :, :step], new[:, :, step:]), 2) for old, new in zip(tokens[:4], other[:4], strict=True)
        ]
        out = model(AgentTokens(*mixed, tokens.type, tokens.size), map_tokens)
        seen = tokens.valid[:, :, :step]
        close(out[:, :, :step][seen], expected[:, :, :step][seen])
        assert not torch.allclose(out[:, :, step], expected[:, :, step], atol=1e-3)


@every_pos
def test_the_past_reaches_as_far_as_it_may(pos):
    """One block: an agent alone sees `tokens_back` tokens before its own, and no further."""
    model = agent_model(pos, "model.tokens_back=2")
    tokens, map_tokens = agents(count=1, steps=6), pieces()
    tokens = tokens._replace(valid=torch.ones_like(tokens.valid))
    expected = model(tokens, map_tokens)
    for step, reached in ((2, False), (3, True)):
        speed = tokens.speed.clone()
        speed[:, :, step] += 5
        out = model(tokens._replace(speed=speed), map_tokens)
        assert torch.equal(out[:, :, 5], expected[:, :, 5]) is not reached


@pytest.mark.parametrize("pos", ["rpe", "none"])
def test_relative_encodings_ignore_rigid_motions(pos):
    model, tokens, map_tokens = agent_model(pos), agents(), pieces()
    out = model(moved(tokens, 300, -70, 0.7), moved(map_tokens, 300, -70, 0.7))
    close(out[tokens.valid], model(tokens, map_tokens)[tokens.valid])


@pytest.mark.parametrize("pos", [*cases.ROTARY, "rope", "absolute"])
def test_rotary_poses_ignore_shifts_alone(pos):
    model, tokens, map_tokens = agent_model(pos), agents(), pieces()
    expected = model(tokens, map_tokens)

    def change(*motion):
        return (model(moved(tokens, *motion), moved(map_tokens, *motion)) - expected)[tokens.valid].abs().max()

    assert (change(300, -70) < 1e-10) is not (pos == "absolute")
    assert change(0, 0, 0.7) > 1e-2


@every_pos
def test_whole_turns_of_single_headings(pos):
    """Only the ordinary ladder on headings tells π from −π."""
    model, tokens, map_tokens = agent_model(pos), agents(), pieces()
    turns = 2 * math.pi * torch.randint(-2, 3, tokens.pose.shape[:-1]).double()
    pose = tokens.pose + torch.stack((0 * turns, 0 * turns, turns), -1)
    change = (model(tokens._replace(pose=pose), map_tokens) - model(tokens, map_tokens)).abs().max()
    assert change > 1e-3 if pos == "rope" else change < 1e-12


@pytest.mark.parametrize("pos", [*cases.ROTARY, "absolute", "rpe"])
def test_poses_matter(pos):
    model, tokens, map_tokens = agent_model(pos), agents(spread=5), pieces(spread=5)
    expected = model(tokens, map_tokens)
    for axis in range(3):
        pose = tokens.pose.clone()
        pose[:, 1:, :, axis] += 0.5
        assert (model(tokens._replace(pose=pose), map_tokens) - expected)[:, 0].abs().max() > 1e-4


@pytest.mark.parametrize("radius", ["map_radius", "map_agent_radius", "agent_radius"])
def test_radii_cut_exactly(radius):
    """A map piece or an agent on the x axis, a hair within and a hair beyond the radius of the first."""
    others = {"map_radius": 1.0, "map_agent_radius": 1.0, "agent_radius": 1.0, radius: 20.0}
    model = agent_model("drope_intra", *(f"model.{name}={metres}" for name, metres in others.items()))
    tokens, map_tokens = agents(count=2, steps=1, scenes=1), pieces(count=2, scenes=1)
    tokens = tokens._replace(valid=torch.ones_like(tokens.valid))
    place = {
        "map_radius": ((0, 20), (900, 900)),
        "map_agent_radius": ((500, 20), (0, 900)),
        "agent_radius": ((500, 600), (0, 20)),
    }
    (first, second), (here, there) = place[radius]

    def at(offset, speed=0.0, kind=0):
        map_pose, agent_pose = map_tokens.pose.clone(), tokens.pose.clone()
        map_pose[0, :, 0] = torch.tensor([first, second], dtype=torch.float64)
        agent_pose[0, :, 0, 0] = torch.tensor([here, there], dtype=torch.float64)
        map_pose[..., 1], agent_pose[..., 1] = 0, 0
        moving = agent_pose[0, 1, 0] if radius == "agent_radius" else map_pose[0, 1]
        moving[0] += offset
        types = map_tokens.type.clone()
        types[0, 1] = kind
        speeds = tokens.speed.clone()
        speeds[0, 1] += speed
        where = map_tokens._replace(pose=map_pose, type=types)
        out = model(tokens._replace(pose=agent_pose, speed=speeds), where)[0, 0]
        return model.encode_map(where).hidden[0, 0] if radius == "map_radius" else out

    changed = {"speed": 3.0} if radius == "agent_radius" else {"kind": 5}
    assert torch.equal(at(1e-6), at(1e-6, **changed))
    assert not torch.allclose(at(-1e-6), at(-1e-6, **changed), atol=1e-6)


@every_pos
def test_scenes_without_map_or_company(pos):
    model, alone = agent_model(pos), agents(count=1)
    empty = pieces(count=0)
    out = model(alone, empty)
    assert out.isfinite().all()
    hidden = pieces(count=3)._replace(valid=torch.zeros(2, 3, dtype=torch.bool))
    close(model(alone, hidden), out)


@every_pos
@every_head
def test_every_pos_trains_with_every_head(pos, head):
    model = agent_model(pos, head=head).float()
    tokens, map_tokens = (
        type(t)(*(x.float() if x.is_floating_point() else x for x in t)) for t in (agents(), pieces())
    )
    target = model(tokens, map_tokens).detach().roll(1, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(tokens, map_tokens) - target).clamp(-10, 10).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert all(math.isfinite(x) for x in losses)
    assert losses[-1] < losses[0]
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []


@pytest.mark.parametrize("size", ["ci", "nano", "mini", "tiny"])
def test_equal_parameters(size):
    """Every way of poses costs the same at a size, within 2 %; and FSDP finds all layers. Fixed phases cost nothing."""
    with torch.device("meta"):
        models = {pos: agent_model(pos, size=size) for pos in ("drope_intra", "none", "absolute", "rpe")}
        wide = agent_model("rpe", "model.equal_parameters=false", size=size)
    counts = {pos: sum(p.numel() for p in model.parameters()) for pos, model in models.items()}
    for pos, count in counts.items():
        assert count == pytest.approx(counts["drope_intra"], rel=0.02), pos
    assert sum(p.numel() for p in wide.parameters()) > 1.03 * counts["rpe"]
    assert size != "ci" or counts["drope_intra"] < 100_000
    groups = [m for name, m in models["drope_intra"].named_modules() if name.split(".")[-1] == "blocks"]
    layers = sum(p.numel() for group in groups for p in group.parameters())
    assert [len(group) for group in groups] == {"ci": [1, 1], "nano": [2, 4], "mini": [2, 4], "tiny": [3, 6]}[size]
    assert layers > 0.5 * counts["drope_intra"]


def test_embeddings_are_spared_from_decay():
    model = agent_model()
    names = model.no_weight_decay()
    assert names == {"embedding.kind.weight", "map_encoder.kind.weight", "map_encoder.light.weight"}
    assert names <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("pos", cases.POS)
def test_autocast_stays_close(pos):
    model = agent_model(pos).float()
    tokens, map_tokens = (
        type(t)(*(x.float() if x.is_floating_point() else x for x in t)) for t in (agents(), pieces())
    )
    expected = model(tokens, map_tokens)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, map_tokens)
    # 8 bits of mantissa through two layers; an angle in bfloat16 would be off by radians at 100 m
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()


@every_head
def test_only_wanted_tokens_reach_the_head(head):
    model, tokens, map_tokens = agent_model(head=head), agents(), pieces()
    wanted = tokens.valid & (torch.arange(5) % 2 == 0)
    results = []
    for out in (model(tokens, map_tokens, wanted=wanted), model(tokens, map_tokens)[wanted]):
        model.zero_grad()
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert model(tokens, map_tokens, wanted=torch.zeros_like(wanted)).shape == (0, results[0][0].shape[-1])


def test_what_it_refuses():
    model = agent_model()
    for change, message in (
        ({"width": 0}, "width=0"),
        ({"tokens_back": 0}, "tokens_back=0"),
    ):
        with pytest.raises(Exception, match=message):
            agent_model("drope_intra", *(f"model.{k}={v}" for k, v in change.items()))
    with pytest.raises(ValueError, match="3 scenes of agents for 2 maps"):
        model(agents(scenes=3), pieces())
    with pytest.raises(ValueError, match="no map"):
        model(agents(), None)
    cache = model.cache()
    model(agents(), pieces(), cache)
    with pytest.raises(ValueError, match="5 steps at once"):
        model(agents(), None, cache)
    with pytest.raises(Exception, match="leave no feed-forward part"):
        agent_model("rpe", "model.expansion=0.5")
