"""The delta bank: its parallel form is the recurrence, any split reads the same, and documents and chunks see only the past."""

import math
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from models.delta_bank import DeltaBank, delta_chunks, delta_reference
from models.memory_lm import MemoryLM
from models.states import leaves
from models.stream import advance, begin

WIDTH, HEADS = 12, 3
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def writes(b=2, k=3, h=2, t=7, d=4, dtype=torch.float64, strong=False):
    """Random arguments of the two forms; a fifth of the tokens are left out, and chunks begin anew here and there."""
    key = torch.nn.functional.normalize(torch.randn(b, k, h, t, d, dtype=dtype), dim=-1)
    strength = torch.rand(b, k, h, t, dtype=dtype) * (torch.rand(b, k, h, t) > 0.2)
    decay = -torch.rand(b, k, h, t, dtype=dtype) * (20.0 * (torch.rand(b, k, h, t) > 0.9) if strong else 0.1)
    parts = torch.randn(b, h, d, d, dtype=dtype), key, torch.randn_like(key), strength, decay
    return [part.requires_grad_() for part in parts], torch.rand(b, k) > 0.4


def read(bank, x, starts, chunk, sizes, **options):
    """Reads (b, n, h, d) and the last state of tokens x (b, n, c) fed in pieces of these sizes."""
    assert sum(sizes) == x.shape[1]
    stream, state, reads = begin(len(x), chunk, False), bank.initial(len(x)), []
    for piece, begins in zip(x.split(sizes, 1), starts.split(sizes, 1), strict=True):
        span, stream = advance(stream, begins, chunk, window=None, blocks=False, **options)
        out, state = bank(piece.unflatten(1, (span.continues.shape[1], -1)), state, span)
        reads.append(out.flatten(1, 2))
    return torch.cat(reads, 1), state


def splits(n, chunk, generator):
    """Random pieces that end at every chunk's end, or take some whole chunks."""
    sizes, done = [], 0
    while done < n:
        left = n - done
        room = chunk - done % chunk
        whole = left // chunk
        if room == chunk and whole and torch.rand((), generator=generator) < 0.5:
            size = chunk * int(torch.randint(1, whole + 1, (), generator=generator))
        else:
            size = int(torch.randint(1, min(room, left) + 1, (), generator=generator))
        sizes.append(size)
        done += size
    return sizes


def defined(bank, x, starts, chunk):
    """What tokens of one row read, x (n, c), written from the definition, token by token."""
    heads, size = bank.heads, x.shape[-1] // bank.heads
    query, (key, value) = bank.query(x), bank.key_value(x).chunk(2, -1)
    document = starts.cumsum(0).tolist()
    if bank.convolution is not None:
        made = torch.zeros_like(key)
        for t in range(len(x)):
            for back in range(bank.taps):
                if t >= back and document[t - back] == document[t]:
                    made[t] += bank.convolution[-1 - back] * key[t - back]
        key = made
    query, key, value = (part.unflatten(-1, (heads, size)) for part in (query, key, value))
    query, key = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (query, key))
    beta = torch.sigmoid(x @ bank.write_gate.weight.T + bank.write_gate_bias)
    alpha = torch.ones_like(beta)
    if bank.decay_gate is not None:
        alpha = 1 / (1 + torch.exp(x @ bank.decay_gate.weight.T + bank.decay_gate_bias))
    stored, holds, out = x.new_zeros(heads, size, size), None, []
    for begun in range(0, len(x), chunk):
        here = range(begun, min(begun + chunk, len(x)))
        out += [
            stored @ query[t, :, :, None] if document[t] == holds else query.new_zeros(heads, size, 1) for t in here
        ]
        last = document[here[-1]]
        stored = stored if last == holds else torch.zeros_like(stored)
        for t in here:
            if document[t] == last:
                k, v = key[t, :, :, None], value[t, :, :, None]
                b, a = beta[t, :, None, None], alpha[t, :, None, None]
                stored = a * stored @ (torch.eye(size, dtype=x.dtype) - b * k @ k.mT) + b * v @ k.mT
        holds = last
    return torch.stack(out)[..., 0], stored


