"""Questions about long texts as rows of bytes: the text to fill them with, and how text becomes a `Sample`.

A row is BOS, prompt, answer. The answer begins at the same column in all rows; where an answer is shorter than the
longest possible one, BOS fills the row: the document is over, nothing is asked there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from datamodules.synthetic.sample import Sample
from datamodules.text_documents import Split, TextSource
from datamodules.text_shakespeare import Shakespeare
from datamodules.tokens import BOS, Bytes

VOCABULARY = Bytes().size
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


class Question(NamedTuple):
    """One row: `prompt` ends where `answer` begins; see `Sample` for the rest."""

    prompt: bytes
    answer: bytes
    references: tuple[str, ...]
    depth: float = float("nan")


class Haystack(Protocol):
    """Text to hide things in, made of units that `joint` joins."""

    @property
    def joint(self) -> bytes: ...

    def __call__(self, rng: np.random.Generator, size: int, taken: Set[str] = frozenset()) -> list[bytes]:
        """Returns one unit or more that joined have `size` bytes, the last maybe cut short.

        Args:
            size: 1 or more.
            taken: keys of the hidden needles, which the haystack's own needles must not have.
        """


def cut(units: Sequence[bytes], joint: bytes, size: int) -> list[bytes]:
    """Returns the first units, the last cut short, that joined have `size` bytes.

    Raises:
        ValueError: all units, with a joint after the last, have less.
    """
    kept, left = [], size
    for unit in units:
        kept.append(unit[:left])
        left -= len(unit) + len(joint)
        if left <= 0:
            break
    else:
        raise ValueError(f"{len(kept)} units fill {size - left - len(joint)} bytes of haystack, {size} are wanted")
    kept[-1] += joint[: max(left + len(joint), 0)]  # a cut that falls on the joint keeps the joint
    return kept


@dataclass(frozen=True)
class Repeated:
    """One line again and again; as it stands the noise of RULER (arXiv 2404.06654)."""

    line: str = NOISE
    joint: ClassVar[bytes] = b"\n"

    def __call__(self, rng: np.random.Generator, size: int, taken: Set[str] = frozenset()) -> list[bytes]:
        line = self.line.encode()
        return cut([line] * (size // (len(line) + len(self.joint)) + 1), self.joint, size)


@dataclass(frozen=True)
class Prose:
    """Running text with one space for every white space, from a sentence drawn at random; its units are sentences.

    Attributes:
        source: documents, read at the first row; they follow each other, and after the last comes the first.
        split: of the source, in training; held-out rows take those of their own.
    """

    source: TextSource = field(default_factory=Shakespeare)
    split: Split = "train"
    joint: ClassVar[bytes] = b" "

    @cached_property
    def _corpus(self) -> tuple[bytes, np.ndarray]:
        documents = self.source.documents(self.split)
        text = b" ".join(word for document in documents for word in document.text.split()) + b" "
        if not text.strip():
            raise ValueError(f"Prose: split {self.split!r} of {self.source!r} has no text")
        starts = [0, *(match.end() for match in re.finditer(rb"[.!?][\"')\]]* ", text) if match.end() < len(text))]
        return text, np.array(starts)

    def __call__(self, rng: np.random.Generator, size: int, taken: Set[str] = frozenset()) -> list[bytes]:
        text, starts = self._corpus
        index = int(rng.integers(len(starts)))
        sentences, left = [], size
        while left > 0:
            begin, end = starts[index], starts[index + 1] if index + 1 < len(starts) else len(text)
            sentences.append(text[begin : end - 1])
            left -= int(end - begin)
            index = (index + 1) % len(starts)
        return cut(sentences, self.joint, size)


def haystack_of(split: Split, haystack: Haystack) -> Haystack:
    """The haystack of a split: prose is that of its documents, others are the same for all."""
    return replace(haystack, split=split) if isinstance(haystack, Prose) else haystack


def hide(units: Sequence[bytes], hidden: Sequence[bytes], places: Sequence[int]) -> list[bytes]:
    """Inserts `hidden[i]` before `units[places[i]]`, or at the end where that is len(units).

    Args:
        places: not descending.
    """
    parts, last = [], 0
    for item, place in zip(hidden, places, strict=True):
        parts += [*units[last:place], item]
        last = place
    return [*parts, *units[last:]]


def boundaries(units: Sequence[bytes]) -> np.ndarray:
    """Returns (units + 1,) float64: the share of the units' bytes before each unit, and 1 for the end."""
    ends = np.cumsum([0, *map(len, units)])
    return ends / ends[-1]


def room(name: str, length: int, least: int) -> None:
    """Raises a ValueError where rows of `length` tokens are shorter than the `least` that `name` takes."""
    if length < least:
        raise ValueError(f"{name}: length {length} is too short, the longest problem takes {least} tokens")


def pack(questions: Sequence[Question], length: int, longest: int) -> Sample:
    """Makes rows of `length` tokens whose answers begin at column `length` − `longest`.

    Args:
        questions: prompts of exactly `length` − `longest` − 1 bytes.
        longest: bytes of the longest answer that may come.

    Raises:
        ValueError: a prompt has another length, or an answer is empty or longer than `longest`.
    """
    tokens = np.full((len(questions), length), BOS, dtype=np.int64)
    targets = np.full((len(questions), length), -100, dtype=np.int64)
    start = length - longest
    for row, question in enumerate(questions):
        answer = np.frombuffer(question.answer, dtype=np.uint8)
        if len(question.prompt) != start - 1 or not 0 < len(answer) <= longest:
            raise ValueError(
                f"prompt of {len(question.prompt)} bytes and answer of {len(answer)}, "
                f"expected {start - 1} and 1 to {longest}"
            )
        tokens[row, 1:start] = np.frombuffer(question.prompt, dtype=np.uint8)
        tokens[row, start : start + len(answer)] = answer
        targets[row, start - 1 : start - 1 + len(answer)] = answer
    depth = np.array([question.depth for question in questions], dtype=np.float32)
    return Sample(tokens, targets, depth, tuple(question.references for question in questions), text=True)
