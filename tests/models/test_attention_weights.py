"""Attention weights of one token: they make the output that the model's own kernels make, and respect every mask."""

import pytest
import torch
from agent_cases import POS, agent_model, agents, pieces

from models.agent_cache import MapContext
from models.attention_weights import Asked, agent_attention, calls_of, read, read_map

SCENES, AGENTS, STEPS, PIECES = 2, 6, 5, 12
LAYERS = "model.agent_layers=2"


def near(pose, other, radius):
    return (pose[..., :2] - other[..., :2]).norm(dim=-1) <= radius


def layers_of(model, *names):
    return [getattr(block, name) for block in model.blocks for name in names]


@pytest.mark.parametrize("pos", POS)
def test_weighted_values_are_what_the_attention_gives(pos):
    model = agent_model(pos, LAYERS)
    attentions = [layer.attention for layer in layers_of(model, "past", "others")]
    tokens, context = agents(AGENTS, STEPS, SCENES), model.encode_map(pieces(PIECES, SCENES))
    with torch.no_grad(), calls_of(attentions) as calls:
        model(tokens, context)
        for attention, call in zip(attentions, calls, strict=True):
            rows = call.output.flatten(0, -2)
            assert len(rows) == tokens.valid.numel()
            for query, expected in enumerate(rows):
                weights, values = read(attention, Asked(**call.arguments), query)
                # a token that isn't valid may see nothing
                made = (
                    attention.out((weights[:, None] @ values).flatten()) if weights.any() else torch.zeros(32).double()
                )
                torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)


def check_map(model, tokens, map):
    """Every valid token of a block, after it read the map: as the model has it, and from weights and values."""
    context = model.encode_map(map)
    with calls_of(layers_of(model, "past")) as before, calls_of(layers_of(model, "others")) as after:
        model(tokens, context)
    empty_handed = 0
    for block, start, end in zip(model.blocks, before, after, strict=True):
        goal = end.arguments["x"].transpose(1, 2)  # (b, a, s, c)
        layer = block.map
        for b, a, s in tokens.valid.nonzero().tolist():
            x, pose = start.output[b, a, s].view(1, 1, -1), tokens.pose[b, a, s].view(1, 1, -1)
            weights, values = read_map(model, block, x, pose, MapContext(*(part[b, None] for part in context)))
            empty_handed += int(not weights.any())
            found = layer.attention.out((weights[:, None] @ values).flatten()) * weights.any()
            normed = layer.norm(x)[0, 0]
            gate = layer.gate(torch.cat((found, normed))).sigmoid()
            x = x[0, 0] + (1 - gate) * found + gate * layer.own(normed)
            torch.testing.assert_close(x + layer.feed(layer.feed_norm(x)), goal[b, a, s], rtol=0, atol=1e-12)
    return empty_handed


@pytest.mark.parametrize("pos", POS)
@torch.no_grad()
def test_weighted_values_are_what_a_block_takes_from_the_map(pos):
    tokens = agents(AGENTS, STEPS, SCENES)
    assert 0 < check_map(agent_model(pos, LAYERS), tokens, pieces(PIECES, SCENES)) < 2 * int(tokens.valid.sum())


@pytest.mark.parametrize("pos", ["drope_intra", "rpe"])
@torch.no_grad()
def test_a_long_road_of_many_pieces(pos):
    """Where a model that computes only what is near has something to leave out."""
    tokens, map = agents(40, 2, SCENES), pieces(600, SCENES)
    map.valid[:, 500:] = False
    for pose in (tokens.pose, map.pose):
        pose[..., 1] *= 8
    check_map(agent_model(pos), tokens, map)


@pytest.mark.parametrize("pos", POS)
def test_weights_sum_to_one_over_what_is_visible_and_are_zero_elsewhere(pos):
    model = agent_model(pos, LAYERS, "model.tokens_back=2")
    tokens, map = agents(AGENTS, STEPS, SCENES), pieces(PIECES, SCENES, spread=20.0)
    map.valid[:, 3] = False
    map.pose[:, 3] = tokens.pose[:, 0, 3]  # near, but not there
    hidden = 0
    for scene, agent, step in tokens.valid.nonzero().tolist():
        found = agent_attention(model, tokens, map, scene=scene, agent=agent, step=step)
        here = tokens.pose[scene, agent, step]
        back = step - torch.arange(STEPS)
        visible = (
            tokens.valid[scene, agent] & (back >= 0) & (back <= 2),
            map.valid[scene] & near(map.pose[scene], here, 30.0),
            tokens.valid[scene, :, step] & near(tokens.pose[scene, :, step], here, 60.0),
        )
        for weights, seen in zip(found, visible, strict=True):
            assert weights.shape == (2, 2, len(seen))
            assert torch.equal(weights > 0, seen.expand_as(weights))
            whole = torch.full((2, 2), float(seen.any()), dtype=torch.float64)
            torch.testing.assert_close(weights.sum(-1), whole, rtol=0, atol=1e-12)
            hidden += int((~seen).sum())
    assert hidden > 100


def test_far_from_any_map_nothing_of_it_is_read():
    tokens, map = agents(), pieces()
    map.pose[..., :2] += 1e4
    found = agent_attention(agent_model(), tokens, map, agent=0)
    assert not found.map.any()
    assert found.agents.sum(-1).min() > 0.999
    none = agent_attention(agent_model(), tokens, type(map)(*(t[:, :0] for t in map)), agent=0)
    assert none.map.shape == (1, 2, 0)


def test_padding_gets_nothing_whatever_it_holds():
    model, tokens, map = agent_model(), agents(), pieces(spread=10.0)
    expected = agent_attention(model, tokens, map, agent=0, step=3)
    for t in (tokens.pose, tokens.motion, tokens.speed):
        t[~tokens.valid] = float("nan")
    for one, two in zip(agent_attention(model, tokens, map, agent=0, step=3), expected, strict=True):
        assert torch.equal(one, two)


def test_the_last_step_counts_from_behind_and_hooks_are_gone():
    model, tokens, map = agent_model(), agents(), pieces()
    one = agent_attention(model, tokens, map, agent=1, scene=1)
    two = agent_attention(model, tokens, map, agent=1 - 6, scene=-1, step=4)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"agent": 6}, "agent=6, there are 6"),
        ({"agent": 0, "step": -6}, "step=-6, there are 5"),
        ({"agent": 0, "scene": 2}, "scene=2, there are 2"),
        ({"agent": 1, "step": 0}, "scene 0, agent 1, step 0 isn't valid"),
    ],
)
def test_a_token_that_is_not_there_is_named(where, message):
    tokens = agents()
    tokens.valid[0, 1, 0] = False
    with pytest.raises(ValueError, match=message):
        agent_attention(agent_model(), tokens, pieces(), **where)


def test_as_many_maps_as_scenes_are_wanted():
    with pytest.raises(ValueError, match="2 scenes of agents and 1 maps"):
        agent_attention(agent_model(), agents(), pieces(scenes=1), agent=0)


def test_an_attention_of_another_kind_is_refused():
    model = agent_model()
    with calls_of([layer.attention for layer in layers_of(model, "past")]) as calls:
        model(agents(), pieces())
    with pytest.raises(TypeError, match="Linear is neither"):
        read(torch.nn.Linear(2, 2), Asked(**calls[0].arguments), 0)
