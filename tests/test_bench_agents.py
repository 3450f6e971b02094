"""The agents bench: bytes are counted right, DRoPE's grow with N and dense RPE's with N², and the naive layer is the same."""

import json
import sys

import pytest
import torch

from bench import agents as bench


def test_saved_bytes_counts_each_storage_once():
    x, y = (torch.randn(10, 10, requires_grad=True) for _ in range(2))
    assert bench.saved_bytes(lambda: x * y) == 2 * 400
    assert bench.saved_bytes(lambda: x * x.T) == 400  # two views of one storage
    assert bench.saved_bytes(lambda: (x * y).exp()) == 3 * 400  # exp keeps its result
    assert bench.saved_bytes(lambda: x + y) == 0


def test_the_naive_layer_computes_the_same():
    torch.manual_seed(0)
    fused, naive = bench.PROVIDERS["drope_sdpa"](), bench.PROVIDERS["drope_naive"]()
    naive.load_state_dict(fused.state_dict())
    x, pose = torch.randn(1, 50, 128), bench.poses(1, 50)
    assert torch.allclose(fused(x, pose), naive(x, pose), atol=1e-5)


def test_bytes_of_drope_grow_with_agents_and_of_rpe_with_pairs():
    rows = {(r.case, r.provider): r.value for r in bench.memory((128, 256), 256**2) if r.metric == "growth"}
    assert rows["256 agents", "drope_sdpa"] < 2.05
    assert rows["256 agents", "rpe_dense"] > 3.5
    assert rows["256 agents", "drope_sdpa"] < rows["256 agents", "drope_naive"] < rows["256 agents", "rpe_dense"]


def test_no_saved_tensor_of_drope_has_as_many_numbers_as_pairs():
    n = 300
    layer = bench.PROVIDERS["drope_sdpa"]()
    x, pose, sizes = torch.randn(1, n, 128, requires_grad=True), bench.poses(1, n), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        layer(x, pose)
    assert sizes
    assert max(sizes) < n * n


def test_rows_are_written_and_rpe_stops_where_it_is_told(tmp_path, monkeypatch):
    path = tmp_path / "agents.json"
    options = "--agents 16 32 --pairs 256 --rounds 1 --size ci --scene 4 8 --rollouts 2"
    monkeypatch.setattr(sys, "argv", ["bench.agents", *options.split(), "--json", str(path)])
    bench.main()
    rows = json.loads(path.read_text())
    assert {row["metric"] for row in rows} == {"saved_bytes", "growth", "ms", "scene_rollouts_per_s"}
    assert {row["case"] for row in rows if row["provider"] == "rpe_dense"} == {"16 agents"}
    assert {row["provider"] for row in rows if row["metric"] == "scene_rollouts_per_s"} == {"cached", "recomputed"}
    assert all(row["value"] > 0 for row in rows)


@pytest.mark.parametrize("size", ["ci", "nano", "mini", "tiny"])
def test_every_size_is_built_from_its_config(size):
    assert sum(p.numel() for p in bench.model_of(size).parameters()) > 1e4
