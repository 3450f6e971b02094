"""Reading a prompt of any length by pieces, and writing on: sampling by temperature, top-k and top-p (arXiv 1904.09751)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import Tensor

# tokens (b, t) and a state → logits (b, t, v) and the next state
LanguageModel = Callable[[Tensor, Any], tuple[Tensor, Any]]


def prefill(
    model: LanguageModel, tokens: Tensor | Iterable[Tensor], state: Any = None, *, piece: int = 2048
) -> tuple[Tensor, Any]:
    """Read a prompt, never more than a piece of it at once, so that memory doesn't grow with the prompt but by its state.

    Args:
        model: gives logits of the next token, and the next state.
        tokens: (b, t) int64, or parts of it along t, in order.
        state: of what was read before; None for nothing.
        piece: tokens of a row that are read in one call.

    Returns:
        Logits (b, v) of the token after the last, and the state.

    Raises:
        ValueError: there is no token, or `piece` is less than 1.
    """
    if piece < 1:
        raise ValueError(f"prefill: piece={piece} must be at least 1")
    last: Tensor | None = None
    for part in (tokens,) if isinstance(tokens, Tensor) else tokens:
        for some in part.split(piece, dim=1):
            if some.shape[1]:
                last, state = _read(model, some, state)
    if last is None:
        raise ValueError("prefill: the prompt has no token")
    return last, state


@torch.no_grad()
def _read(model: LanguageModel, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    logits, state = model(tokens, state)
    return logits[:, -1].clone(), state  # a view would keep the logits of all tokens


def check_sampling(top_k: int | None, top_p: float, temperature: float) -> None:
    """Raises ValueError with the name of what can't be sampled by."""
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be at least 0 and finite")


def probabilities(logits: Tensor, *, top_k: int | None = None, top_p: float = 1.0, temperature: float = 1.0) -> Tensor:
    """The distribution that `sample` draws from: (b, v) logits → (b, v) float32, rows summing to 1.

    Args:
        logits: (b, v).
        top_k: the most probable tokens that stay; None for all.
        top_p: of those, the most probable stay whose mass, each step of the way, was less than this: the smallest set of
            at least this mass.
        temperature: divides the logits; 0 leaves the most probable token alone.

    Raises:
        ValueError: top_k < 1, top_p outside (0, 1], or temperature < 0.
    """
    check_sampling(top_k, top_p, temperature)
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # the largest first at zero, for a small temperature would send it to infinity
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    kept, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        kept, order = kept[:, :top_k], order[:, :top_k]
    mass = kept.softmax(-1)
    if top_p < 1:
        mass = torch.where(mass.cumsum(-1) - mass < top_p, mass, 0.0)
        mass = mass / mass.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter_(-1, order, mass)


def sample(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a row, (b, v) → (b,) int64; see `probabilities`. Temperature 0 is greedy and draws nothing.

    Args:
        generator: on the device of the logits; torch's own if None.
    """
    chances = probabilities(logits, top_k=top_k, top_p=top_p, temperature=temperature)
    if temperature == 0:
        return chances.argmax(-1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]


def generate(
    model: LanguageModel,
    logits: Tensor,
    state: Any,
    count: int,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    stop: int | None = None,
) -> Generator[Tensor, None, Any]:
    """Write on from where a prompt ended, one token a row at a time.

    Args:
        model: as for `prefill`, which gives `logits` (b, v) and `state`.
        count: tokens of a row, at most.
        top_k, top_p, temperature, generator: see `sample`.
        stop: a row that has written this token writes nothing else; when all rows have, nothing more comes.

    Yields:
        (b,) int64 tokens, as they are drawn.

    Returns:
        The state after all tokens but the last, which was not read.

    Raises:
        ValueError: count < 1, or what `sample` can't sample by; at the call, not at the first token.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    check_sampling(top_k, top_p, temperature)

    def draw(logits: Tensor) -> Tensor:
        return sample(logits, top_k=top_k, top_p=top_p, temperature=temperature, generator=generator)

    return _generate(model, logits, state, count, draw, stop)


def _generate(
    model: LanguageModel, logits: Tensor, state: Any, count: int, draw: Callable[[Tensor], Tensor], stop: int | None
) -> Generator[Tensor, None, Any]:
    stopped = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for written in range(count):
        token = draw(logits)
        if stop is not None:
            token = token.masked_fill(stopped, stop)
            stopped = token == stop
        yield token
        if written + 1 == count or (stop is not None and bool(stopped.all())):
            break
        logits, state = _read(model, token[:, None], state)
    return state
