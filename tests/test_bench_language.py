"""The language bench: models are of one size, bytes are counted right, and every schedule computes what the model does."""

import json
import sys
from functools import partial

import pytest
import torch

from bench import language as bench
from bench.wavefront import stacked, wavefront
from models.states import nbytes

VARIANTS = ("lm_ci", "lm_ci_xl", "lm_ci_delta")


@pytest.fixture(scope="module")
def models():
    return {name: bench.configured(name) for name in VARIANTS}


def test_allocated_counts_temporaries_and_what_is_freed():
    x = torch.randn(100_000)
    size, small = x.nbytes, 2000  # scalars and the like
    assert bench.allocated(lambda: x + 1) == pytest.approx(size, abs=small)
    assert bench.allocated(lambda: (x + 1).exp().sum()) == pytest.approx(2 * size, abs=small)
    assert bench.allocated(lambda: [x + i for i in range(5)]) == pytest.approx(5 * size, abs=small)
    assert bench.allocated(lambda: [(x + i).sum() for i in range(5)]) == pytest.approx(size, abs=small)
    assert bench.allocated(lambda: x.view(10, -1).T) < small
    # What a kernel takes for itself is seen too: sorting gives values and int64 indices, and works on a copy of both.
    assert bench.allocated(lambda: torch.sort(x)) > 3.5 * size


def test_models_are_of_equal_size(models):
    ours = models["lm_ci"]
    wanted = bench.parameters(ours)
    for make in (bench.plain, bench.llama):
        other = bench.matched(partial(make, ours), wanted)
        assert bench.parameters(other) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_state_takes_what_the_formula_says(models, name):
    model = models[name]
    for read in (16, 32 + 1, 48 + 7, 80 + 15):
        with torch.no_grad():
            _, state = model(torch.randint(256, (1, read)))
        assert nbytes(state) == bench.formula_bytes(model, read % 16)


def test_filled_caches_are_like_read_ones(models):
    ours, tokens = models["lm_ci"], torch.randint(256, (1, 40))
    plain, llama = bench.plain(ours, 50), bench.llama(ours, 50)
    with torch.no_grad():
        read = plain(tokens)[1]
        filled = bench.filled_plain(plain, 40, 0)
        assert nbytes(filled) == nbytes(read)
        assert [cache.keys.memory.shape for cache in filled.layers] == [
            cache.keys.memory.shape for cache in read.layers
        ]
        cache = bench.filled_llama(llama, 40)
        assert bench.cache_bytes(cache) == bench.cache_bytes(llama(tokens).past_key_values) == nbytes(read)

        filled = bench.filled_plain(plain, 40, 5)
        grown = plain(tokens[:, :1], filled)[1]
        assert grown.layers[0].keys.memory is filled.layers[0].keys.memory  # written in place
        assert grown.read == 41
        # Rotary positions go on from what was read: keys of one token differ from those of the same token at the start.
        first = plain(tokens[:, :1])[1].layers[0].keys.memory[:, :, 0]
        assert not torch.allclose(grown.layers[0].keys.memory[:, :, 40], first)
        own = llama(tokens[:, :1], past_key_values=cache).past_key_values
        first = llama(tokens[:, :1]).past_key_values.layers[0].keys[:, :, 0]
        assert own.get_seq_length() == 41
        assert not torch.allclose(own.layers[0].keys[:, :, 40], first)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_wavefront_is_the_model_in_values_and_gradients(name):
    model = bench.configured(name).double()
    tokens = torch.randint(256, (2, 16 * 5))
    tokens[0, 21] = tokens[1, 40] = tokens[1, 47] = model.bos
    layers = stacked(model)
    plain, diagonal = model(tokens)[0], wavefront(model, layers, tokens)
    # The FIFO bank and the weights of the fusion are float32 in a model of any precision.
    close = 1e-5 if name == "lm_ci" else 1e-10
    assert torch.allclose(plain, diagonal, rtol=0, atol=close)
    into = torch.randn_like(plain)
    plain.backward(into)
    diagonal.backward(into)
    for index, block in enumerate(model.blocks):
        for parameter, weight in block.named_parameters():
            wanted = weight.grad if weight.grad is not None else torch.zeros_like(weight)
            near = 1e-4 if parameter.startswith("fusion") else 10 * close
            assert torch.allclose(layers[parameter].grad[index], wanted, rtol=near, atol=near), parameter
    assert model.embed.weight.grad.any()


def test_a_schedule_that_answers_otherwise_ends_the_bench(models, monkeypatch):
    monkeypatch.setattr(bench, "wavefront", lambda *parts: 1.01 * wavefront(*parts))
    with pytest.raises(RuntimeError, match=r"schedule wavefront: logits differ by 1\.0e-02"):
        bench.schedules(models["lm_ci"], 2, 1)


def test_steps_are_compared_at_one_place_of_a_chunk(models):
    with pytest.raises(ValueError, match="--read 100 isn't a multiple of the model's chunk of 16 tokens"):
        bench.reading(models["lm_ci"], [64, 100], 1, 16)


def test_rows_of_all_providers_are_written_and_ours_do_not_grow(tmp_path, monkeypatch):
    path = tmp_path / "language.json"
    monkeypatch.setattr(sys, "argv", ["bench.language", "--quick", "--json", str(path)])
    bench.main()
    rows = json.loads(path.read_text())
    value = {(row["case"], row["provider"], row["metric"]): row["value"] for row in rows}
    assert len(value) == len(rows)
    assert all(number > 0 for number in value.values())
    for read in (64, 256):
        for name in ("memory", "transformer", "llama"):
            assert {(f"decode, {read} read", name, metric) for metric in ("us_per_token", "peak_bytes")} <= set(value)
        assert (f"prefill, {read} read", "memory", "us_per_token") in value
        state, formula = (value[f"decode, {read} read", "memory", f"{kind}_bytes"] for kind in ("state", "formula"))
        assert state == formula
    peaks = {name: value["decode, 256 over 64 read", name, "peak_ratio"] for name in ("memory", "transformer", "llama")}
    assert peaks["memory"] <= 1.001 < 1.1 < min(peaks["transformer"], peaks["llama"])
    for phase in ("prefill", "training step"):
        assert {name for case, name, metric in value if case == f"{phase}, 4 chunks"} == {
            "one_by_one",
            "at_once",
            "wavefront",
        }
