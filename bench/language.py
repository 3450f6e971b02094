"""What reading on costs after n tokens: `python -m bench.language --json PATH`. One thread; a few minutes.

Decoding: the chunked model of `configs/model/NAME.yaml`, our transformer with a KV cache and transformers' Llama with its
default cache, all of equal parameters within 1 % and untrained, read random tokens one by one after n tokens were read. The
chunked model has really read them. The caches of the others hold random numbers of the right size, for time doesn't depend on
what is in them and filling them costs n². Our transformer has no documents here, so it needs no mask, and its cache has room,
so it is written in place; Llama's is copied at every step, as transformers' `generate` does by default.

A round reads a part of a chunk (ours) or a token (the others) for each provider and each n in an order drawn anew; the rounds
that are timed cover a whole chunk, for a step costs the more the more of its chunk there is.

`peak_bytes` is what lives at the worst moment of one step: weights, what was kept of the text, and the most that PyTorch's
allocator handed out during the step, temporaries inside of kernels included, as the profiler counts it. The chunked model's is
taken at the last token of a chunk, where its state is largest; `state_bytes` are of that moment too, and `formula_bytes` what
the sizes of the model say they must be. Of the others, state is what the cache holds.

Schedules: k chunks one after the other, all at once layer by layer, and along the diagonals of layer × chunk
(`bench.wavefront`), in a prefill and in a training step, forward and backward; equal in values, or the bench ends.
"""

from __future__ import annotations  # noqa: I001 - compat comes before anything that imports torchvision

import compat  # noqa: F401

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from bench.harness import Row, interleave, one_thread, parser, report
from bench.wavefront import stacked, wavefront
from launch import register_resolvers
from models.delta_bank import DeltaBank
from models.fifo_bank import FifoBank
from models.memory_lm import MemoryLM, State
from models.states import nbytes
from models.transformer_lm import Cache, Grown, TransformerLM, TransformerState
from rotary import Rotary
from rotary.frequencies import Geometric
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OURS, PLAIN, LLAMA = "memory", "transformer", "llama"
EXTRA = 4  # calls of `interleave` before it counts rounds


class Reader:
    """Reads random tokens on from a state, some a call."""

    def __init__(self, read: Callable[[Tensor, Any], Any], state: Any, tokens: int = 1) -> None:
        self.read, self.state, self.tokens = read, state, tokens

    def __call__(self) -> None:
        for token in torch.randint(256, (self.tokens, 1, 1)):
            self.state = self.read(token, self.state)


def configured(name: str) -> MemoryLM:
    """The chunked model of a config, for bytes."""
    register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=["task=lm", f"model={name}"])
    return instantiate(config.model).eval()


def parameters(model: nn.Module) -> int:
    """Numbers in the weights."""
    return sum(p.numel() for p in model.parameters())


def plain(like: MemoryLM, hidden: int) -> TransformerLM:
    """A transformer of the same width, layers and heads."""
    return TransformerLM(
        like.vocabulary,
        None,
        width=like.embed.embedding_dim,
        layers=len(like.blocks),
        heads=_heads(like),
        hidden=hidden,
        context=like.chunk,
        rotary=partial(Rotary, Geometric(1e4)),
        tied=False,
    ).eval()


def llama(like: MemoryLM, hidden: int) -> LlamaForCausalLM:
    """transformers' model of the same width, layers and heads."""
    config = LlamaConfig(
        vocab_size=like.vocabulary,
        hidden_size=like.embed.embedding_dim,
        intermediate_size=hidden,
        num_hidden_layers=len(like.blocks),
        num_attention_heads=_heads(like),
        num_key_value_heads=_heads(like),
        max_position_embeddings=2**20,
    )
    return LlamaForCausalLM(config).eval()


def _heads(model: MemoryLM) -> int:
    block: Any = model.blocks[0]
    return block.heads


def matched(make: Callable[[int], nn.Module], wanted: int) -> nn.Module:
    """The model whose hidden width gives it as many parameters as wanted."""
    with torch.device("meta"):
        few, many = (parameters(make(hidden)) for hidden in (8, 16))
    return make(8 + round((wanted - few) * 8 / (many - few)))


def filled_plain(model: TransformerLM, read: int, room: int) -> TransformerState:
    """The state after `read` tokens, random keys and values, with room for more."""

    def grown() -> Grown:
        memory = torch.rand(1, model.heads, read + room, model.head_dim)
        return Grown(memory, read, memory._version)

    layers = tuple(Cache(grown(), grown()) for _ in model.blocks)
    return TransformerState(model.initial(1).document, read, layers)


