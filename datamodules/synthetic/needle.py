"""Needles in a haystack: passkey, S-NIAH, multikey, multivalue and multiquery, with the prompts of RULER (arXiv 2404.06654).

RULER's essays are replaced by any prose, keys never repeat in a row, and the space before the answer belongs to the prompt.
"""

from __future__ import annotations

import uuid
from collections.abc import Set
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import ClassVar, Protocol

import numpy as np

from datamodules.synthetic.prompts import (
    VOCABULARY,
    Haystack,
    Question,
    Repeated,
    boundaries,
    cut,
    haystack_of,
    hide,
    pack,
    room,
)
from datamodules.synthetic.sample import Sample
from datamodules.synthetic.word_lists import word_list
from datamodules.text_documents import Split

DEPTHS = np.round(np.linspace(0, 100, 40))  # percent


class Kind(Protocol):
    """What a key or a value is."""

    @property
    def plural(self) -> str: ...

    @property
    def longest(self) -> int:
        """Characters of the longest one."""

    @property
    def count(self) -> int:
        """How many there are."""

    def __call__(self, rng: np.random.Generator, count: int) -> list[str]:
        """Draws `count`, with replacement."""


@dataclass(frozen=True)
class Numbers:
    """Numbers of as many digits, the first not 0."""

    digits: int = 7
    plural: ClassVar[str] = "numbers"

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 18:
            raise ValueError(f"Numbers: digits {self.digits} is outside 1 … 18")

    @property
    def longest(self) -> int:
        return self.digits

    @property
    def count(self) -> int:
        return 9 * 10 ** (self.digits - 1)

    def __call__(self, rng: np.random.Generator, count: int) -> list[str]:
        return [str(number) for number in rng.integers(10 ** (self.digits - 1), 10**self.digits, count)]


@dataclass(frozen=True)
class Letters:
    """Names of as many letters, of `alphabet`."""

    length: int = 5
    alphabet: str = ascii_uppercase
    plural: ClassVar[str] = "letters"

    def __post_init__(self) -> None:
        if self.length < 1 or not self.alphabet.isascii() or len(set(self.alphabet)) < max(len(self.alphabet), 1):
            raise ValueError(f"{self}: length must be 1 or more, and alphabet of distinct ASCII characters")

    @property
    def longest(self) -> int:
        return self.length

    @property
    def count(self) -> int:
        return len(self.alphabet) ** self.length

    def __call__(self, rng: np.random.Generator, count: int) -> list[str]:
        drawn = rng.integers(len(self.alphabet), size=(count, self.length))
        return ["".join(self.alphabet[letter] for letter in name) for name in drawn]


@dataclass(frozen=True)
class Words:
    """Adjective-noun."""

    plural: ClassVar[str] = "words"

    @property
    def longest(self) -> int:
        return max(map(len, word_list("adjective"))) + 1 + max(map(len, word_list("noun")))

    @property
    def count(self) -> int:
        return len(word_list("adjective")) * len(word_list("noun"))

    def __call__(self, rng: np.random.Generator, count: int) -> list[str]:
        adjectives, nouns = word_list("adjective"), word_list("noun")
        firsts, seconds = rng.integers(len(adjectives), size=count), rng.integers(len(nouns), size=count)
        return [f"{adjectives[first]}-{nouns[second]}" for first, second in zip(firsts, seconds, strict=True)]


@dataclass(frozen=True)
class Uuids:
    """Random identifiers of version 4."""

    plural: ClassVar[str] = "uuids"
    longest: ClassVar[int] = 36
    count: ClassVar[int] = 2**122

    def __call__(self, rng: np.random.Generator, count: int) -> list[str]:
        return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


def distinct(kind: Kind, rng: np.random.Generator, count: int, taken: Set[str] = frozenset()) -> list[str]:
    """Draws `count` that differ from each other and from those `taken`.

    Raises:
        ValueError: there are not as many.
    """
    if count > kind.count - len(taken):
        raise ValueError(f"{kind!r}: {count + len(taken)} distinct ones are asked for, there are {kind.count}")
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn.update(dict.fromkeys(item for item in kind(rng, count - len(drawn)) if item not in taken))
    return list(drawn)


def needle(key: str, value: str, plural: str) -> bytes:
    return f"One of the special magic {plural} for {key} is: {value}.".encode()