def quick(dtype=torch.float32, **options):
    """A bank whose gates move and whose memory fades within a few tokens, so that every part of the rule counts."""
    bank = DeltaBank(WIDTH, HEADS, half_lives=(2, 30), strength=0.4, **options)
    return bank.to(dtype)


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [64, 7, 3, 2, 1])
def test_the_parallel_form_is_the_recurrence_in_values_and_gradients(block, dtype, strong):
    parts, continues = writes(dtype=dtype, strong=strong)
    plain, fast = (
        torch.stack(form(*parts, continues)) for form in (delta_reference, partial(delta_chunks, block=block))
    )
    into = torch.randn_like(plain)
    assert torch.allclose(plain, fast, rtol=0, atol=TOLERANCE[dtype])
    for one, other in zip(torch.autograd.grad(plain, parts, into), torch.autograd.grad(fast, parts, into), strict=True):
        assert one.abs().max() > (0.0 if strong else 0.01)
        assert torch.allclose(one, other, rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])  # sums of tens of terms


def test_long_chunks_of_like_keys_and_full_strength_stay_exact():
    """The worst case of the solve: hundreds of nearly equal keys, each of which overwrites the one before."""
    (state, key, value, strength, decay), continues = writes(b=1, k=2, h=1, t=300, d=16, dtype=torch.float32)
    key = torch.nn.functional.normalize(key[..., :1, :] + 0.05 * torch.randn_like(key), dim=-1)
    parts = state, key, value, torch.full_like(strength, 0.99), 0.01 * decay
    plain, fast = delta_reference(*parts, continues), delta_chunks(*parts, continues)
    exact = delta_reference(*(part.double() for part in parts), continues)
    error = [max((a - b).abs().max().item() for a, b in zip(form, exact, strict=True)) for form in (plain, fast)]
    assert error[1] < max(4 * error[0], 1e-5)


def test_a_stored_value_comes_back_and_a_new_one_takes_its_place():
    one, two = torch.eye(4, dtype=torch.float64)[:2]
    old, new, beside = torch.randn(3, 4, dtype=torch.float64)

    def stored(keys, values, strength, log_decay=0.0):
        key, value = torch.stack(keys)[None, None, None], torch.stack(values)[None, None, None]
        full = torch.full(key.shape[:-1], strength, dtype=key.dtype)
        nothing = key.new_zeros(1, 1, 4, 4)
        return delta_chunks(nothing, key, value, full, log_decay * torch.ones_like(full), torch.ones(1, 1).bool())[0][
            0, 0
        ]

    state = stored([one, two, one], [old, beside, new], 1.0)
    assert torch.allclose(state @ one, new)
    assert torch.allclose(state @ two, beside)
    assert torch.allclose(stored([one, one], [old, new], 0.25) @ one, 0.75 * 0.25 * old + 0.25 * new)
    assert torch.allclose(stored([one, two], [old, beside], 1.0, math.log(0.5)) @ one, 0.5 * old)


