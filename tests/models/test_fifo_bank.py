"""The FIFO bank against numbers worked by hand: the write, the read, ages, pooling, eviction and how long a value lives."""

import pytest
import torch
from torch.nn import functional

from models.fifo_bank import AttentionPool, FifoBank, FifoState, MeanPool, ages, recall
from models.fusion import Fusion, ScalarFusion, TokenFusion
from models.stream import advance, begin


def bank(**others) -> FifoBank:
    """Two channels, two slots, one writer that pools by the mean; an identity for the candidate and a gate of one half."""
    made = FifoBank(**{"width": 2, "heads": 1, "slots": 2, "pool": MeanPool, **others})
    with torch.no_grad():
        made.candidate.weight.copy_(torch.eye(2))
        for zero in (made.candidate.bias, made.gate.weight, made.gate.bias):
            zero.zero_()
    return made


def span_of(rows=1, tokens=1, chunk=1, starts=None, stream=None):
    starts = torch.zeros(rows, tokens, dtype=torch.bool) if starts is None else starts
    return advance(stream or begin(rows, chunk, False), starts, chunk, window=None, blocks=False)


@pytest.mark.parametrize(
    ("chained", "expected"), [(True, [0.59868766, 0.18997448]), (False, [0.34868766, -0.06002552])]
)
def test_the_worked_write(chained, expected):
    made = bank(chained=chained)
    state = made.initial(1)._replace(memory=torch.tensor([[[[0.5, -0.5]], [[1.0, 0.0]]]]), writes=torch.tensor([2]))
    stream = begin(1, 1, False)._replace(remembered=torch.zeros(1, dtype=torch.int64))
    span, _ = span_of(stream=stream)
    _, after = made(torch.tensor([[[[0.2, 0.4]]]]), state, span)
    torch.testing.assert_close(after.memory[0, 0, 0], torch.tensor(expected), atol=1e-6, rtol=0)
    assert torch.equal(after.memory[0, 1, 0], torch.tensor([1.0, 0.0]))
    assert after.writes.tolist() == [3]


def test_the_first_write_has_no_partner():
    made = bank()
    _, after = made(torch.tensor([[[[0.2, 0.4]]]]), made.initial(1), span_of()[0])
    expected = torch.tensor([0.19737532, 0.37994896])
    torch.testing.assert_close(after.memory[0, 0, 0], expected, atol=1e-6, rtol=0)
    assert (after.memory[0, 1] == 0).all()


@pytest.mark.parametrize(("writes", "expected"), [(1, [0]), (4, [3, 2, 1, 0]), (6, [1, 0, 3, 2])])
def test_ages(writes, expected):
    assert ages(torch.tensor(writes), 4)[: len(expected)].tolist() == expected


def test_one_valid_slot_shares_with_the_null_slot():
    values = torch.tensor([[2.0, 4.0], [9.0, 9.0]])
    read = recall(torch.tensor([[0.0, -torch.inf]]), torch.zeros(1)) @ values
    torch.testing.assert_close(read, torch.tensor([[1.0, 2.0]]))
    assert (recall(torch.full((1, 2), -torch.inf), torch.zeros(1)) == 0).all()