def filled_llama(model: LlamaForCausalLM, read: int) -> DynamicCache:
    """The same of transformers' cache."""
    config, cache = model.config, DynamicCache(config=model.config)
    heads = config.num_attention_heads
    shape = (1, heads, read, config.hidden_size // heads)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.rand(shape), torch.rand(shape), layer)
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of its keys and values."""
    layers: list[Any] = list(cache.layers)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def formula_bytes(model: MemoryLM, begun: int) -> int:
    """What the state of one row must take, with `begun` tokens of a chunk read: 4 bytes a float, 8 an integer.

    A layer keeps keys and values, 2 · c · width of the chunk before and 2 · i · width of this one, and its bank: of a FIFO
    m · width + r · (width + 2) floats and one count, of a delta rule 2 · width² / heads
    + (taps − 1) · width floats. The stream keeps the documents of c + i tokens, and two more numbers.
    """
    width, floats, integers = model.embed.embedding_dim, 0, 2 + model.carry * model.chunk + begun
    for block in model.blocks:
        floats += 2 * (model.carry * model.chunk + begun) * width
        if isinstance(block.bank, FifoBank):
            writers = block.bank.writers
            floats += block.bank.groups * writers * width + writers * (width + 2)
            integers += 1
        elif isinstance(block.bank, DeltaBank):
            floats += 2 * width**2 // block.bank.heads + (block.bank.taps - 1) * width
    return 4 * floats + 8 * integers


def allocated(call: Callable[[], object]) -> int:
    """The most bytes that the CPU allocator had handed out at once during a call, beyond those from before it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it writes a line to stderr at every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def streamed(model: MemoryLM, reads: Sequence[int]) -> dict[int, State]:
    """States of the model after it has read each number of random tokens, one stream."""
    states, state, done = {}, model.initial(1), 0
    for n in sorted(reads):
        while done < n:
            size = min(n - done, model.chunks_at_once * model.chunk)
            _, state = model(torch.randint(256, (1, size)), state)
            done += size
        states[n] = state
    return states


@torch.no_grad()
def reading(model: MemoryLM, reads: Sequence[int], rounds: int, prefill: int) -> list[Row]:
    """Time and memory of decoding by all providers, and of prefilling `prefill` tokens by ours, after each number read.

    Raises:
        ValueError: a number to read that isn't whole chunks, so that steps wouldn't be compared at one place of a chunk.
    """
    if ragged := [n for n in reads if n < 1 or n % model.chunk]:
        raise ValueError(f"--read {ragged[0]} isn't a multiple of the model's chunk of {model.chunk} tokens")
    size = parameters(model)
    others: dict[str, Any] = {PLAIN: matched(partial(plain, model), size), LLAMA: matched(partial(llama, model), size)}
    models: dict[str, nn.Module] = {OURS: model, **others}
    rows = [Row("language", "weights", name, "parameters", parameters(net), "numbers") for name, net in models.items()]

    states = streamed(model, reads)
    spans = {f"{n}": partial(model, torch.randint(256, (1, prefill)), states[n]) for n in reads}
    spent = {int(n): seconds for n, seconds in interleave(spans, rounds=max(2, rounds // 3), least=0).items()}
    rows += _times({(OURS, n): [s / prefill for s in seconds] for n, seconds in spent.items()}, "prefill")

    part = max(1, model.chunk // rounds)
    readers: dict[tuple[str, int], Reader] = {}
    for n in reads:
        readers[OURS, n] = Reader(lambda token, state: model(token, state)[1], states[n], part)
        room = filled_plain(others[PLAIN], n, rounds + EXTRA + 1)
        readers[PLAIN, n] = Reader(lambda token, state: others[PLAIN](token, state)[1], room)
        cached = filled_llama(others[LLAMA], n)
        readers[LLAMA, n] = Reader(
            lambda token, cache: others[LLAMA](token, past_key_values=cache).past_key_values, cached
        )
    named = {f"{name} {n}": reader for (name, n), reader in readers.items()}
    seconds = interleave(named, rounds=rounds, least=0)
    each = {key: [s / reader.tokens for s in seconds[f"{key[0]} {key[1]}"]] for key, reader in readers.items()}
    rows += _times(each, "decode")

    peaks = {}
    for (name, n), reader in readers.items():
        if name == OURS:
            left = (-1 - reader.state.stream.current.shape[1]) % model.chunk
            reader.state = model(torch.randint(256, (1, left)), reader.state)[1] if left else reader.state
        held = cache_bytes(reader.state) if name == LLAMA else nbytes(reader.state)
        case = _case("decode", n)
        rows.append(Row("language", case, name, "state_bytes", held, "bytes"))
        if name == OURS:
            rows.append(Row("language", case, name, "formula_bytes", formula_bytes(model, model.chunk - 1), "bytes"))
        reader.tokens = 1
        peaks[name, n] = sum(p.nbytes for p in models[name].parameters()) + held + allocated(reader)
        rows.append(Row("language", case, name, "peak_bytes", peaks[name, n], "bytes"))
    return rows + _summary(each, peaks)


def _case(phase: str, read: int) -> str:
    return f"{phase}, {read} read"


def _times(each: Mapping[tuple[str, int], list[float]], phase: str) -> list[Row]:
    rows = []
    for (name, n), seconds in each.items():
        middle = statistics.median(seconds)
        rows.append(Row("language", _case(phase, n), name, "us_per_token", 1e6 * middle, "us"))
        rows.append(Row("language", _case(phase, n), name, "tokens_per_s", 1 / middle, "1/s"))
    return rows


def _summary(each: Mapping[tuple[str, int], list[float]], peaks: Mapping[tuple[str, int], int]) -> list[Row]:
    """The longest against the shortest of each provider, and ours against the others at the longest."""
    reads = [n for _, n in each]
    few, many = min(reads), max(reads)
    case, rows = f"decode, {many} over {few} read", []
    for name in dict.fromkeys(name for name, _ in each):
        rows.append(Row("language", case, name, "us_ratio", _ratio(each[name, many], each[name, few]), "ratio"))
        rows.append(Row("language", case, name, "peak_ratio", peaks[name, many] / peaks[name, few], "ratio"))
        if name != OURS:
            faster = _ratio(each[name, many], each[OURS, many])
            rows.append(Row("language", _case("decode", many), name, "x_memory", faster, "ratio of us_per_token"))
    return rows


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def schedules(model: MemoryLM, chunks: int, rounds: int, tolerance: float = 1e-3) -> list[Row]:
    """Microseconds a token of a prefill and of a training step by each schedule.

    Raises:
        RuntimeError: two schedules answer differently by more than `tolerance` of the largest logit.
    """
    tokens = torch.randint(256, (1, chunks * model.chunk))
    layers = stacked(model)
    rest = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    diagonal = (*(weight for weight in layers.values() if weight.requires_grad), *rest)

    def of_model(at_once: int) -> Tensor:
        model.chunks_at_once = at_once
        return model(tokens)[0]

    names = "one_by_one", "at_once", "wavefront"
    logits = partial(of_model, 1), partial(of_model, chunks), partial(wavefront, model, layers, tokens)
    weights = tuple(model.parameters()), tuple(model.parameters()), diagonal
    with torch.no_grad():
        answers = [call() for call in logits]
    for name, answer in zip(names, answers, strict=True):
        if (worst := float((answer - answers[0]).abs().max() / answers[0].abs().max())) > tolerance:
            raise RuntimeError(f"schedule {name}: logits differ by {worst:.1e} of the largest")

    def prefill(call: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return call()

    def step(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> object:
        return torch.autograd.grad(cross_entropy(call()[0, :-1], tokens[0, 1:]), leaves)

    before = model.chunks_at_once
    work: dict[str, dict[str, Callable[[], object]]] = {
        "prefill": {name: partial(prefill, call) for name, call in zip(names, logits, strict=True)},
        "training step": {
            name: partial(step, call, leaves) for name, call, leaves in zip(names, logits, weights, strict=True)
        },
    }
    rows = []
    for phase, calls in work.items():
        case = f"{phase}, {chunks} chunks"
        seconds = interleave(calls, rounds=rounds, least=0)
        for name, times in seconds.items():
            each = 1e6 * statistics.median(times) / tokens.numel()
            rows.append(Row("language", case, name, "us_per_token", each, "us"))
            rows.append(Row("language", case, name, "x_one_by_one", _ratio(times, seconds["one_by_one"]), "ratio"))
    model.chunks_at_once = before
    return rows


def main() -> None:
    made = parser("A chunked language model against transformers with a KV cache: time and memory by tokens read.")
    made.add_argument("--model", default="lm_small", help="of configs/model: a chunked model for bytes")
    made.add_argument("--read", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help="tokens read before")
    made.add_argument("--rounds", type=int, default=8)
    made.add_argument("--chunks", type=int, default=4, help="k of the prefill and of the schedules")
    made.add_argument("--quick", action="store_true", help="a tiny model and few tokens, to see that it runs")
    options = made.parse_args()
    if options.quick:
        options.model, options.read, options.rounds = "lm_ci", [64, 256], 2
    one_thread()
    torch.manual_seed(0)
    model = configured(options.model)
    rows = reading(model, options.read, options.rounds, options.chunks * model.chunk)
    rows += schedules(model, options.chunks, max(2, options.rounds // 3))
    report(rows, options.json)


if __name__ == "__main__":
    main()