@pytest.mark.parametrize(("decay", "taps"), [(True, 4), (False, 4), (True, 1), (True, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [2, 4, 5, 8])
def test_any_split_reads_what_the_definition_says(chunk, dtype, decay, taps):
    generator = torch.Generator().manual_seed(chunk)
    bank = quick(dtype, decay=decay, taps=taps)
    for trial in range(6):
        n = int(torch.randint(3 * chunk, 7 * chunk, (), generator=generator))
        x = torch.randn(3, n, WIDTH, dtype=dtype, generator=generator)
        starts = torch.rand(3, n, generator=generator) < (0, 0.05, 0.1, 0.3, 0.6, 0.05)[trial]
        wanted, stored = zip(*(defined(bank, *row, chunk) for row in zip(x, starts, strict=True)), strict=True)
        wholes = [n // chunk * chunk, n % chunk] if n % chunk else [n]
        for sizes in ([1] * n, wholes, splits(n, chunk, generator), splits(n, chunk, generator)):
            found, state = read(bank, x, starts, chunk, sizes)
            assert torch.allclose(found, torch.stack(wanted), rtol=0, atol=TOLERANCE[dtype])
            assert torch.allclose(state.running, torch.stack(stored), rtol=0, atol=TOLERANCE[dtype])
        assert trial > 2 or found.abs().max() > 0.1


def test_a_value_is_stored_under_the_token_before_it():
    """A convolution that looks one token back: what is asked with a key gets the value that followed it."""
    bank = DeltaBank(8, 2, decay=False, strength=0.999, taps=2)
    with torch.no_grad():
        bank.convolution.copy_(torch.tensor([[1.0], [0.0]]).expand(2, 8))
        bank.query.weight.copy_(torch.eye(8))
        bank.key_value.weight.copy_(torch.eye(8).repeat(2, 1))
        bank.write_gate.weight.zero_()
        x = torch.eye(4).repeat(1, 2)[None]  # in both heads: tokens 0, 1, 2, 3
        told = torch.cat((x, x[:, :1] * 0, x[:, [0, 2]], x[:, :1] * 0), 1)  # then nothing, 0 and 2 ask
        out, _ = read(bank, told, torch.zeros(1, 8, dtype=torch.bool), 4, [8])
    torch.testing.assert_close(out[0, 5:7].flatten(1), x[0, [1, 3]], atol=2e-3, rtol=0)


def test_gradients_are_those_of_any_split():
    chunk, n = 4, 22
    generator = torch.Generator().manual_seed(3)
    bank, x = quick(torch.float64), torch.randn(2, n, WIDTH, dtype=torch.float64).requires_grad_()
    starts = torch.rand(2, n) < 0.08
    into = torch.randn(2, n, HEADS, WIDTH // HEADS, dtype=torch.float64)
    found = []
    for sizes in ([1] * n, [20, 2], splits(n, chunk, generator)):
        out, _ = read(bank, x, starts, chunk, sizes)
        found.append(torch.autograd.grad(out, (x, *bank.parameters()), into))
    for one, *others in zip(*found, strict=True):
        assert one.abs().max() > 1e-3
        assert all(torch.allclose(one, other, rtol=0, atol=1e-10) for other in others)


def test_a_chunk_is_read_by_later_ones_alone():
    chunk, bank = 5, quick()
    x, starts = torch.randn(1, 20, WIDTH), torch.zeros(1, 20, dtype=torch.bool)
    changed = x.clone()
    changed[:, 7] += 1
    before, after = (read(bank, tokens, starts, chunk, [20])[0] for tokens in (x, changed))
    differs = (before != after).any(-1).any(-1)[0]
    # Token 7 asks another question itself; nothing else of its chunk or before it may notice.
    assert differs.tolist() == [False] * 7 + [True] + [False] * 2 + [True] * 10
    assert not before[:, :chunk].any()


def test_documents_are_closed_to_each_other():
    chunk, bank = 4, quick()
    for start in range(1, 12):
        x = torch.randn(1, 20, WIDTH, requires_grad=True)
        starts = torch.zeros(1, 20, dtype=torch.bool)
        starts[:, start] = True
        for sizes in ([20], [1] * 20, [4, 8, 3, 1, 4]):
            out, _ = read(bank, x, starts, chunk, sizes)
            gradient = torch.autograd.grad(out[:, start:].square().sum(), x)[0]
            assert not gradient[:, :start].any()
            assert gradient[:, start:].any()


def test_without_reads_the_memory_is_written_as_ever():
    bank, x, starts = quick(), torch.randn(2, 12, WIDTH), torch.zeros(2, 12, dtype=torch.bool)
    out, silent = read(bank, x, starts, 4, [8, 3, 1], reads=False)
    heard, state = read(bank, x, starts, 4, [8, 3, 1])
    assert out.shape == heard.shape
    assert not out.any()
    assert heard.any()
    assert all(torch.equal(*pair) for pair in zip(silent, state, strict=True))


def test_memories_begin_with_the_half_lives_and_the_strength_asked_for():
    bank = DeltaBank(64, 4, half_lives=(1000, 8000), strength=0.1)
    strength, log_decay = bank.gates(torch.zeros(64))
    assert torch.allclose(strength, torch.full((4,), 0.1))
    tokens = math.log(0.5) / log_decay.double()
    assert torch.allclose(tokens, torch.tensor([1000.0, 2000, 4000, 8000]).double(), rtol=1e-4)


def test_of_many_random_writes_as_much_is_left_as_the_docstring_says():
    writes, size, beta = 300, 16, 0.05
    key = torch.nn.functional.normalize(torch.randn(1, 1, 64, writes, size), dim=-1)
    nothing = torch.zeros(1, 1, 64, writes)
    eye = torch.eye(size).expand(1, 64, size, size)
    left = delta_chunks(eye, key, torch.zeros_like(key), nothing + beta, nothing, torch.ones(1, 1).bool())[0]
    kept = left.diagonal(dim1=-2, dim2=-1).mean()
    assert kept == pytest.approx(math.exp(-beta * writes / size), rel=0.05)


def test_the_state_has_the_floats_the_docstring_says_for_ever():
    bank = DeltaBank(48, 4)
    state, stream = bank.initial(1), begin(1, 4, False)
    for _ in range(50):
        starts = torch.zeros(1, 8, dtype=torch.bool)
        span, stream = advance(stream, starts, 4, window=None, blocks=False)
        with torch.no_grad():
            _, state = bank(torch.randn(1, 2, 4, 48), state, span)
        assert sum(part.numel() for part in state) == 2 * 48**2 // 4 + 3 * 48
        assert sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in state}.values()) <= (
            4 * (2 * 48**2 // 4 + 3 * 48)
        )
    assert torch.equal(state.committed, state.running)


def test_the_state_stays_float32_in_bfloat16():
    x, starts = torch.randn(2, 21, WIDTH), torch.rand(2, 21) < 0.05
    bank = quick()
    plain, exact = read(bank, x, starts, 4, [20, 1])
    with torch.autocast("cpu", torch.bfloat16):
        mixed, state = read(bank, x, starts, 4, [20, 1])
    assert {part.dtype for part in (mixed, *state)} == {torch.float32}
    # Keys, values and queries carry eight bits; the state must not lose more by summing them.
    assert 0 < (mixed - plain).abs().max() < 0.02 * plain.abs().max()
    assert 0 < (state.running - exact.running).abs().max() < 0.02 * exact.running.abs().max()
    small = quick().to(torch.bfloat16)
    assert {part.dtype for part in (*small.initial(2), *read(small, x.bfloat16(), starts, 4, [20, 1])[1])} == {
        torch.float32
    }


@pytest.mark.parametrize("size", [1, 12])
def test_it_compiles_to_one_graph(size):
    bank, counter = quick(), CompileCounter()
    stream = begin(2, 4, False)
    span, _ = advance(stream, torch.zeros(2, size, dtype=torch.bool), 4, window=None, blocks=False)
    x = torch.randn(2, span.continues.shape[1], size // span.continues.shape[1], WIDTH)
    compiled = torch.compile(bank, backend=counter, fullgraph=True)
    for one, other in zip(
        leaves(compiled(x, bank.initial(2), span)), leaves(bank(x, bank.initial(2), span)), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-6)
    assert counter.frame_count == 1


def model(**options):
    return MemoryLM(
        vocabulary=11, bos=0, width=16, layers=2, heads=2, chunk=5, rotary=None, bank=DeltaBank, hidden=32, **options
    )


def test_in_a_model_one_call_is_token_by_token():
    net, tokens = model().double(), torch.randint(11, (3, 33))
    once, _ = net(tokens)
    state, one = None, []
    for token in tokens.split(1, 1):
        logits, state = net(token, state)
        one.append(logits)
    assert torch.allclose(once, torch.cat(one, 1), rtol=0, atol=1e-10)
    assert not torch.allclose(once, net(tokens, reads=False)[0], rtol=0, atol=1e-6)


def test_what_writes_learns_from_the_second_chunk_on():
    net = model()
    for chunks, learns in ((1, False), (2, True)):
        net.zero_grad()
        net(torch.randint(1, 11, (2, 5 * chunks)))[0].logsumexp(-1).sum().backward()
        for block in net.blocks:
            for parameter in block.bank.parameters():
                assert (parameter.grad is not None and bool(parameter.grad.any())) == learns


def test_gates_survive_the_model_initialiser():
    net = model()
    fresh = DeltaBank(16, 2)
    for block in net.blocks:
        assert all(
            torch.equal(*pair) for pair in zip(block.bank.gate_parameters(), fresh.gate_parameters(), strict=True)
        )
    assert {name.rsplit(".")[-1] for name in net.gate_parameters()} >= {"write_gate_bias", "decay_gate_bias"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 10, "heads": 3}, "3 heads don't divide a width of 10"),
        ({"width": 8, "heads": 2, "strength": 1.0}, "strength is 1.0"),
        ({"width": 8, "heads": 2, "taps": 0}, "taps is 0"),
        ({"width": 8, "heads": 2, "half_lives": (0, 5)}, r"half_lives are \(0, 5\)"),
    ],
)
def test_sizes_that_cannot_be_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeltaBank(**arguments)
