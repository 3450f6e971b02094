"""Multi-query associative recall, MQAR (arXiv 2312.04927): pairs first, then each key again and its value asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.synthetic.distinct import distinct
from datamodules.synthetic.sample import Sample


@dataclass(frozen=True)
class MQAR:
    """Unique keys with unique values, then every key once more, nearer ones likelier, among random tokens.

    Keys are 1 … vocabulary/2 − 1, values vocabulary/2 … vocabulary − 1. Queries stand an even number 2j of tokens after
    the pairs' end, j = 0, 1 …, where P(j) ∝ (j + 1)^(alpha − 1) among the places still free. Filling tokens are any, so
    now and then a key among them, unasked; or all of them 0, which is neither key nor value.

    Args:
        pairs: keys with values.
        vocabulary: number of tokens.
        alpha: exponent of the power law; 1 spreads queries evenly.
        noise: whether filling tokens are any; if not, they are 0.

    Raises:
        ValueError: no pairs, more pairs than keys, or an alpha that isn't positive.
    """

    pairs: int
    vocabulary: int = 8192
    alpha: float = 0.01
    noise: bool = True

    def __post_init__(self) -> None:
        keys = self.vocabulary // 2 - 1
        if not 1 <= self.pairs <= keys:
            raise ValueError(
                f"MQAR.pairs is {self.pairs}, expected 1 … {max(keys, 0)}, the keys of vocabulary={self.vocabulary}"
            )
        if not self.alpha > 0:
            raise ValueError(f"MQAR.alpha is {self.alpha}, expected a positive number")

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw rows.

        Raises:
            ValueError: `length` is below 4 · pairs.
        """
        if length < 4 * self.pairs:
            raise ValueError(f"MQAR of {self.pairs} pairs needs {4 * self.pairs} tokens, not {length}")
        half, context = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + distinct(rng, rows, np.ones(half - 1), self.pairs)
        values = half + distinct(rng, rows, np.ones(self.vocabulary - half), self.pairs)
        law = np.arange(1, (length - context) // 2 + 1) ** (self.alpha - 1)
        asked = context + 2 * distinct(rng, rows, law, self.pairs)
        filling = self.vocabulary if self.noise else 1
        tokens = rng.integers(0, filling, (rows, length))
        tokens[:, 0:context:2] = keys
        tokens[:, 1:context:2] = values
        np.put_along_axis(tokens, asked, keys, axis=1)
        targets = np.full((rows, length), -100)
        np.put_along_axis(targets, asked, values, axis=1)
        return Sample(tokens, targets, np.full(rows, np.nan, np.float32))
