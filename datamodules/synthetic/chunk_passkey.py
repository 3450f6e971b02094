"""Chunk passkey: a value told once, early in noise, and asked for at the very end; from afar only a memory knows it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.synthetic.sample import Sample

NOISE = 16  # tokens 0 … 15
FIRST_VALUE, VALUES = 16, 16  # tokens 16 … 31
MARKER = 32
QUERY = 33


@dataclass(frozen=True)
class ChunkPasskey:
    """Noise with a marker and a value right after it somewhere in the first two chunks; the last token is the query.

    Chance is 1/16. Where the marker stands is the depth.

    Args:
        chunk: tokens of a chunk of the model, at least 1.

    Raises:
        ValueError: `chunk` isn't such a number.
    """

    chunk: int
    vocabulary: int = 40

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"ChunkPasskey.chunk is {self.chunk}, expected a whole number, at least 1")
        if self.vocabulary <= QUERY:
            raise ValueError(f"ChunkPasskey.vocabulary is {self.vocabulary}, expected more than {QUERY}")

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw rows.

        Raises:
            ValueError: `length` doesn't hold two chunks and the query.
        """
        if length <= 2 * self.chunk:
            raise ValueError(
                f"ChunkPasskey with chunks of {self.chunk} needs {2 * self.chunk + 1} tokens, not {length}"
            )
        tokens = rng.integers(0, NOISE, (rows, length))
        needle = rng.integers(0, 2 * self.chunk - 1, rows)  # the value too stands in the first two chunks
        value = rng.integers(FIRST_VALUE, FIRST_VALUE + VALUES, rows)
        tokens[np.arange(rows), needle] = MARKER
        tokens[np.arange(rows), needle + 1] = value
        tokens[:, -1] = QUERY
        targets = np.full((rows, length), -100)
        targets[:, -1] = value
        return Sample(tokens, targets, (needle / length).astype(np.float32))
