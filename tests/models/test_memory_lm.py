"""The chunked-memory model: one call equals any split, nothing sees the future or another document, the state never grows."""

import math

import pytest
import torch
from language_cases import BOS, FIFO, ROTARY, VARIANTS, model, read_in_pieces, text

from models.memory_lm import MemoryLM
from models.states import detach, leaves, nbytes
from models.stream import begin

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def equal(first, second, atol=1e-5):
    torch.testing.assert_close(first, second, atol=atol, rtol=0)


def same_states(first, second, atol=1e-5):
    for left, right in zip(leaves(first), leaves(second), strict=True):
        torch.testing.assert_close(left, right, atol=atol, rtol=1e-5)


@every_variant
@pytest.mark.parametrize("sizes", [1, 7, [5, 20, 1, 30, 3, 2]])
def test_one_call_is_any_split(variant, sizes):
    made, tokens = model(**VARIANTS[variant]), text()
    whole, state = made(tokens)
    pieces, after = read_in_pieces(made, tokens, sizes)
    equal(pieces, whole)
    same_states(after, state)


@every_variant
def test_all_chunks_at_once_is_the_loop_over_chunks(variant):
    made, tokens = model(**VARIANTS[variant]).double(), text(length=64)
    results = []
    for made.chunks_at_once in (8, 3, 1):
        made.zero_grad()
        logits, _ = made(tokens)
        logits.square().mean().backward()
        results.append((logits, [p.grad for p in made.parameters()]))
    for logits, gradients in results[1:]:
        equal(logits, results[0][0], 1e-5)
        # banks are float32 in a float64 model too, which leaves their rounding in the gradients
        for found, wanted in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-4)


@every_variant
@pytest.mark.parametrize("place", [0, 7, 8, 37, 60])
def test_nothing_sees_the_future(variant, place):
    made, tokens = model(**VARIANTS[variant]), text(documents=False)
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 7) % 20
    difference = (made(changed)[0] - made(tokens)[0]).abs().amax(dim=(0, 2))
    assert (difference[:place] == 0).all()
    assert difference[place] > 1e-3


def test_a_memory_that_is_written_before_it_is_read_would_be_caught():
    """Reading after the write, as a leaky build would, moves what came before the changed token."""

    class Leaky(MemoryLM):
        def forward(self, tokens, state=None, **others):
            _, after = super().forward(tokens, state)
            before = self.initial(len(tokens))
            leaked = tuple(
                layer._replace(bank=late.bank) for layer, late in zip(before.layers, after.layers, strict=True)
            )
            stream = before.stream._replace(remembered=after.stream.remembered)
            return super().forward(tokens, type(after)(stream, leaked))

    made, tokens = model(), text(length=8, documents=False)
    leaky = model()
    leaky.__class__ = Leaky
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 7) % 20
    assert (made(changed)[0] - made(tokens)[0])[:, :5].abs().max() == 0
    assert (leaky(changed)[0] - leaky(tokens)[0])[:, :5].abs().max() > 1e-3


@every_variant
def test_a_document_sees_no_other_one_by_any_path(variant):
    """Gradients to the embeddings of earlier documents are exactly zero, through carry and memory too."""
    made, length = model(**VARIANTS[variant]), 61
    tokens = text(1, length, documents=False)
    tokens[0, [0, 21]] = BOS
    embedded = []
    made.embed.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    logits, _ = made(tokens)
    for output in embedded:
        output.retain_grad()
    logits[0, 21:].square().sum().backward()
    gradient = torch.cat([output.grad for output in embedded], 1)[0].abs().amax(-1)
    assert (gradient[:21] == 0).all()
    assert (gradient[21:] > 0).all()


@every_variant
@pytest.mark.parametrize("chunks", [1, 10])
def test_what_was_read_before_a_document_leaves_no_trace(variant, chunks):
    made, before = model(**VARIANTS[variant]), text(2, 8 * chunks)
    tokens = text(2, 30, seed=5)
    tokens[:, 0] = BOS
    _, state = made(before)
    assert torch.equal(made(tokens, state)[0], made(tokens)[0])


def test_without_memory_a_prefix_reaches_as_far_as_layers_and_carry_allow():
    made, tokens = model(bank=None, bos=None), text(1, 48, documents=False)
    alone, after = made(tokens)[0], made(tokens, made(text(1, 24, seed=7))[1])[0]
    moved = (alone - after).abs().amax(dim=(0, 2)) > 1e-6
    assert moved[:8].all()  # one layer, the carry
    assert not moved[16:].any()  # two layers of it reach two chunks


