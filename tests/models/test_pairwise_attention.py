"""Dense relative pose encoding, the baseline: its invariances, its pair terms one by one, and its masks."""

import math

import pytest
import torch
from agent_cases import moved

from models.agent_tokens import MapTokens
from models.pairwise_attention import PairwiseAttention, RawPoses, pair_features
from models.pose_attention import visible


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def poses(n, columns=3, lead=(2,)):
    return torch.randn(*lead, n, columns, dtype=torch.float64) * torch.tensor([20, 20, 3, 4.0])[:columns].double()


def layer(timed=False):
    torch.manual_seed(0)
    return PairwiseAttention(width=12, heads=3, head_dim=4, timed=timed).double()


def test_features_of_known_pairs():
    query = torch.tensor([[1.0, 2.0, math.pi / 2, 5.0]], dtype=torch.float64)
    key = torch.tensor([[1, 12, math.pi, 3], [4, 2, math.pi / 2, 5], [1, 2, 0, 5]], dtype=torch.float64)
    expected = [
        [math.log(11), 1, 1, 0, 0, 1, -0.5],  # 10 m ahead, turned to the left, two steps before
        [math.log(4), 0.3, 0, -1, 1, 0, 0],  # 3 m to the right, the same way
        [0, 0, 0, 0, 0, -1, 0],  # the same place, turned to the right
    ]
    close(pair_features(query, key), torch.tensor([expected], dtype=torch.float64), 1e-12)


def test_features_ignore_rigid_motions_and_whole_turns():
    query, key = poses(5, 4), poses(6, 4)
    expected = pair_features(query, key)

    def move(pose):
        shell = MapTokens(pose[..., :3], *[torch.empty(0)] * 4)
        return torch.cat((moved(shell, 50, -7, 0.7).pose, pose[..., 3:] + 11), -1)

    close(pair_features(move(query), move(key)), expected)
    whole = torch.tensor([0, 0, 2 * math.pi, 0], dtype=torch.float64)
    close(pair_features(query - 2 * whole, key + 3 * whole), expected)
    assert not torch.allclose(pair_features(query, move(key)), expected, atol=0.1)


@pytest.mark.parametrize("timed", [False, True])
def test_agrees_with_pairs_one_by_one(timed):
    attention, columns = layer(timed), 4 if timed else 3
    x, query, y, key = (
        torch.randn(2, 4, 12).double(),
        poses(4, columns),
        torch.randn(2, 5, 12).double(),
        poses(5, columns),
    )
    mask = torch.rand(2, 4, 5) > 0.3
    mask[1, 2] = False
    out = attention(x, query, attention.keys(y, key), visible(mask))
    for b in range(2):
        for i in range(4):
            seen = mask[b, i].nonzero().flatten().tolist()
            if not seen:
                assert not out[b, i].any()
                continue
            pairs = attention.pair(pair_features(query[b, i : i + 1], key[b, seen])[0])  # (s, 2 · h · d)
            content = attention.key_value(y[b, seen])
            k, v = (content + pairs).view(len(seen), 2, 3, 4).unbind(1)
            q = attention.query(x[b, i]).view(3, 4)
            weights = (torch.einsum("hd,shd->sh", q, k) / 2).softmax(0)
            close(out[b, i], attention.out(torch.einsum("sh,shd->hd", weights, v).flatten()))
    assert not mask[1, 2].any()


def test_chunks_of_queries_change_nothing(monkeypatch):
    attention, x, pose = layer(), torch.randn(2, 9, 12).double(), poses(9)
    mask = torch.rand(2, 9, 9) > 0.3
    for seen in (None, visible(mask), visible(mask, torch.float64), visible(mask[:, :1])):
        keys = attention.keys(x, pose)
        expected = attention(x, pose, keys, seen)
        monkeypatch.setattr("models.pairwise_attention._PAIRS", 40)  # two queries of nine keys in two scenes
        with torch.no_grad():
            close(attention(x, pose, keys, seen), expected)


def test_needs_poses():
    attention, x = layer(), torch.randn(1, 3, 12).double()
    assert RawPoses(heads=3, head_dim=4)(x) is x
    with pytest.raises(ValueError, match="needs the poses"):
        attention(x, None, attention.keys(x, None), None)
