"""Attention by blocks of neighbours: no key within the radius is lost, and the model answers as if all pairs were computed."""

from functools import partial

import pytest
import torch
from agent_cases import agent_model, agents, pieces

import models.agents
from models.near_blocks import blocks_within
from models.pose_attention import within
from models.rollout import rollout


def cloud(scenes=3, queries=101, keys=140, seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = torch.rand(scenes, queries + keys, 5, generator=generator, dtype=torch.float64)
    pose = 200 * random[..., :3] - 100
    chosen = random[..., 3] > torch.tensor([0.1, 0.7, 0.4])[:scenes, None]  # scenes are full and empty
    return pose[:, :queries], chosen[:, :queries], pose[:, queries:], random[:, queries:, 4] > 0.2


@pytest.mark.parametrize("block", [1, 4, 16, 33])
def test_every_key_within_the_radius_is_seen_once_and_no_other(block):
    query, asks, key, valid = cloud()
    query[0, :5] = key[0, :5] + torch.tensor([15.0, 0.0, 0.0])  # at the very edge
    wanted = within(query, key, 15.0) & valid[:, None] & asks[..., None]
    blocks = blocks_within(query, asks, key, valid, 15.0, block=block)
    seen = blocks.visible(query, key, torch.float64)
    mask = (seen.bias == 0) & seen.some  # (k, n, w)
    found = torch.zeros(asks.numel() + 1, valid.numel(), dtype=torch.long)
    for rows, columns, visible in zip(blocks.order, blocks.keys, mask, strict=True):
        for row, sees in zip(rows, visible, strict=True):
            found[row, columns[sees]] += 1
    scene = torch.eye(len(query), dtype=torch.long)
    expected = torch.einsum("bqm,bc->bqcm", wanted.long(), scene).flatten(0, 1).flatten(1)
    assert torch.equal(found[:-1], expected)
    assert expected.sum() > 100


def test_what_is_split_is_merged_again():
    query, asks, key, valid = cloud()
    blocks = blocks_within(query, asks, key, valid, 15.0, block=16)
    assert torch.equal(blocks.order[blocks.order < asks.numel()].sort().values, asks.flatten().nonzero().flatten())
    x = torch.randn(*query.shape[:2], 7)
    torch.testing.assert_close(blocks.merge(blocks.split(x) + 1, x), torch.where(asks[..., None], x + 1, x))


def test_blocks_are_given_up_where_they_save_nothing():
    query, asks, key, valid = cloud()
    assert blocks_within(query, asks, key, valid, None, block=16) is None
    assert blocks_within(query, asks, key, valid, 500.0, block=16) is None
    assert blocks_within(query, torch.zeros_like(asks), key, valid, 15.0, block=16) is None
    assert blocks_within(query, asks, key[:, :20], valid[:, :20], 15.0, block=16) is None


@pytest.fixture
def in_blocks(monkeypatch):
    """Small blocks, and a record of how often they were used; call it with False for all pairs."""
    used = []

    def switch(on):
        def counted(*args):
            found = blocks_within(*args, block=4) if on else None
            used.append(found is not None)
            return found

        monkeypatch.setattr(models.agents, "blocks_within", counted)
        return used

    return switch


@pytest.mark.parametrize("pos", ["drope_intra", "rpe", "absolute"])
def test_outputs_and_gradients_are_those_of_all_pairs(pos, in_blocks):
    model = agent_model(pos, "model.map_radius=15", "model.map_agent_radius=20", "model.map_layers=2")
    tokens, map_tokens = agents(10, spread=60.0), pieces(90, spread=60.0)
    results = []
    for on in (False, True):
        used = in_blocks(on)
        used.clear()
        model.zero_grad()
        out = model(tokens, map_tokens)
        assert used == [on, on]
        (out[tokens.valid] * torch.linspace(-1, 1, out.shape[-1])).square().sum().backward()
        results.append([out.detach()[tokens.valid], *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, blocked in zip(*results, strict=True):
        torch.testing.assert_close(blocked, plain, rtol=1e-9, atol=1e-9)


def test_rollouts_are_those_of_all_pairs(in_blocks):
    model = agent_model("drope_intra", "model.map_radius=15", "model.map_agent_radius=20")
    tokens, map_tokens = agents(10, 2, spread=60.0), pieces(90, spread=60.0)
    simulate = partial(rollout, model, tokens, map_tokens, scenario_ids=["a", "b"], rollouts=range(3), steps=4)
    in_blocks(False)
    plain = simulate(keep_predictions=True)
    used = in_blocks(True)
    used.clear()
    blocked = simulate(keep_predictions=True)
    assert all(used)
    assert len(used) == 5  # the map, the history, three steps more
    torch.testing.assert_close(blocked.predictions[tokens.valid[..., -1]], plain.predictions[tokens.valid[..., -1]])
    torch.testing.assert_close(blocked.poses, plain.poses)