def test_an_empty_memory_is_the_other_paths_renormalised_by_hand():
    """With nothing written, the model is the one without memory whose heads are scaled by what the memory leaves them."""
    made = model(bos=None)
    bare = model(bos=None, bank=None)
    shared = {
        name: value for name, value in made.state_dict().items() if name in bare.state_dict() and "fusion" not in name
    }
    bare.load_state_dict(shared, strict=False)
    tokens = text(2, 8, documents=False)
    for mine, other in zip(made.blocks, bare.blocks, strict=True):
        weights = mine.fusion.logits.softmax(-1)
        other.fusion.forward = lambda x, weights=weights: weights[None, None, None, :, :2]
    equal(made(tokens)[0], bare(tokens)[0], 0)


@every_variant
def test_the_state_never_grows_and_keeps_no_graph(variant):
    made = model(**VARIANTS[variant])
    state, sizes = None, []
    for seed in range(50):
        logits, state = made(text(2, 8, seed=seed), state)
        state = detach(state)
        sizes.append(nbytes(state))
    assert len(set(sizes)) == 1
    assert not any(leaf.requires_grad for leaf in leaves(state))
    assert torch.isfinite(logits).all()


def test_the_state_has_the_size_that_the_formula_says():
    made, rows, begun = model(bank=FIFO), 3, 5
    _, state = made(text(rows, 8 * 3 + begun))
    width, chunk, slots, writers = 32, 8, 4, 2
    floats = 2 * chunk * width + 2 * begun * width + slots * width + writers * (width + 2)
    counts = sum(leaf.nbytes for leaf in leaves(state) if leaf.dtype == torch.int64)
    assert nbytes(state) == 2 * rows * 4 * floats + counts
    assert counts == 8 * rows * (2 + chunk + begun + 2)  # of the stream, and `writes` of the two layers


WRITERS = ("pool.query", "pool.key", "pool.value", "candidate", "gate")


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_writers_learn_only_where_a_later_chunk_reads(chunks):
    made = model()
    _, state = made(text(2, 16, documents=False))
    logits, _ = made(text(2, 8 * chunks, seed=3, documents=False), detach(state))
    logits.square().mean().backward()
    for name, parameter in made.named_parameters():
        if "bank." in name and any(f"bank.{writer}" in name for writer in WRITERS):
            gradient = torch.zeros(1) if parameter.grad is None else parameter.grad
            assert (gradient.abs().max() > 0) == (chunks > 1), name


def test_checkpointing_changes_no_gradient():
    results = []
    for checkpoint in (False, True):
        made = model(checkpoint=checkpoint, chunks_at_once=1)
        made(text(length=32))[0].square().mean().backward()
        results.append([parameter.grad for parameter in made.parameters()])
    for kept, recomputed in zip(*results, strict=True):
        equal(kept, recomputed, 1e-6)


def test_reading_without_memory_still_writes_it():
    made, tokens = model(), text(documents=False)
    logits, state = made(tokens)
    muted, after = made(tokens, reads=False)
    assert (logits - muted)[:, 8:].abs().max() > 1e-3
    assert (logits - muted)[:, :8].abs().max() == 0
    same_states(state.layers[0].bank, after.layers[0].bank)  # deeper layers read what the memory changed
    assert not torch.equal(state.layers[1].bank.memory, after.layers[1].bank.memory)


@every_variant
def test_half_precision_keeps_memory_and_phases_in_single(variant):
    made = model(**VARIANTS[variant])
    phases = [rotary(torch.arange(16)[:, None]) for rotary in made.rotaries()]
    half = made.bfloat16()
    logits, state = half(text())
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
    for before, rotary in zip(phases, half.rotaries(), strict=True):
        assert torch.equal(before, rotary(torch.arange(16)[:, None]))
    for layer in state.layers:
        floats = [leaf for leaf in leaves(layer.bank) if leaf.is_floating_point()] if layer.bank is not None else []
        assert all(leaf.dtype == torch.float32 for leaf in floats)


@pytest.mark.parametrize("variant", ["memory", "delta", "xl"])
def test_autocast_stays_close(variant):
    made, tokens = model(**VARIANTS[variant]), text()
    with torch.autocast("cpu", torch.bfloat16):
        half, state = made(tokens)
    exact, _ = made(tokens)
    # bfloat16 has 8 bits: 2**-8 a rounding, of which a dozen add up over two layers of large weights
    assert (half.float() - exact).norm() / exact.norm() < 0.05
    for layer in state.layers:
        assert layer.bank is None or all(
            leaf.dtype == torch.float32 for leaf in leaves(layer.bank) if leaf.is_floating_point()
        )


