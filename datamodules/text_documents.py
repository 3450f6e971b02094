"""What a text source is: named documents in three splits, and the checks that all sources share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from datamodules.embedded_source import SourceError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Document(NamedTuple):
    """One text that is read from its beginning.

    Attributes:
        name: what the source calls it, unique in its split.
        text: its bytes.
    """

    name: str
    text: bytes


class TextSource(Protocol):
    """Documents in three splits; no document is in two.

    `cache` is where downloads lie, None for the usual folder.
    """

    @property
    def name(self) -> str:
        """A short name for messages and folders."""

    def identity(self, cache: Path | None = None) -> dict[str, str]:
        """All that the documents depend on, so that texts which differ are never taken for each other.

        Raises:
            OSError, ValueError: if files are missing or altered.
        """

    def documents(self, split: Split, cache: Path | None = None) -> Iterator[Document]:
        """The documents of a split, always in the same order; none where the source has no such split.

        Raises:
            OSError, ValueError: if files are missing, altered or broken.
        """


def check_utf8(text: bytes, name: str) -> bytes:
    """Returns `text`.

    Raises:
        ValueError: if it isn't UTF-8; the message names the byte's offset.
    """
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: byte {error.start} (0x{text[error.start]:02x}) is not UTF-8 ({error.reason}); convert the file"
        ) from error
    return text


def held_out_names(names: Iterable[str], share: float) -> dict[Split, frozenset[str]]:
    """Draws validation and test documents by the sha256 of their names: each `share` of all, but one at least.

    With fewer than three documents some splits stay empty: one document is for training, of two one is for validation.
    """
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    count = max(1, round(share * len(ordered)))
    test = ordered[:count] if len(ordered) > 2 else []
    val = ordered[len(test) : len(test) + count] if len(ordered) > 1 else []
    return {
        "test": frozenset(test),
        "val": frozenset(val),
        "train": frozenset(ordered[len(test) + len(val) :]),
    }


def split_of(path: str) -> Split:
    """Twentieths by the sha256 of a path: 0 is test, 1 validation, the rest training."""
    twentieth = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 20
    return "test" if twentieth == 0 else "val" if twentieth == 1 else "train"


def existing(path: Path, what: str) -> Path:
    """Returns `path`.

    Raises:
        SourceError: if there is nothing.
    """
    if not path.exists():
        raise SourceError(f"{path}: no such {what}")
    return path
