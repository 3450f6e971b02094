"""Prompts read by pieces, and what may be drawn: laws of top-k and top-p, repeatability, and when to stop."""

from functools import partial

import pytest
import torch

from models.generate import generate, prefill, probabilities, sample
from models.states import nbytes
from models.transformer_lm import TransformerLM
from rotary import Rotary
from rotary.frequencies import Geometric

VOCABULARY, BOS = 31, 30


@pytest.fixture
def model():
    rotary = partial(Rotary, Geometric(100.0))
    made = TransformerLM(VOCABULARY, BOS, width=32, layers=2, heads=2, hidden=48, context=24, rotary=rotary)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture
def logits():
    return 2 * torch.randn(64, 50)


def collect(*arguments, **options):
    return torch.stack(list(generate(*arguments, **options)), 1)


class Counting:
    """A model that notes how many tokens every call gets."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, tokens, state):
        self.calls.append(tokens.shape[1])
        return self.model(tokens, state)


def test_a_prompt_by_pieces_is_the_prompt(model):
    tokens = torch.randint(0, VOCABULARY, (3, 50))
    with torch.no_grad():
        whole, end = model(tokens)
    parts = tokens.split([1, 30, 19], dim=1)
    for given in (tokens, iter(parts), [*parts, tokens[:, :0]]):
        counting = Counting(model)
        last, state = prefill(counting, given, piece=8)
        torch.testing.assert_close(last, whole[:, -1], rtol=0, atol=1e-5)
        assert (state.read, sum(counting.calls), max(counting.calls)) == (end.read, 50, 8)
        assert not last.requires_grad
        assert last.untyped_storage().nbytes() == last.nbytes
    _, state = prefill(model, tokens[:, :20])
    torch.testing.assert_close(prefill(model, tokens[:, 20:], state, piece=7)[0], whole[:, -1], rtol=0, atol=1e-5)


def test_a_prompt_without_tokens_is_refused(model):
    for empty in ([], torch.zeros(1, 0, dtype=torch.int64), iter([torch.zeros(1, 0, dtype=torch.int64)])):
        with pytest.raises(ValueError, match="the prompt has no token"):
            prefill(model, empty)
    with pytest.raises(ValueError, match="piece=0"):
        prefill(model, torch.zeros(1, 1, dtype=torch.int64), piece=0)


def test_probabilities_without_limits_are_the_softmax(logits):
    torch.testing.assert_close(probabilities(logits), logits.softmax(-1))
    torch.testing.assert_close(probabilities(logits, temperature=0.5), (logits / 0.5).softmax(-1))
    torch.testing.assert_close(probabilities(logits.bfloat16()), logits.bfloat16().float().softmax(-1))


@pytest.mark.parametrize("k", [1, 2, 7, 50, 1000])
def test_top_k_keeps_the_k_most_probable_in_proportion(logits, k):
    chances, all_of_them = probabilities(logits, top_k=k), logits.softmax(-1)
    kept = chances > 0
    assert (kept.sum(-1) == min(k, 50)).all()
    lowest_kept = torch.where(kept, logits, torch.inf).amin(-1)
    assert (torch.where(kept, -torch.inf, logits).amax(-1) < lowest_kept).all()
    share = torch.where(kept, all_of_them, 0)
    torch.testing.assert_close(chances, share / share.sum(-1, keepdim=True))


def test_top_k_keeps_k_of_equal_tokens():
    assert (probabilities(torch.zeros(1, 9), top_k=4) > 0).sum() == 4


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_of_that_mass(logits, p):
    chances, mass = probabilities(logits, top_p=p), logits.softmax(-1)
    for row in range(len(logits)):
        kept = chances[row] > 0
        inside = mass[row][kept]
        # cumulative sums of 50 float32
        assert inside.sum() >= p - 1e-6
        assert inside.sum() - inside.min() < p + 1e-6
        assert kept.all() or mass[row][~kept].max() <= inside.min()
        torch.testing.assert_close(chances[row][kept], inside / inside.sum())


def test_top_p_counts_the_mass_of_what_top_k_left():
    chances = probabilities(torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log(), top_k=2, top_p=0.7)
    assert chances.tolist() == [[1, 0, 0, 0]]  # 0.5 of 0.7 is over 0.7
    assert (probabilities(torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log(), top_p=0.6) > 0).sum() == 2


def test_greedy_ways_are_the_argmax(logits):
    best = logits.argmax(-1)
    for options in ({"top_k": 1}, {"temperature": 0}, {"top_p": 1e-6}, {"temperature": 1e-30}):
        assert torch.equal(sample(logits, **options), best), options


def test_draws_follow_the_probabilities_and_never_leave_the_set():
    logits = torch.tensor([[1.0, 0.0, -0.5, 2.0, 0.7]]).expand(20_000, -1)
    options = {"top_k": 4, "top_p": 0.9, "temperature": 1.3}
    chances = probabilities(logits[:1], **options)[0]
    drawn = sample(logits, **options, generator=torch.Generator().manual_seed(0)).bincount(minlength=5) / 20_000
    assert 2 < (chances > 0).sum() < 5
    assert ((drawn > 0) == (chances > 0)).all()
    assert (drawn - chances).abs().max() < 4 * (0.25 / 20_000) ** 0.5  # four standard deviations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 must lie in"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": float("inf")}, "temperature=inf"),
    ],
)
def test_what_can_not_be_sampled_by_is_named_at_the_call(model, logits, options, message):
    with pytest.raises(ValueError, match=message):
        sample(logits, **options)
    with pytest.raises(ValueError, match=message):
        generate(model, logits, None, 3, **options)


def test_greedy_writing_is_reading_all_again_for_every_token(model):
    tokens = torch.randint(0, BOS, (2, 12))
    written = collect(model, *prefill(model, tokens), 15, temperature=0)
    for _ in range(15):
        with torch.no_grad():
            tokens = torch.cat((tokens, model(tokens)[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(written, tokens[:, 12:])


def test_a_generator_repeats_what_was_written(model):
    logits, state = prefill(model, torch.randint(0, BOS, (4, 12)))
    drawn = [
        collect(model, logits, state, 20, top_p=0.95, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0].shape == (4, 20)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_tokens_come_as_they_are_drawn_and_the_last_is_not_read(model):
    logits, state = prefill(model, torch.randint(0, BOS, (1, 4)))
    counting = Counting(model)
    stream = generate(counting, logits, state, 3)
    assert counting.calls == []
    next(stream)
    assert counting.calls == []
    next(stream)
    assert counting.calls == [1]
    next(stream)
    with pytest.raises(StopIteration) as ended:
        next(stream)
    assert counting.calls == [1, 1]
    assert ended.value.value.read == 6
    assert nbytes(ended.value.value) > 0


def test_gradients_stay_on_for_the_caller(model):
    logits, state = prefill(model, torch.randint(0, BOS, (1, 4)))
    for _ in generate(model, logits, state, 3):
        assert torch.is_grad_enabled()


def test_rows_stop_one_by_one():
    script = torch.tensor([[4, 9, 1, 1], [5, 5, 9, 2], [9, 3, 3, 3]])

    def model(tokens, state):
        return torch.nn.functional.one_hot(script[:, state], 10)[:, None].float(), state + 1

    first = torch.nn.functional.one_hot(script[:, 0], 10).float()
    written = collect(model, first, 1, 4, temperature=0, stop=9)
    assert written.tolist() == [[4, 9, 9], [5, 5, 9], [9, 9, 9]]
    assert collect(model, first, 1, 4, temperature=0).tolist() == script.tolist()


def test_nothing_to_write_is_refused(model):
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        generate(model, torch.zeros(1, VOCABULARY), None, 0)
