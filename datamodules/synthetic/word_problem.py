"""Word problems of permutation groups, A5 and S5 (arXiv 2404.08819): tell the product of all elements read so far."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np

from datamodules.synthetic.sample import Sample


def group_elements(points: int, even: bool) -> np.ndarray:
    """All permutations of `points` points, or the even ones, in lexicographic order: (order, points), identity first."""
    every = np.array(list(permutations(range(points))))
    inversions = sum((every[:, i] > every[:, j]).astype(int) for i in range(points) for j in range(i + 1, points))
    return every[inversions % 2 == 0] if even else every


def group_table(elements: np.ndarray) -> np.ndarray:
    """Indices of products, (order, order): table[a, b] is a, then b, so point x goes to elements[b][elements[a][x]].

    Args:
        elements: (order, points), lexicographic, closed under composition.
    """
    points = elements.shape[1]
    powers = points ** np.arange(points - 1, -1, -1)
    products = elements[:, elements].transpose(1, 0, 2)  # (a, b, points)
    return np.searchsorted(elements @ powers, products @ powers)


@dataclass(frozen=True)
class WordProblem:
    """Tokens are elements of the group, and at every one the product of all from the first on is asked for.

    Args:
        points: of the permutations, 2 … 6.
        even: only even permutations, the alternating group.
        moves: draw only elements that move at most this many points; None draws all. 2 leaves swaps and the identity, from
            which the whole of a symmetric group follows.

    Raises:
        ValueError: other points, or moves that leave only the identity.
    """

    points: int = 5
    even: bool = False
    moves: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.points <= 6:
            raise ValueError(f"WordProblem.points is {self.points}, expected 2 … 6")
        if len(self.drawn) < 2:
            raise ValueError(f"WordProblem.moves is {self.moves}, which leaves the identity alone")

    @cached_property
    def elements(self) -> np.ndarray:
        """(order, points): permutations in lexicographic order; token i is the i-th."""
        return group_elements(self.points, self.even)

    @cached_property
    def table(self) -> np.ndarray:
        """(order, order): see `group_table`."""
        return group_table(self.elements)

    @cached_property
    def drawn(self) -> np.ndarray:
        """Tokens that rows are made of."""
        moved = (self.elements != np.arange(self.points)).sum(1)
        return np.flatnonzero(moved <= (self.points if self.moves is None else self.moves))

    @property
    def vocabulary(self) -> int:
        """The group's order: 60 of A5, 120 of S5."""
        return len(self.elements)

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw rows of any length from 1.

        Raises:
            ValueError: `length` is below 1.
        """
        if length < 1:
            raise ValueError(f"WordProblem needs at least 1 token, not {length}")
        tokens = rng.choice(self.drawn, (rows, length))
        products, span = tokens.copy(), 1  # products[t]: of the last `span` tokens up to t
        while span < length:
            products[:, span:] = self.table[products[:, :-span], products[:, span:]]
            span *= 2
        return Sample(tokens, products, np.full(rows, np.nan, np.float32))
