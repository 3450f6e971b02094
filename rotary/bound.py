"""How far a ladder of frequencies still tells a similar key from a random one: base bounds context (arXiv 2405.14591).

With independent channels of equal variance, a key like the query outscores a random one at distance m, on average, by
2σ² B_m, B_m = Σ_i cos(m θ_i): a context is carried if no distance in it has B_m < 0. It is a statement about one layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from rotary.frequencies import ladder
from rotary.module import Rotary

_CHUNK = 2**15  # distances at a time
_BASES = 64  # at a time
_CELL, _PARTS = 0.0625, 4  # of the search for the smallest base: width in log base, and into how many it is divided
_FEWEST = 3  # pairs: with two, no base is so large that no larger one fails
_ROUNDING = 1e-9  # a pair: float64 angles of 2²¹ radians are good to 5e-10


def similarity_margin(frequencies: Tensor, distances: Tensor, weights: Tensor | None = None) -> Tensor:
    """B_m = Σ_i w_i cos(m θ_i).

    Args:
        frequencies: (…, r) radians per token, after any scaling; pairs at rest (0) count 1 at every distance.
        distances: (m,) tokens.
        weights: (…, r), such as the shares of `rotary.diagnostics.frequency_share`; 1 for every pair if None.

    Returns:
        (…, m) float64.
    """
    cosines = (distances.double()[:, None] * frequencies.double()[..., None, :]).cos()  # (…, m, r)
    return cosines.sum(-1) if weights is None else (cosines * weights.double()[..., None, :]).sum(-1)


def margin_run(frequencies: Tensor, start: int, count: int, weights: Tensor | None = None) -> Tensor:
    """`similarity_margin` at the distances start … start + count − 1: (g, r) → (g, count) float64.

    By cos(a + b) = cos a cos b − sin a sin b it is a matrix product of two short tables, with 2 √count cosines a pair.
    """
    columns = math.isqrt(max(count - 1, 0)) + 1
    rows = -(-count // columns)
    theta = frequencies.double()[:, None]  # (g, 1, r)
    steps = torch.arange(max(rows, columns), dtype=torch.float64, device=theta.device)[:, None]
    coarse, fine = (start + columns * steps[:rows]) * theta, steps[:columns] * theta
    left = torch.stack((coarse.cos(), -coarse.sin()), dim=-1)  # (g, rows, r, 2)
    if weights is not None:
        left = left * weights.double()[:, None, :, None]
    right = torch.stack((fine.cos(), fine.sin()), dim=-1)
    return (left.flatten(-2) @ right.flatten(-2).mT).flatten(1)[:, :count]


def first_negatives(frequencies: Tensor, limit: int, weights: Tensor | None = None) -> Tensor:
    """The first distance below `limit` with B_m < 0, else `limit`, row by row: (g, r) → (g,) int64.

    Args:
        frequencies: (g, r) radians per token.
        limit: distances looked at.
        weights: (g, r), see `similarity_margin`.
    """
    found = torch.full((len(frequencies),), limit)
    total = torch.full_like(frequencies, 1, dtype=torch.float64) if weights is None else weights.double()
    threshold = -_ROUNDING * total.sum(-1, keepdim=True)
    alive, start, count = torch.arange(len(frequencies)), 0, 256  # short runs first: poor rows fail early
    while start < limit and len(alive):
        count = min(count, limit - start)
        rows = None if weights is None else weights[alive]
        negative = margin_run(frequencies[alive], start, count, rows) < threshold[alive]
        hit = negative.any(-1).cpu()
        found[alive[hit]] = start + negative.to(torch.int8).argmax(-1).cpu()[hit]
        alive, start, count = alive[~hit], start + count, min(2 * count, _CHUNK)
    return found


def first_negative(frequencies: Tensor, limit: int, weights: Tensor | None = None) -> int:
    """The first distance below `limit` with B_m < 0 in any row of frequencies (…, r), or `limit`: all below are carried.

    Args:
        frequencies: (…, r) radians per token after scaling, so that p-RoPE, YaRN, … are judged by what they turn.
        limit: distances looked at.
        weights: (…, r) see `similarity_margin`.
    """
    shape = frequencies.shape if weights is None else torch.broadcast_shapes(frequencies.shape, weights.shape)
    rows = frequencies.detach().expand(shape).reshape(-1, shape[-1])
    weight = None if weights is None else weights.detach().expand(shape).reshape(-1, shape[-1])
    return int(first_negatives(rows, limit, weight).amin())


def padded(frequencies: Tensor, pairs: int) -> Tensor:
    """Pairs at rest added, for the channels of a head that don't rotate: (…, r) → (…, pairs)."""
    return pad(frequencies, (0, pairs - frequencies.shape[-1]))


def context_bound(base: float, head_dim: int, limit: int = 2**21) -> int:
    """Tokens of the longest context that RoPE's ladder of this base carries: B_m ≥ 0 at all distances m below it.

    Args:
        base: of the ladder base^(−2i / head_dim).
        head_dim: channels of a head, all of which rotate.
        limit: where to stop; returned if the ladder carries as much.

    Raises:
        ValueError: the base isn't positive, or head_dim isn't even.
    """
    return first_negative(ladder(base, _pairs(head_dim)), limit)


