"""Recall of the N-th last value of a key that is told again and again, after MQRAR-N-back (arXiv 2505.16381)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.synthetic.distinct import distinct
from datamodules.synthetic.sample import Sample


@dataclass(frozen=True)
class NBack:
    """Key, value, key, value …; at each key its `back`-th last value is asked for, then it gets a new one.

    Keys are `pairs` of 1 … vocabulary/2 − 1, others in each row, each place takes any of them; values are any of
    vocabulary/2 … vocabulary − 1. The paper has 32 pairs in 768 tokens and N = 1 … 4; how a row is laid out is our choice.

    Args:
        pairs: keys of a row.
        back: N; 1 asks for the last value.
        vocabulary: number of tokens.

    Raises:
        ValueError: no pairs, more pairs than keys, or N below 1.
    """

    pairs: int = 32
    back: int = 1
    vocabulary: int = 8192

    def __post_init__(self) -> None:
        keys = self.vocabulary // 2 - 1
        if not 1 <= self.pairs <= keys:
            raise ValueError(
                f"NBack.pairs is {self.pairs}, expected 1 … {max(keys, 0)}, the keys of vocabulary={self.vocabulary}"
            )
        if self.back < 1:
            raise ValueError(f"NBack.back is {self.back}, expected a whole number, at least 1")

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw rows.

        Raises:
            ValueError: `length` is odd, or so small that a row could be without a target.
        """
        least = 2 * (self.pairs * self.back + 1)  # one key more than can all be younger than N values
        if length < least or length % 2:
            raise ValueError(
                f"NBack of {self.pairs} pairs, {self.back} back, needs an even number of tokens from {least}, not {length}"
            )
        half, told = self.vocabulary // 2, length // 2
        keys = 1 + distinct(rng, rows, np.ones(half - 1), self.pairs)
        chosen = rng.integers(0, self.pairs, (rows, told))
        values = rng.integers(half, self.vocabulary, (rows, told))

        # sorted by key, the earlier value of the same key is the neighbour `back` places before
        order = chosen.argsort(axis=1, kind="stable")
        by_key = np.take_along_axis(chosen, order, axis=1)
        same = by_key[:, self.back :] == by_key[:, : -self.back]
        earlier = np.take_along_axis(values, order, axis=1)[:, : -self.back]
        recalled = np.full((rows, told), -100)
        recalled[:, self.back :] = np.where(same, earlier, -100)
        targets = np.full((rows, length), -100)
        np.put_along_axis(targets, 2 * order, recalled, axis=1)

        tokens = np.empty((rows, length), np.int64)
        tokens[:, 0::2] = np.take_along_axis(keys, chosen, axis=1)
        tokens[:, 1::2] = values
        return Sample(tokens, targets, np.full(rows, np.nan, np.float32))