@pytest.mark.parametrize("tokens", [1, 3, 7])  # fewer than slots, or more
def test_reading_is_attention_with_a_null_slot(tokens):
    made = FifoBank(width=8, heads=2, slots=6, writers=2)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    x, memories, writes = torch.randn(2, 3, tokens, 8), torch.randn(2, 3, 3, 2, 8), torch.randint(0, 9, (2, 3))
    recalls = torch.rand(2, 3, tokens) > 0.3
    slots = made.norm(memories.flatten(2, 3))
    queries = made.query(x).unflatten(-1, (2, 4)).transpose(-2, -3)
    keys, values = (part.unflatten(-1, (2, 4)).transpose(-2, -3) for part in made.key_value(slots).chunk(2, -1))
    keys = torch.cat((made.null[:, None].expand(2, 3, -1, -1, -1), keys), -2)
    age = ages(writes, 3).repeat_interleave(2, -1)
    valid = (torch.arange(6) // 2 < writes[..., None])[..., None, :] & recalls[..., None]
    mask = torch.where(valid, 0.0, -torch.inf)[:, :, None] + made.age_bias[:, age].movedim(0, 2)[..., None, :]
    expected = functional.scaled_dot_product_attention(
        queries, keys, functional.pad(values, (0, 0, 1, 0)), attn_mask=functional.pad(mask, (1, 0))
    )
    torch.testing.assert_close(made._read(x, memories, writes, recalls).transpose(-2, -3), expected)


def test_pooling_is_one_softmax_over_the_chunk_whatever_the_pieces():
    made = FifoBank(width=8, heads=2, slots=4, writers=2)
    torch.nn.init.normal_(made.pool.query)
    x = torch.randn(3, 12, 8)
    expected = made.pool(x).softmax(-1) @ made.pool.value(x)
    state, stream = made.initial(3), begin(3, 16, False)
    for piece in x.split([5, 1, 6], 1):
        span, stream = advance(stream, torch.zeros(3, piece.shape[1], dtype=torch.bool), 16, window=None, blocks=False)
        _, state = made(piece[:, None], state, span)
    torch.testing.assert_close(made.pool.summary(state.sums / state.mass[..., None]), expected)


def test_writers_pool_the_last_document_alone():
    made = FifoBank(width=8, heads=2, slots=4, writers=2)
    x = torch.randn(1, 1, 6, 8)
    starts = torch.tensor([[False, False, True, False, False, False]])
    span, _ = advance(begin(1, 6, False), starts, 6, window=None, blocks=False)
    _, whole = made(x, made.initial(1), span)
    span, _ = advance(begin(1, 4, False), starts[:, 2:], 4, window=None, blocks=False)
    _, last = made(x[:, :, 2:], made.initial(1), span)
    torch.testing.assert_close(whole.memory, last.memory)


def test_the_oldest_group_goes_first_and_a_value_is_handed_on():
    """With an open gate slots hold the newest chunks; with a shut one the first value is handed on for ever."""
    x = torch.arange(1.0, 8.0)[None, :, None, None].expand(1, 7, 1, 2) / 10  # seven chunks of one token
    stream = begin(1, 1, False)
    span, _ = advance(stream, torch.zeros(1, 7, dtype=torch.bool), 1, window=None, blocks=False)
    for gate_bias, expected in ((50.0, [0.5, 0.6, 0.7, 0.4]), (-50.0, [0.1] * 4)):
        made = bank(slots=4, gate_bias=gate_bias)
        made.reset_gates()
        _, state = made(x, made.initial(1), span)
        torch.testing.assert_close(state.memory[0, :, 0, 0], torch.tensor(expected).tanh())


def test_a_new_document_clears_the_bank():
    made = bank(slots=4)
    x = torch.randn(1, 3, 1, 2)
    starts = torch.tensor([[False, False, True]])
    span, _ = advance(begin(1, 1, False), starts, 1, window=None, blocks=False)
    _, state = made(x, made.initial(1), span)
    assert state.writes.tolist() == [1]
    assert (state.memory[0, 1:] == 0).all()


def test_mean_pool_is_the_mean():
    pool, x = MeanPool(4, 3), torch.randn(2, 5, 4)
    torch.testing.assert_close(pool.summary(pool(x).softmax(-1) @ x), x.mean(1, keepdim=True).expand(-1, 3, -1))


def test_attending_writers_are_queries_over_keys():
    pool, x = AttentionPool(4, 3), torch.randn(2, 5, 4)
    torch.testing.assert_close(pool(x), pool.query @ pool.key(x).mT / 2)


def test_fusion_weights():
    scalar = ScalarFusion(8, 2, 3)
    with torch.no_grad():
        scalar.logits.copy_(torch.tensor([[2.0, 0.0, -1.0]]))
    expected = torch.tensor([0.84379473, 0.11419520, 0.04201007])
    torch.testing.assert_close(scalar(torch.randn(1, 1, 5, 8)).flatten(), expected, atol=1e-6, rtol=0)
    for kind in (Fusion, ScalarFusion, TokenFusion):
        made = kind(8, 2, 3)
        if kind is TokenFusion:
            made.reset_gates()
        weights = made(torch.randn(1, 1, 5, 8))
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))


def test_state_types():
    assert isinstance(bank().initial(2), FifoState)
    with pytest.raises(ValueError, match="3 writers don't divide 8 slots"):
        FifoBank(width=8, heads=2, slots=8, writers=3)
    with pytest.raises(ValueError, match="3 heads"):
        FifoBank(width=8, heads=3, slots=8)
