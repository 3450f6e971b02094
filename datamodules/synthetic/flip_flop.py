"""Flip-flop language (arXiv 2306.00946): write a bit, ignore bits, read the bit written last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.synthetic.sample import Sample

WRITE, READ, IGNORE = 2, 3, 4  # bits are tokens 0 and 1


@dataclass(frozen=True)
class FlipFlop:
    """Instruction, bit, instruction, bit …; the first is a write, the last a read, and each read's bit is asked for.

    Bits after writes and ignored ones are even chances; instructions between are ignored with probability `ignore`, else
    writes and reads alike. Training mixes take 0.8; 0.98 is sparse, 0.1 dense.

    Args:
        ignore: probability 0 … 1.

    Raises:
        ValueError: `ignore` isn't a probability, or the vocabulary lacks tokens.
    """

    ignore: float = 0.8
    vocabulary: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.ignore <= 1:
            raise ValueError(f"FlipFlop.ignore is {self.ignore}, expected a probability, 0 … 1")
        if self.vocabulary <= IGNORE:
            raise ValueError(f"FlipFlop.vocabulary is {self.vocabulary}, expected more than {IGNORE}")

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw rows.

        Raises:
            ValueError: `length` is odd or below 4.
        """
        if length < 4 or length % 2:
            raise ValueError(f"FlipFlop needs an even number of tokens, at least 4, not {length}")
        steps, acts = length // 2, (1 - self.ignore) / 2
        instructions = rng.choice([WRITE, READ, IGNORE], (rows, steps), p=[acts, acts, self.ignore])
        instructions[:, 0], instructions[:, -1] = WRITE, READ
        bits = rng.integers(0, 2, (rows, steps))
        written = np.maximum.accumulate(np.where(instructions == WRITE, np.arange(steps), 0), axis=1)
        reads = instructions == READ
        bits = np.where(reads, np.take_along_axis(bits, written, axis=1), bits)
        tokens, targets = np.empty((rows, length), np.int64), np.full((rows, length), -100)
        tokens[:, 0::2], tokens[:, 1::2] = instructions, bits
        targets[:, 0::2] = np.where(reads, bits, -100)
        return Sample(tokens, targets, np.full(rows, np.nan, np.float32))
