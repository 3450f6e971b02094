"""What a text source is: named documents in three splits, and the checks that all sources share."""

from __future__ import annotations

import codecs
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


def check_utf8(text: bytes, name: str, block: int = 1 << 20) -> bytes:
    """Returns `text`.

    Args:
        block: bytes that are decoded at once.

    Raises:
        ValueError: if it isn't UTF-8; the message names the byte's offset.
    """
    decoder, held = codecs.getincrementaldecoder("utf-8")(), 0
    for start in range(0, len(text), block):
        end = min(start + block, len(text))
        try:
            decoder.decode(text[start:end], final=end == len(text))
        except UnicodeDecodeError as error:
            place = start - held + error.start
            raise ValueError(
                f"{name}: byte {place} (0x{text[place]:02x}) is not UTF-8 ({error.reason}); convert the file"
            ) from error
        held = len(decoder.getstate()[0])  # of a character that the block cut
    return text


def draw_splits(texts: Iterable[bytes], share: float) -> dict[bytes, Split]:
    """Draws validation and test texts by their sha256: each `share` of all that differ, but one at least.

    With fewer than three texts some splits stay empty: one is for training, of two one is for validation.

    Args:
        texts: sha256 of each; equal ones are one.

    Returns:
        The split by sha256.
    """
    ordered = sorted(set(texts))
    count = max(1, min(round(share * len(ordered)), (len(ordered) - 1) // 2))  # training keeps one
    test = count if len(ordered) > 2 else 0
    val = count if len(ordered) > 1 else 0
    return {
        digest: "test" if index < test else "val" if index < test + val else "train"
        for index, digest in enumerate(ordered)
    }


def split_of(name: str) -> Split:
    """Twentieths by the sha256 of a name: 0 is test, 1 validation, the rest training."""
    twentieth = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20
    return "test" if twentieth == 0 else "val" if twentieth == 1 else "train"


def existing(path: Path, what: str) -> Path:
    """Returns `path`.

    Raises:
        SourceError: if there is nothing.
    """
    if not path.exists():
        raise SourceError(f"{path}: no such {what}")
    return path
