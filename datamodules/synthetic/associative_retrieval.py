"""Associative retrieval: keys with values, a separator, one of the keys, whose value is asked for (arXiv 1610.06258)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.synthetic.distinct import distinct
from datamodules.synthetic.sample import Sample

SEPARATOR = 0


@dataclass(frozen=True)
class AssociativeRetrieval:
    """Pairs fill the row but for its last two tokens: the separator and the key asked for.

    Keys are 1 … vocabulary/2 − 1, unique in a row; values are any of vocabulary/2 … vocabulary − 1; the sizes are our
    choice. Where the pair stands is the depth. For `segments` see `Copy`.

    Args:
        segments: number of segments; the length is a multiple of it.
        vocabulary: number of tokens.

    Raises:
        ValueError: no segments, or no key.
    """

    segments: int = 1
    vocabulary: int = 512

    def __post_init__(self) -> None:
        if self.segments < 1:
            raise ValueError(f"AssociativeRetrieval.segments is {self.segments}, expected a whole number, at least 1")
        if self.vocabulary < 4:
            raise ValueError(f"AssociativeRetrieval.vocabulary is {self.vocabulary}, expected at least 4")

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw rows.

        Raises:
            ValueError: `length` is odd, no multiple of the segments, or asks for more keys than there are.
        """
        half = self.vocabulary // 2
        longest = 2 * half  # a pair for each of the half − 1 keys
        if not 4 <= length <= longest or length % 2 or length % self.segments:
            raise ValueError(
                f"AssociativeRetrieval with vocabulary={self.vocabulary} needs an even number of tokens, 4 … {longest}, "
                f"a multiple of {self.segments} segments, not {length}"
            )
        pairs = length // 2 - 1
        keys = 1 + distinct(rng, rows, np.ones(half - 1), pairs)
        values = rng.integers(half, self.vocabulary, (rows, pairs))
        asked = rng.integers(0, pairs, rows)
        every = np.arange(rows)
        tokens = np.empty((rows, length), np.int64)
        tokens[:, 0:-2:2], tokens[:, 1:-2:2] = keys, values
        tokens[:, -2], tokens[:, -1] = SEPARATOR, keys[every, asked]
        targets = np.full((rows, length), -100)
        targets[:, -1] = values[every, asked]
        return Sample(tokens, targets, (2 * asked / length).astype(np.float32))
