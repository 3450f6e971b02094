"""What a family of synthetic problems makes: rows of tokens with the few targets that count."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Sample(NamedTuple):
    """Rows of one length.

    Attributes:
        tokens: (rows, length) int64.
        targets: (rows, length) int64: what must be told after reading tokens up to here, −100 where nothing is asked.
        depth: (rows,) float32: where the answer lies in the text, 0 … 1; NaN where that means nothing.
        references: rows tuples of answers to look for in what a model writes, or () where targets say it all.
        text: whether targets are bytes of text.
    """

    tokens: np.ndarray
    targets: np.ndarray
    depth: np.ndarray
    references: tuple[tuple[str, ...], ...] = ()
    text: bool = False


class Family(Protocol):
    """A problem. The same generator state gives the same rows.

    One that is made of documents also has `for_split(split)`, the same problem made of those of "val" or "test".
    """

    @property
    def vocabulary(self) -> int: ...

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw `rows` problems of `length` tokens.

        Raises:
            ValueError: the problem doesn't fit into `length`.
        """