@pytest.mark.parametrize("variant", ["memory", "delta", "xl"])
def test_a_training_step_compiles_whole(variant):
    made, tokens = model(**VARIANTS[variant]), text(length=32)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    logits, state = compiled(tokens)
    logits.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in made.parameters()]
    made.zero_grad()
    wanted, wanted_state = made(tokens)
    wanted.square().mean().backward()
    equal(logits, wanted)
    same_states(state, wanted_state)
    for found, parameter in zip(gradients, made.parameters(), strict=True):
        equal(found, parameter.grad, 1e-5)


@pytest.mark.parametrize("variant", ["memory", "length_dependent_rotary", "no_rotary"])
def test_keys_moved_on_are_keys_turned_further_on(variant):
    turn = model(**VARIANTS[variant]).blocks[0].turn
    keys, place = torch.randn(2, 4, 8, 8), torch.arange(8)[:, None]
    turned, further = (turn(keys, keys, at, at)[1] for at in (place, place - 8))
    equal(turn.moved(turned, -8), further, 1e-6)


def test_turns_are_given_what_is_not_turned_yet():
    """So that diagnostics hear queries and keys as the layer made them, each once, in any split."""
    made, tokens, heard, projected = model(), text(length=20), [], []
    block = made.blocks[0]
    block.qkv.register_forward_hook(lambda module, inputs, output: projected.append(output.flatten(0, 1)))
    block.turn.register_forward_pre_hook(lambda module, given: heard.append(given[:4]))
    read_in_pieces(made, tokens, [16, 3, 1])
    for (queries, keys, *places), output in zip(heard, projected, strict=True):
        wanted = output.unflatten(-1, (3, 4, 8)).unbind(-3)[:2]  # (n, t, h, d)
        equal(torch.stack((queries, keys)).transpose(-2, -3), torch.stack(wanted), 0)
        assert all(torch.equal(place, places[0]) for place in places)
    assert [given[2].flatten().tolist() for given in heard] == [list(range(8)), [0, 1, 2], [3]]


def test_sparing_and_gates_are_named():
    made = model(rotary=lambda **sizes: ROTARY(**sizes, learnable=True))
    names = dict(made.named_parameters())
    spared, gates = made.no_weight_decay(), made.gate_parameters()
    assert spared <= names.keys()
    assert {name.split(".")[-1] for name in spared} == {"weight", "frequencies", "logits", "null", "age_bias", "query"}
    assert gates == {
        f"blocks.{layer}.{name}"
        for layer in (0, 1)
        for name in ("fusion.logits", "bank.null", "bank.age_bias", "bank.gate.bias")
    }


def test_a_new_model_is_as_uncertain_as_it_can_be():
    torch.manual_seed(0)
    made = model()
    made.reset_parameters()
    losses = torch.nn.functional.cross_entropy(made(text())[0].flatten(0, 1), text().flatten())
    assert abs(losses.item() - math.log(20)) < 0.1
    for block in made.blocks:
        assert torch.equal(block.bank.gate.bias, -torch.ones(32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 5}, "5 heads"),
        ({"window": 9}, "window=9"),
        ({"chunk": 0, "window": None}, "chunk=0"),
        ({"bos": 20}, "bos=20"),
        ({"bank": lambda **sizes: FIFO.func(slots=5, writers=2, **sizes)}, "2 writers"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        model(**change)


def test_bad_tokens_and_foreign_states_are_named():
    made = model()
    with pytest.raises(ValueError, match="token 20 is outside the vocabulary of 20"):
        made(torch.tensor([[1, 20]]))
    with pytest.raises(ValueError, match="shape"):
        made(torch.zeros(2, 0, dtype=torch.int64))
    _, state = made(text(2, 11))
    for other, tokens in ((made, text(3, 4)), (model(layers=3), text(2, 4)), (model(chunk=16), text(2, 4))):
        with pytest.raises(ValueError, match="another model or batch"):
            other(tokens, state)
    with pytest.raises(ValueError, match="another model or batch"):
        model(bank=None)(text(2, 4), state)


def test_streams_begin_empty():
    stream = begin(2, 4, carry=True)
    assert (stream.carried == -1).all()
    assert (stream.remembered == -1).all()