@dataclass(frozen=True)
class Needles:
    """A haystack of needles that nobody asks for; each line is one.

    Attributes:
        key, value: what the needles are made of, as in the `Needle` that it serves.
    """

    key: Kind = Words()
    value: Kind = Numbers()
    joint: ClassVar[bytes] = b"\n"

    def __call__(self, rng: np.random.Generator, size: int, taken: Set[str] = frozenset()) -> list[bytes]:
        shortest = len(needle("", "", self.value.plural)) + 3  # a key, a value, a line feed
        keys = distinct(self.key, rng, min(size // shortest + 1, self.key.count - len(taken)), taken)
        values = self.value(rng, len(keys))
        needles = [needle(key, value, self.value.plural) for key, value in zip(keys, values, strict=True)]
        return cut(needles, self.joint, size)


@dataclass(frozen=True)
class Needle:
    """Keys have values that stand somewhere in a haystack; tell the values of the keys that are asked for.

    Several answers are separated by ", ": keys in the order of the question, values of a key in the order of the text.

    Attributes:
        haystack: what the needles are hidden in.
        key, value: what keys and values are.
        needles: keys in the text.
        values: values a key has, each in a needle of its own.
        queries: keys asked for.
        depth: percent of the haystack's bytes before the needle that is asked for, to the nearest end of a unit; None
            draws one of 40 evenly spaced depths for each needle. A `Sample` has where the needle then lies, as a share,
            where there is one answer.
    """

    haystack: Haystack = field(default_factory=Repeated)
    key: Kind = Words()
    value: Kind = Numbers()
    needles: int = 1
    values: int = 1
    queries: int = 1
    depth: float | None = None
    vocabulary: ClassVar[int] = VOCABULARY

    def __post_init__(self) -> None:
        if self.values < 1 or not 1 <= self.queries <= self.needles:
            raise ValueError(
                f"Needle: values {self.values} must be positive and queries {self.queries} from 1 to needles {self.needles}"
            )
        if self.depth is not None and (self.answers > 1 or not 0 <= self.depth <= 100):
            raise ValueError(f"Needle: depth {self.depth} must be in 0 … 100 and takes one answer, not {self.answers}")
        if isinstance(self.haystack, Needles) and (self.haystack.key, self.haystack.value) != (self.key, self.value):
            raise ValueError(f"Needle: haystack {self.haystack} has other keys or values than {self.key}, {self.value}")

    @property
    def answers(self) -> int:
        return self.queries * self.values

    @property
    def longest_answer(self) -> int:
        """Bytes of the longest answer."""
        return self.answers * (self.value.longest + 2) - 2

    @property
    def least(self) -> int:
        """Tokens that the longest problem takes, with one byte of haystack."""
        before, after = self._frame(["k" * self.key.longest] * self.queries)
        line = len(needle("k" * self.key.longest, "v" * self.value.longest, self.value.plural)) + len(
            self.haystack.joint
        )
        return 1 + len(before) + 1 + self.needles * self.values * line + len(after) + self.longest_answer

    def _frame(self, keys: list[str]) -> tuple[bytes, bytes]:
        query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
        kind, some, what, are = self.value.plural, "Some", "What are all", "are"
        if self.answers == 1:
            kind, some, what, are = kind.removesuffix("s"), "A", "What is", "is"
        before = (
            f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n"
        )
        after = (
            f"\n{what} the special magic {kind} for {query} mentioned in the provided text? "
            f"The special magic {kind} for {query} mentioned in the provided text {are} "
        )
        return before.encode(), after.encode()

    def _question(self, rng: np.random.Generator, size: int) -> Question:
        """Draws a problem whose prompt has `size` bytes."""
        keys = distinct(self.key, rng, self.needles)
        pairs = [(key, value) for key in keys for value in distinct(self.value, rng, self.values)]
        depths = rng.choice(DEPTHS, len(pairs), replace=len(pairs) > len(DEPTHS))
        if self.depth is not None:
            depths[0] = self.depth
        order = np.argsort(depths, kind="stable")
        hidden = [needle(key, value, self.value.plural) for key, value in (pairs[index] for index in order)]

        asked = [keys[index] for index in rng.permutation(self.queries)]  # keys are in no order: the first will do
        before, after = self._frame(asked)
        left = size - len(before) - len(after) - sum(len(line) + len(self.haystack.joint) for line in hidden)
        units = self.haystack(rng, left, frozenset(keys))
        ends = boundaries(units)
        places = np.abs(ends[:, None] - depths[order] / 100).argmin(0)
        text = hide(units, hidden, places.tolist())

        found = tuple(pairs[index][1] for key in asked for index in order if pairs[index][0] == key)
        depth = ends[places[order == 0]].item() if self.answers == 1 else float("nan")
        prompt = before + self.haystack.joint.join(text) + after
        return Question(prompt, ", ".join(found).encode(), found, depth)

    def for_split(self, split: Split) -> Needle:
        """The same problem in the haystack of a split."""
        return replace(self, haystack=haystack_of(split, self.haystack))

    def __call__(self, rng: np.random.Generator, rows: int, length: int) -> Sample:
        """Draw `rows` problems of `length` bytes, BOS included; see `prompts.pack`.

        Raises:
            ValueError: `length` is less than `least`.
        """
        room("Needle", length, self.least)
        size = length - 1 - self.longest_answer
        return pack([self._question(rng, size) for _ in range(rows)], length, self.longest_answer)
