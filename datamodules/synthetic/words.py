"""Words to be counted: common words and frequent words of RULER (arXiv 2404.06654), without its solved examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from string import ascii_lowercase
from typing import ClassVar

import numpy as np
import torch

from datamodules.synthetic.needle import Letters, distinct
from datamodules.synthetic.prompts import VOCABULARY, Question, pack, room
from datamodules.synthetic.sample import Sample
from datamodules.synthetic.word_lists import word_list


@cache
def lexicon(shortest: int, longest: int) -> tuple[str, ...]:
    """Returns nouns, adjectives and verbs of so many letters, sorted.

    Raises:
        SourceError: the lists cannot be had.
    """
    words = {*word_list("noun"), *word_list("adjective"), *word_list("verb")}
    return tuple(sorted(word for word in words if shortest <= len(word) <= longest))


def numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def numbered_size(count: int, letters: int) -> int:
    """Bytes of `numbered` for `count` words of so many letters in all."""
    digits = sum(max(count + 1 - 10**power, 0) for power in range(len(str(count))))
    return digits + 3 * count - 1 + letters  # ". " after each number, " " between


@dataclass(frozen=True)
class CommonWords:
    """A numbered list of English words in random order, some of them more often than the rest; name those.

    As many rare words as fit are drawn; a few that come once make the list end on the byte. The answer is numbered as
    the list is, in the order of first appearance.

    Attributes:
        common: words to find.
        repeats: times each of them is there.
        rare_repeats: times each other word is there.
    """

    common: int = 10
    repeats: int = 30
    rare_repeats: int = 3
    vocabulary: ClassVar[int] = VOCABULARY
    shortest: ClassVar[int] = 3  # letters of the words that are drawn
    longest: ClassVar[int] = 10

    def __post_init__(self) -> None:
        if self.common < 1 or not 1 <= self.rare_repeats < self.repeats:
            raise ValueError(
                f"CommonWords: common {self.common} must be positive and rare_repeats {self.rare_repeats} "
                f"from 1 to less than repeats {self.repeats}"
            )

    @property
    def longest_answer(self) -> int:
        """Bytes of the longest answer."""
        return numbered_size(self.common, self.common * self.longest)

    @property
    def least(self) -> int:
        """Tokens that the longest problem takes, with the fewest words that come once."""
        before, after = self._frame()
        words = self.common * self.repeats + 2
        list_size = numbered_size(words, words * self.longest)
        return 1 + len(before) + list_size + len(after) + self.longest_answer

    def _frame(self) -> tuple[bytes, bytes]:
        before = (
            "Below is a numbered list of words. In these words, some appear more often than others. "
            "Memorize the ones that appear most often.\n"
        )
        after = (
            f"\nQuestion: What are the {self.common} most common words in the above list? "
            f"Answer: The top {self.common} words that appear most often in the list are: "
        )
        return before.encode(), after.encode()

    def _question(self, rng: np.random.Generator, size: int, lexicon: tuple[str, ...]) -> Question:
        """Draws a problem whose prompt has `size` bytes."""
        before, after = self._frame()
        goal = size - len(before) - len(after)
        drawn = [lexicon[index] for index in rng.permutation(len(lexicon))]
        common, rest = drawn[: self.common], drawn[self.common :]
        words = common * self.repeats
        letters = sum(map(len, words))

        def gap(count: int) -> int:
            """Letters that so many more words must have for the list to end on the byte."""
            return goal - numbered_size(len(words) + count, letters)

        # while two short words fit after a rare one; what is left is then filled by words of 3 to 10 letters, each once
        while gap(self.rare_repeats + 2) >= self.rare_repeats * self.longest + 2 * self.shortest and rest:
            word = rest.pop()
            words += [word] * self.rare_repeats
            letters += len(word) * self.rare_repeats
        count = next(count for count in range(1, goal) if gap(count) <= count * self.longest)
        base, longer = divmod(gap(count), count)
        for wanted in [base + 1] * longer + [base] * (count - longer):
            fitting = [word for word in rest if len(word) == wanted]
            if not fitting:
                raise ValueError(
                    f"CommonWords: a list of {goal} bytes takes more than the {len(lexicon)} words there are"
                )
            rest.remove(fitting[0])
            words.append(fitting[0])
        listed = [words[index] for index in rng.permutation(len(words))]
        found = tuple(word for word in dict.fromkeys(listed) if word in common)
        return Question(before + numbered(listed).encode() + after, numbered(found).encode(), found)

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw `rows` problems of `length` bytes, BOS included; see `prompts.pack`.

        Raises:
            ValueError: `length` is less than `least`, or more than all words fill.
        """
        room("CommonWords", length, self.least)
        size, words = length - 1 - self.longest_answer, lexicon(self.shortest, self.longest)
        return pack([self._question(rng, size, words) for _ in range(rows)], length, self.longest_answer)


