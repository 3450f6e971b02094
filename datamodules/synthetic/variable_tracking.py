"""Variable tracking of RULER (arXiv 2404.06654): chains of assignments in noise; name the variables that hold a value.

RULER's solved example before the question is left out, and the answer lists variables in the order of the chain.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from datamodules.synthetic.needle import Letters, Numbers, distinct
from datamodules.synthetic.prompts import VOCABULARY, Haystack, Question, Repeated, haystack_of, hide, pack, room
from datamodules.synthetic.sample import Sample
from datamodules.text_documents import Split


@dataclass(frozen=True)
class VariableTracking:
    """Chains VAR A = 12345, VAR B = VAR A, …, the lines of each scattered in order; one chain is asked for.

    Attributes:
        haystack: what the lines are scattered in.
        chains: chains, of disjoint variables and distinct values.
        hops: assignments of one variable to the next in a chain, which so has one variable more.
        name, value: what variables are called and what they hold.
    """

    haystack: Haystack = field(default_factory=Repeated)
    chains: int = 1
    hops: int = 4
    name: Letters = field(default_factory=Letters)
    value: Numbers = field(default_factory=lambda: Numbers(digits=5))
    vocabulary: ClassVar[int] = VOCABULARY

    def __post_init__(self) -> None:
        if self.chains < 1 or self.hops < 0:
            raise ValueError(f"VariableTracking: chains {self.chains} must be positive, hops {self.hops} not negative")

    @property
    def longest_answer(self) -> int:
        """Bytes of every answer."""
        return (self.hops + 1) * (self.name.length + 1) - 1

    @property
    def least(self) -> int:
        """Tokens that a problem takes, with one byte of haystack."""
        before, after = self._frame("0" * self.value.digits)
        lines = self._lines(["A" * self.name.length] * (self.hops + 1), "0" * self.value.digits)
        hidden = self.chains * sum(len(line) + len(self.haystack.joint) for line in lines)
        return 1 + len(before) + 1 + hidden + len(after) + self.longest_answer

    def _frame(self, value: str) -> tuple[bytes, bytes]:
        before = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        after = (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
            f"Answer: According to the chain(s) of variable assignment in the text above, "
            f"{self.hops + 1} variables are assgined the value {value}, they are: "  # spelt as in RULER's prompt
        )
        return before.encode(), after.encode()

    def _lines(self, names: list[str], value: str) -> list[bytes]:
        sides = [value, *(f"VAR {name}" for name in names)]
        return [f"VAR {name} = {side}".encode() for name, side in zip(names, sides, strict=False)]

    def _question(self, rng: np.random.Generator, size: int) -> Question:
        """Draws a problem whose prompt has `size` bytes."""
        per = self.hops + 1
        names = distinct(self.name, rng, self.chains * per)
        chains = [names[start : start + per] for start in range(0, len(names), per)]
        values = distinct(self.value, rng, self.chains)
        lines = [line for chain, value in zip(chains, values, strict=True) for line in self._lines(chain, value)]
        before, after = self._frame(values[0])  # chains are in no order: the first will do
        left = size - len(before) - len(after) - sum(len(line) + len(self.haystack.joint) for line in lines)
        units = self.haystack(rng, left)
        places = np.sort(rng.integers(len(units) + 1, size=(self.chains, per))).reshape(-1)
        # between chains the lines that share a place come in random order, within a chain in the chain's
        chain = np.repeat(np.arange(self.chains), per)
        order = np.lexsort((rng.permutation(self.chains)[chain], places))
        text = hide(units, [lines[index] for index in order], places[order].tolist())
        answer = tuple(chains[0])
        return Question(before + self.haystack.joint.join(text) + after, " ".join(answer).encode(), answer)

    def for_split(self, split: Split) -> VariableTracking:
        """The same problem in the haystack of a split."""
        return replace(self, haystack=haystack_of(split, self.haystack))

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw `rows` problems of `length` bytes, BOS included; see `prompts.pack`.

        Raises:
            ValueError: `length` is less than `least`.
        """
        room("VariableTracking", length, self.least)
        size = length - 1 - self.longest_answer
        return pack([self._question(rng, size) for _ in range(rows)], length, self.longest_answer)
