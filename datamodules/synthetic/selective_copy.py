"""Selective copying (arXiv 2312.00752): symbols scattered among noise, to be told again in their order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.synthetic.distinct import distinct
from datamodules.synthetic.sample import Sample

NOISE = 0


@dataclass(frozen=True)
class SelectiveCopy:
    """Noise with `content` symbols at random places, then as many marks; the i-th mark asks for the i-th symbol.

    Sizes and layout are our choice: noise is token 0, the mark is the last token, symbols are those between.

    Args:
        content: symbols of a row.
        vocabulary: number of tokens.

    Raises:
        ValueError: no content, or no two symbols.
    """

    content: int = 16
    vocabulary: int = 16

    def __post_init__(self) -> None:
        if self.content < 1:
            raise ValueError(f"SelectiveCopy.content is {self.content}, expected a whole number, at least 1")
        if self.vocabulary < 4:
            raise ValueError(
                f"SelectiveCopy.vocabulary is {self.vocabulary}, expected at least 4: noise, two symbols and the mark"
            )

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw rows.

        Raises:
            ValueError: `length` doesn't hold the symbols and their marks.
        """
        if length < 2 * self.content:
            raise ValueError(f"SelectiveCopy of {self.content} symbols needs {2 * self.content} tokens, not {length}")
        mark, haystack = self.vocabulary - 1, length - self.content
        symbols = rng.integers(NOISE + 1, mark, (rows, self.content))
        places = np.sort(distinct(rng, rows, np.ones(haystack), self.content), axis=1)
        tokens = np.full((rows, length), NOISE)
        np.put_along_axis(tokens, places, symbols, axis=1)
        tokens[:, haystack:] = mark
        targets = np.full((rows, length), -100)
        targets[:, haystack:] = symbols
        return Sample(tokens, targets, np.full(rows, np.nan, np.float32))
