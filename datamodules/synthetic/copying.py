"""Copy and reverse: random symbols, a separator, and the symbols again (tasks of arXiv 2207.06881)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.synthetic.sample import Sample

SEPARATOR = 0


@dataclass(frozen=True)
class Copy:
    """Half a row of symbols, then the separator, from which on the symbols are asked for, each fed after it was asked.

    A row is made for a model that reads it in `segments` segments of equal length: from two on, the first symbol and its
    copy stand in different ones, so that what is told passes through the model's memory.

    Args:
        segments: number of segments; the length is a multiple of it.
        vocabulary: number of tokens: 0 separates, the others are symbols.
        reverse: ask from the last symbol to the first.

    Raises:
        ValueError: no segments, or no two symbols.
    """

    segments: int = 1
    vocabulary: int = 16
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.segments < 1:
            raise ValueError(f"Copy.segments is {self.segments}, expected a whole number, at least 1")
        if self.vocabulary < 3:
            raise ValueError(f"Copy.vocabulary is {self.vocabulary}, expected at least 3: a separator and two symbols")

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw rows.

        Raises:
            ValueError: `length` is odd or no multiple of the segments.
        """
        if length < 2 or length % 2 or length % self.segments:
            raise ValueError(
                f"Copy needs an even number of tokens, a multiple of {self.segments} segments, not {length}"
            )
        half = length // 2
        symbols = rng.integers(SEPARATOR + 1, self.vocabulary, (rows, half))
        answer = symbols[:, ::-1] if self.reverse else symbols
        separator = np.full((rows, 1), SEPARATOR)
        tokens = np.concatenate([symbols, separator, answer[:, :-1]], axis=1)
        targets = np.concatenate([np.full((rows, half), -100), answer], axis=1)
        return Sample(tokens, targets, np.full(rows, np.nan, np.float32))