@dataclass(frozen=True)
class FrequentWords:
    """Coded words in random order, the k-th floor(n k^−alpha / ζ(alpha)) times; the first is dots, name the next three.

    n is the largest that fits; more dots make the text end on the byte. The answer goes from the most frequent on.

    Attributes:
        alpha: exponent of Zipf's law.
        word: what the coded words are.
    """

    alpha: float = 2.0
    word: Letters = field(default_factory=lambda: Letters(6, ascii_lowercase))
    vocabulary: ClassVar[int] = VOCABULARY
    dots: ClassVar[str] = "..."

    def __post_init__(self) -> None:
        if not self.alpha > 1:
            raise ValueError(f"FrequentWords: alpha {self.alpha} must be greater than 1")

    @property
    def longest_answer(self) -> int:
        """Bytes of every answer."""
        return 3 * self.word.length + 4

    @property
    def _zeta(self) -> float:
        return torch.special.zeta(torch.tensor(self.alpha, dtype=torch.float64), torch.tensor(1.0)).item()

    def counts(self, total: int) -> np.ndarray:
        """(words,) how often each word comes that comes at all, the dots first."""
        ranks = np.arange(1, int((total / self._zeta) ** (1 / self.alpha)) + 2)
        counts = (total * ranks.astype(np.float64) ** -self.alpha / self._zeta).astype(np.int64)
        return counts[counts > 0]

    def _size(self, counts: np.ndarray) -> int:
        """Bytes of the text, a space between words."""
        return int(counts[:1].sum() * (len(self.dots) + 1) + counts[1:].sum() * (self.word.length + 1)) - 1

    @property
    def least(self) -> int:
        """Tokens of the shortest problem whose first five words differ in frequency."""
        # counts of neighbouring ranks differ wherever n times the difference of their shares is 1 or more
        closest = 4**-self.alpha - 5**-self.alpha
        counts = self.counts(math.ceil(self._zeta / closest))
        before, after = self._frame()
        return 1 + len(before) + self._size(counts) + len(after) + self.longest_answer

    def _frame(self) -> tuple[bytes, bytes]:
        before = (
            "Read the following coded text and track the frequency of each coded word. "
            "Find the three most frequently appeared coded words. "
        )
        after = (
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text? "
            "Answer: According to the coded text above, the three most frequently appeared words are: "
        )
        return before.encode(), after.encode()

    def _fitting(self, goal: int) -> np.ndarray:
        """Counts of the largest text of at most `goal` bytes."""
        low, high = 1, goal
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._size(self.counts(middle)) <= goal else (low, middle - 1)
        return self.counts(low)

    def _question(self, rng: np.random.Generator, counts: np.ndarray, goal: int) -> Question:
        """Draws a problem whose text has `goal` bytes."""
        names = [self.dots, *distinct(self.word, rng, len(counts) - 1)]
        text = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        more, left = divmod(goal - self._size(counts), len(self.dots) + 1)
        text += [self.dots] * more
        text[0] += "." * left
        listed = " ".join(text[index] for index in rng.permutation(len(text)))
        before, after = self._frame()
        return Question(before + listed.encode() + after, ", ".join(names[1:4]).encode(), tuple(names[1:4]))

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw `rows` problems of `length` bytes, BOS included; see `prompts.pack`.

        Raises:
            ValueError: `length` is less than `least`.
        """
        room("FrequentWords", length, self.least)
        goal = length - 1 - self.longest_answer - sum(map(len, self._frame()))
        counts = self._fitting(goal)
        return pack([self._question(rng, counts, goal) for _ in range(rows)], length, self.longest_answer)
