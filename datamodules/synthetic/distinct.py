"""Weighted draws without replacement, all rows at once."""

from __future__ import annotations

import numpy as np


def distinct(rng: np.random.Generator, rows: int, weights: np.ndarray, count: int) -> np.ndarray:
    """Draw indices one after another, each with a probability in proportion to its weight among those still left.

    Each index waits an exponential time at a rate of its weight; the first `count` to arrive are drawn, in that order.

    Args:
        rng: source of the draws.
        rows: independent draws.
        weights: (choices,) positive.
        count: indices of each row, 1 … choices.

    Returns:
        (rows, count) int64, no index twice in a row.
    """
    times = rng.standard_exponential((rows, len(weights))) / weights
    first = np.argpartition(times, count - 1, axis=1)[:, :count]
    order = np.take_along_axis(times, first, axis=1).argsort(axis=1)
    return np.take_along_axis(first, order, axis=1)
