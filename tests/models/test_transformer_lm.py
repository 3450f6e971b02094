"""The decoder against transformers' Llama, itself in pieces, and the laws of documents, caches and compilation."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from models.feed_forward import GELU, SwiGLU
from models.states import detach, mapped, nbytes
from models.transformer_lm import TransformerLM, append
from models.turn import Turn
from rotary import Rotary
from rotary.frequencies import Axial, Geometric
from rotary.pairing import rows_to_interleaved
from rotary.scaling import DynamicNTK, Identity, LongRoPE, YaRN

VOCABULARY, BOS = 61, 60


def rotary(scaling=Identity(), **options):  # noqa: B008 - frozen
    return partial(Rotary, Geometric(100.0), scaling, **options)


def model(rotary=rotary(), bos=None, **options):  # noqa: B008 - a partial
    sizes = {
        "width": 32,
        "layers": 2,
        "heads": 2,
        "hidden": 48,
        "context": 24,
    }
    made = TransformerLM(VOCABULARY, bos, rotary=rotary, **(sizes | options))
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)  # attention that matters
    return made


def text(rows=2, length=40, starts=()):
    tokens = torch.randint(0, BOS, (rows, length))
    tokens[:, list(starts)] = BOS
    return tokens


@torch.no_grad()
def in_pieces(network, tokens, sizes):
    state, logits = None, []
    for piece in tokens.split(sizes, dim=1):
        out, state = network(piece, state)
        logits.append(out)
    return torch.cat(logits, 1), state


SPLITS = ([1] * 40, [7, 1, 1, 20, 11], [39, 1], [1, 39])
POSITIONS = {
    "rope": rotary(),
    "none": None,
    "learned": rotary(learnable=True),
    "partial": rotary(fraction=0.5),
    "yarn": rotary(YaRN(4.0, 12)),
    "dynamic within": rotary(DynamicNTK(4.0, 40)),
}


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("bos", [None, BOS])
def test_one_call_is_any_split(positions, sizes, bos):
    network = model(POSITIONS[positions], bos, feed=SwiGLU)
    tokens = text(starts=(0, 8, 9, 30))
    tokens[1, 17] = BOS  # rows have documents of their own
    with torch.no_grad():
        whole, state = network(tokens)
    pieces, end = in_pieces(network, tokens, sizes)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)
    assert end.read == state.read == 40
    assert sum(sizes) == 40


def test_positions_matter():
    """Otherwise the splits above would agree whatever positions they were given."""
    tokens = text()
    for name in ("rope", "yarn", "partial"):
        network = model(POSITIONS[name])
        without = model(None)
        without.load_state_dict(network.state_dict())
        with torch.no_grad():
            assert (network(tokens)[0] - without(tokens)[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "scaling", [DynamicNTK(4.0, 8), LongRoPE((1.0,) * 8, (4.0,) * 8, 8, 4.0)], ids=["dynamic", "longrope"]
)
@pytest.mark.parametrize("bos", [None, BOS])
def test_one_layer_whose_scaling_follows_the_length_agrees_where_calls_end(scaling, bos):
    network = model(rotary(scaling), bos, layers=1)
    tokens = text(starts=(0, 5))
    pieces, _ = in_pieces(network, tokens, SPLITS[1])
    ends = torch.tensor(SPLITS[1]).cumsum(0).tolist()
    with torch.no_grad():
        for end in ends:
            torch.testing.assert_close(pieces[:, end - 1], network(tokens[:, :end])[0][:, -1], rtol=0, atol=1e-5)
        assert (pieces - network(tokens)[0])[:, ends[0] - 1].abs().max() > 1e-3  # whose end is another


def test_a_deeper_model_keeps_what_it_made_at_the_length_of_then():
    network = model(rotary(DynamicNTK(4.0, 8)))
    tokens = text()
    pieces, state = in_pieces(network, tokens, [20, 20])
    _, alone = in_pieces(network, tokens[:, :20], [20])
    for cache, before in zip(state.layers, alone.layers, strict=True):
        assert torch.equal(cache.values.memory[..., :20, :], before.values.memory[..., :20, :])
        assert torch.equal(cache.keys.memory[..., :20, :], before.keys.memory[..., :20, :])
    with torch.no_grad():
        assert (pieces - network(tokens)[0])[:, -1].abs().max() > 1e-4


LLAMA = {
    "default": ({"rope_type": "default"}, 1e-5),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        1e-5,
    ),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 1e-5),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, 1e-5),
}


def llama(kind, tied):
    """A Llama of transformers and ours with its weights, whose rows of W_q and W_k are put in our order of channels."""
    transformers = pytest.importorskip("transformers")
    parameters, tolerance = LLAMA[kind]
    parameters = {**parameters, "rope_theta": 100.0}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=24,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        rope_parameters=parameters,
        rms_norm_eps=1e-5,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    for name, weight in theirs.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
    make = partial(Rotary.from_rope_parameters, parameters, max_position_embeddings=24)
    ours = model(
        lambda head_dim, heads: make(head_dim=head_dim),
        layers=3,
        feed=SwiGLU,
        norm=partial(nn.RMSNorm, eps=1e-5),
        tied=tied,
    )
    weights = {"embed.weight": theirs.model.embed_tokens.weight, "norm.weight": theirs.model.norm.weight}
    weights["head.weight"] = theirs.lm_head.weight
    for index, layer in enumerate(theirs.model.layers):
        q, k, v = (getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv")
        q, k = rows_to_interleaved(q, 16), rows_to_interleaved(k, 16)
        named = {
            "norm": layer.input_layernorm.weight,
            "qkv": torch.cat((q, k, v)),
            "out": layer.self_attn.o_proj.weight,
            "feed_norm": layer.post_attention_layernorm.weight,
            "feed.gate": layer.mlp.gate_proj.weight,
            "feed.input": layer.mlp.up_proj.weight,
            "feed.output": layer.mlp.down_proj.weight,
        }
        weights |= {f"blocks.{index}.{name}.weight": weight for name, weight in named.items()}
    ours.load_state_dict(weights)
    return ours, theirs, tolerance


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", LLAMA)
def test_the_logits_of_llama(kind, tied):
    ours, theirs, tolerance = llama(kind, tied)
    tokens = text(length=48)  # past the 24 that dynamic NTK leaves alone
    with torch.no_grad():
        expected = theirs(tokens).logits
        logits, _ = ours(tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_the_gradients_of_llama():
    ours, theirs, _ = llama("default", True)
    tokens = text(length=24)
    theirs(tokens, labels=tokens).loss.backward()
    cross_entropy(ours(tokens)[0][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = theirs.model.embed_tokens.weight.grad
    torch.testing.assert_close(ours.embed.weight.grad, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_decoding_is_llamas():
    ours, theirs, _ = llama("yarn", True)
    tokens = text(length=30)
    with torch.no_grad():
        out = theirs(tokens[:, :20], use_cache=True)
        _, state = ours(tokens[:, :20])
        for token in tokens[:, 20:].split(1, dim=1):
            out = theirs(token, past_key_values=out.past_key_values, use_cache=True)
            logits, state = ours(token, state)
            torch.testing.assert_close(logits, out.logits, rtol=0, atol=1e-5 * out.logits.abs().max().item())


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("at", [1, 11, 39])
def test_no_token_sees_the_future(bos, at):
    network = model(bos=bos)
    tokens = text(starts=(0, 7))
    other = tokens.clone()
    other[:, at] = (other[:, at] + 1) % BOS
    with torch.no_grad():
        before, after = network(tokens)[0], network(other)[0]
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at], after[:, at])


def test_documents_never_see_each_other():
    network = model(bos=BOS)
    tokens = text(starts=(0, 15, 28))
    x = network.embed(tokens).detach().requires_grad_()
    network.embed.register_forward_hook(lambda *_: x)
    logits, _ = network(tokens)
    for first, last in ((0, 15), (15, 28), (28, 40)):
        (slope,) = torch.autograd.grad(logits[:, last - 1].square().sum(), x, retain_graph=True)
        assert (slope[:, first:last].abs().amax(-1) > 0).all()
        assert not slope[:, :first].any()
        assert not slope[:, last:].any()


def test_a_document_is_the_same_wherever_it_stands():
    network = model(bos=BOS)
    tokens = text(starts=(0, 15))
    with torch.no_grad():
        # only differences of positions reach attention, so rounding alone tells position 15 from 0
        torch.testing.assert_close(network(tokens)[0][:, 15:], network(tokens[:, 15:])[0], rtol=0, atol=1e-5)


def test_without_bos_the_token_is_like_any_other():
    tokens = text(starts=(0, 15))
    plain, isolating = model(bos=None), model(bos=BOS)
    isolating.load_state_dict(plain.state_dict())
    with torch.no_grad():
        a, b = plain(tokens)[0], isolating(tokens)[0]
    torch.testing.assert_close(a[:, :15], b[:, :15], rtol=0, atol=1e-5)
    assert (a[:, 15:] - b[:, 15:]).abs().max() > 1e-2


def test_a_state_may_be_read_on_from_twice():
    network = model(bos=BOS)
    tokens = text(starts=(0, 12))
    with torch.no_grad():
        whole, _ = network(tokens)
        _, state = network(tokens[:, :20])
        _, state = network(tokens[:, 20:21], state)  # its memory has room behind it now
        room = state.layers[0].keys.memory.shape[-2]
        assert room > 21
        logits, mine = network(tokens[:, 21:24], state)
        network(text(length=5), state)  # over the same places, were it not told that they are taken
        after, _ = network(tokens[:, 24:], mine)
    torch.testing.assert_close(torch.cat((logits, after), 1), whole[:, 21:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [torch.clone, torch.Tensor.detach], ids=["clone", "detach"])
def test_a_copied_state_reads_on(change):
    network = model(bos=BOS)
    tokens = text(starts=(0, 12))
    with torch.no_grad():
        whole, _ = network(tokens)
        _, state = in_pieces(network, tokens[:, :22], [20, 1, 1])
        copy = mapped(state, change)
        logits, copy = network(tokens[:, 22:25], copy)
        network(text(length=18), state)
        after, _ = network(tokens[:, 25:], copy)
    torch.testing.assert_close(torch.cat((logits, after), 1), whole[:, 22:], rtol=0, atol=1e-5)


def test_a_state_of_other_rows_reads_on():
    """As in a beam search."""
    network = model(bos=BOS)
    tokens = text(starts=(0, 12))
    order = torch.tensor([1, 1, 0])
    with torch.no_grad():
        whole, _ = network(tokens[order])
        _, state = in_pieces(network, tokens[:, :22], [20, 1, 1])
        logits, _ = network(tokens[order][:, 22:], mapped(state, lambda leaf: leaf[order]))
    torch.testing.assert_close(logits, whole[:, 22:], rtol=0, atol=1e-5)


def test_decoding_writes_in_place_into_memory_that_doubles():
    network = model(bos=BOS)
    _, state = in_pieces(network, text(), [40])
    places, sizes = set(), []
    with torch.no_grad():
        for _ in range(100):
            _, state = network(text(length=1), state)
            places.add(state.layers[0].keys.memory.data_ptr())
            sizes.append(state.layers[1].values.memory.shape[-2])
    assert sorted(set(sizes)) == [80, 160]
    assert len(places) == 2
    floats = 2 * 2 * 2 * 160 * 32  # rows, layers, keys and values
    assert nbytes(state) == 4 * floats + 8 * 2 * 160


def test_reading_in_inference_mode_and_out_of_it():
    network = model()
    tokens = text()
    with torch.inference_mode():
        whole, _ = network(tokens)
        _, state = network(tokens[:, :20])
        _, state = network(tokens[:, 20:21], state)
    with torch.no_grad():
        logits, state = network(tokens[:, 21:30], state)
    with torch.inference_mode():
        rest, _ = network(tokens[:, 30:], state)
    torch.testing.assert_close(torch.cat((logits, rest), 1), whole[:, 21:], rtol=0, atol=1e-5)


def test_gradients_through_a_state_are_those_of_one_call():
    network = model(bos=BOS)
    tokens = text(starts=(0, 12))

    def slopes(logits):
        network.zero_grad()
        cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        return [p.grad.clone() for p in network.parameters()]

    whole = slopes(network(tokens)[0])
    state, parts = None, []
    for piece in tokens.split([16, 1, 23], dim=1):
        logits, state = network(piece, state)
        parts.append(logits)
    for ours, expected in zip(slopes(torch.cat(parts, 1)), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert not any(leaf.requires_grad for leaf in (c.keys.memory for c in detach(state).layers))


def test_writing_on_leaves_a_graph_unharmed():
    """Memory that a backward pass needs is never written to."""
    network = model()
    tokens = text()
    logits, state = network(tokens[:, :20])
    with torch.no_grad():
        _, state = network(tokens[:, 20:21], detach(state))
        network(tokens[:, 21:], state)
    logits.sum().backward()


def test_appending_converts_and_grows():
    memory = append(append_nothing(), torch.ones(1, 3), -1)[0]
    grown, content = append(memory, torch.full((1, 2), 2.0, dtype=torch.float64), -1)
    assert content.tolist() == [[1, 1, 1, 2, 2]]
    assert (content.dtype, grown.size, grown.memory.shape) == (torch.float64, 5, (1, 6))


def append_nothing():
    return model().initial(1).layers[0].keys._replace(memory=torch.empty(1, 0))


@pytest.mark.parametrize("bos", [None, BOS])
def test_checkpointing_changes_nothing(bos):
    tokens = text(starts=(0, 12))
    plain, saving = model(bos=bos), model(bos=bos, checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    kept = {}
    for network in (plain, saving):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            logits, _ = network(tokens)
        cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        kept[network] = sum(sizes)
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6)
    assert kept[saving] < kept[plain] / 2


@pytest.mark.parametrize("bos", [None, BOS])
def test_training_compiles_to_one_graph(bos):
    torch._dynamo.reset()
    network = model(rotary(YaRN(4.0, 12)), bos, feed=SwiGLU, layers=1)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    tokens = text(starts=(0, 12))
    slopes = {}
    for each in (network, compiled):
        network.zero_grad()
        logits, state = each(tokens)
        cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        slopes[each] = [logits.detach(), *(p.grad.clone() for p in network.parameters())]
    for ours, expected in zip(slopes[compiled], slopes[network], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    with torch.no_grad():  # the state of a compiled call serves one that isn't
        after, _ = network(tokens[:, :5], state)
        torch.testing.assert_close(after, network(tokens.repeat(1, 2)[:, :45])[0][:, 40:], rtol=0, atol=1e-5)
    torch._dynamo.reset()


def test_every_turn_gets_unturned_queries_and_keys():
    """What diagnostics hook into."""
    network, given, tokens = model(), [], text()
    for module in network.modules():
        if isinstance(module, Turn):
            module.register_forward_pre_hook(lambda _, arguments: given.append(arguments))
    with torch.no_grad():
        network(tokens)
        block = network.blocks[0]
        projected = block.qkv(block.norm(network.embed(tokens)))
    assert len(given) == 2
    q, k, position, *_ = given[0]
    assert torch.equal(torch.stack((q, k)).permute(1, 3, 0, 2, 4).flatten(2), projected[..., :64])
    assert position.flatten().tolist() == list(range(40))


def test_feed_forward_layers_are_their_formulas():
    x = torch.randn(2, 3, 8)
    plain, gated = GELU(8, 20, bias=True), SwiGLU(8, 20)
    expected = nn.Sequential(plain.input, nn.GELU(), plain.output)(x)
    torch.testing.assert_close(plain(x), expected)
    gate = x @ gated.gate.weight.T
    torch.testing.assert_close(
        gated(x), (gate * gate.sigmoid() * (x @ gated.input.weight.T)) @ gated.output.weight.T, rtol=0, atol=1e-6
    )
    assert sum(p.numel() for p in GELU(8, 30).parameters()) == sum(p.numel() for p in gated.parameters())


def test_weights_at_first():
    network = TransformerLM(257, None, width=192, layers=8, heads=4, hidden=768, context=64, feed=GELU)
    for block in network.blocks:
        for weight, std in ((block.qkv.weight, 0.04), (block.out.weight, 0.01), (block.feed.output.weight, 0.01)):
            assert weight.std().item() == pytest.approx(std, rel=0.03)
    assert network.embed.weight.std().item() == pytest.approx(0.04, rel=0.03)
    assert network.head.weight is network.embed.weight
    with torch.no_grad():
        loss = cross_entropy(network(torch.randint(257, (2, 64)))[0].flatten(0, 1), torch.randint(257, (128,)))
    spread = 192 * 0.04**2  # variance of a logit: half of it joins the loss of a guess
    assert loss.item() == pytest.approx(torch.tensor(257.0).log().item() + spread / 2, abs=0.1)


def test_what_a_model_tells_of_itself():
    network = model(rotary(learnable=True), BOS)
    assert (network.vocabulary, network.bos, network.reach) == (VOCABULARY, BOS, 23)
    assert network.rotaries() == [network.blocks[1].turn.rotary]
    assert network.no_weight_decay() == {"embed.weight", "blocks.0.turn.rotary.frequencies"}
    assert model(None).rotaries() == []
    assert model(tied=False).no_weight_decay() == {"embed.weight", "head.weight"}
    assert nbytes(network.initial(3)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "5 heads don't divide a width of 32"),
        ({"bos": VOCABULARY}, "bos=61 is none of the 61 tokens"),
        ({"rotary": partial(Rotary, Axial(100.0))}, "text has one axis, the rotary has 2"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_input_that_does_not_fit_is_named():
    network = model()
    with pytest.raises(ValueError, match="token 61 is outside the vocabulary of 61"):
        network(torch.tensor([[3, 61]]))
    with pytest.raises(ValueError, match="token -1 is outside"):
        network(torch.tensor([[3, -1]]))
    with pytest.raises(ValueError, match=r"shape \(2, 0\)"):
        network(text(length=0))
    with pytest.raises(ValueError, match="another model or batch"):
        network(text(rows=3), network.initial(2))
    with pytest.raises(ValueError, match="another model or batch"):
        network(text(), model(layers=3).initial(2))


@pytest.mark.gpu
@pytest.mark.parametrize("bos", [None, BOS])
def test_bf16_on_a_gpu_in_pieces(bos):
    network = model(bos=bos).cuda()
    tokens = text(starts=(0, 12)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        whole, _ = network(tokens)
        pieces, _ = in_pieces(network, tokens, [7, 1, 1, 31])
    # bf16 rounds logits of order 1 to 2⁻⁸, through two layers
    torch.testing.assert_close(pieces, whole, rtol=0, atol=2**-4)