def smallest_base(context: int, head_dim: int, ratio: float = 1.0001) -> float:
    """The smallest base that carries a context, to within `ratio`.

    The bases that carry a context are no interval: some larger ones don't (`safe_base`). So the logarithm of the base is
    searched upwards in cells. B_m grows by at most m Σ_i (i/r) θ_i a unit of it, with θ of the left end, which rules out
    most cells whole; the others are divided.

    Args:
        context: tokens.
        head_dim: channels of a head.
        ratio: of neighbouring bases at the last division; narrower islands of bases may be missed.

    Raises:
        ValueError: head_dim is odd or below 6, or context or ratio is too small.
    """
    ceiling = _ceiling(context, head_dim, ratio)
    exponents = torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2)
    for first in range(math.ceil(ceiling / _CELL)):
        left, width, least = torch.tensor([first * _CELL], dtype=torch.float64), _CELL, math.inf
        while len(left):
            frequencies = (-left[:, None] * exponents).exp()
            growth = width * (frequencies * exponents).sum(-1)
            lack = _lack(frequencies, context, growth)
            least = min([least, *left[lack <= 0].tolist()])
            left = left[(lack < growth) & (left < least)]
            if width < math.log(ratio):
                break
            width /= _PARTS
            left = (left[:, None] + width * torch.arange(_PARTS)).flatten()
            left = left[left < least]
        if least < math.inf:
            return math.exp(least)
    return math.exp(ceiling)


def safe_base(context: int, head_dim: int, ratio: float = 1.002) -> float:
    """The base from which on all larger ones carry a context, to within `ratio`.

    The search runs downwards from a base above which every pair is so slow that no larger one can fail, and stops at the
    first failure.

    Args:
        context: tokens.
        head_dim: channels of a head.
        ratio: of neighbouring bases; gaps narrower than a step are not seen.

    Raises:
        ValueError: head_dim is odd or below 6, or context or ratio is too small.
    """
    top = math.ceil(_ceiling(context, head_dim, ratio) / math.log(ratio))
    for first in range(top, 0, -_BASES):
        bases = [ratio**step for step in range(first, max(first - _BASES, 0), -1)]
        rows = torch.stack([ladder(base, head_dim // 2) for base in bases])
        failures = (first_negatives(rows, context) < context).nonzero()
        if len(failures):
            return bases[int(failures[0])] * ratio
    return ratio


def advice(rotary: Rotary, reach: int) -> str | None:
    """A warning in one line if attention reaches farther than the frequencies carry, else None.

    Channels that don't rotate count as pairs at rest. Nothing is said of several axes or of periodic ones.

    Args:
        rotary: judged by its frequencies after scaling.
        reach: the largest distance, in tokens, that the attention turns.
    """
    if rotary.axes != 1 or rotary.periodic:
        return None
    extent = torch.tensor(reach + 1, device=rotary.frequencies.device)
    turned = rotary.scaled(extent).detach()[:, 0]
    bound = first_negative(padded(turned, rotary.head_dim // 2), reach + 1)
    if bound > reach:
        return None
    remedy = "rotate fewer pairs, as scaling.Truncate(0.5) does"
    if rotary.pairs >= _FEWEST:
        remedy = f"use a base of at least {safe_base(reach + 1, 2 * rotary.pairs):.3g} for {2 * rotary.pairs} channels"
    return (
        f"attention reaches {reach} tokens back, but from distance {bound} on these frequencies no longer prefer similar"
        f" keys (arXiv 2405.14591): {remedy}, or reach less far"
    )


def _pairs(head_dim: int) -> int:
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} has no whole number of pairs")
    return head_dim // 2


def _lack(frequencies: Tensor, context: int, enough: Tensor) -> Tensor:
    """max_m −B_m / m over the distances 1 … context − 1, row by row, (g, r) → (g,); no farther once it is `enough` (g,)."""
    lack = torch.full((len(frequencies),), -math.inf, dtype=torch.float64)
    for rows in torch.arange(len(frequencies)).split(_BASES):
        alive, start, count = rows, 1, 64
        while start < context and len(alive):
            count = min(count, context - start)
            margin = margin_run(frequencies[alive], start, count) + _ROUNDING * frequencies.shape[-1]
            distance = torch.arange(start, start + count, dtype=torch.float64)
            lack[alive] = torch.maximum(lack[alive], (-margin / distance).amax(-1))
            alive, start, count = alive[lack[alive] < enough[alive]], start + count, min(2 * count, _CHUNK)
    return lack


def _ceiling(context: int, head_dim: int, ratio: float) -> float:
    """The logarithm of a base that surely carries the context, as all larger ones do; the arguments are checked.

    A larger base slows every pair, and cos(m θ) grows as θ falls while m θ ≤ π. So Σ_i (cos(m θ_i) where m θ_i ≤ π, else −1)
    bounds B_m from below for this base and all larger ones; it falls with m, so that the largest distance decides.
    """
    pairs = _pairs(head_dim)
    if pairs < _FEWEST:
        raise ValueError(f"head_dim={head_dim}: no base is safe with fewer than {_FEWEST} pairs")
    if context < 1 or ratio <= 1:
        raise ValueError(f"a search for a base needs context ≥ 1 and ratio > 1, got {context} and {ratio}")
    exponents = torch.arange(pairs, dtype=torch.float64) / pairs

    def surely(log_base: float) -> bool:
        angle = (context - 1) * (-log_base * exponents).exp()
        return float(torch.where(angle <= math.pi, angle.cos(), -1.0).sum()) >= 0

    low, high = 0.0, 1.0
    while not surely(high):
        low, high = high, 2 * high
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if surely(middle) else (middle, high)
    return high
