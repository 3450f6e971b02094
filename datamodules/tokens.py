"""Bytes as token ids and back, without loss: bytes themselves, or pairs merged byte by byte (BPE, arXiv 1508.07909)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

BYTES = 256
BOS = 256  # ids below are bytes, ids above are merges
FILE = "tokenizer.json"
# Letters with the bytes of all that isn't ASCII, digits, the rest, each with one space before; and white space.
PIECES = r" ?[A-Za-z\x{80}-\x{ff}]+| ?[0-9]+| ?[^ \t-\rA-Za-z0-9\x{80}-\x{ff}]+|[ \t-\r]+"


class Encoder(Protocol):
    """Bytes to ids and back."""

    @property
    def size(self) -> int:
        """Number of ids."""

    @property
    def bos(self) -> int:
        """The id that begins a document; no text encodes to it."""

    def encode(self, text: bytes) -> np.ndarray:
        """Ids of any bytes, int64 of shape (n,)."""

    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes of ids (n,); nothing for `bos`.

        Raises:
            ValueError: if an id stands for nothing.
        """

    @property
    def bytes_per_token(self) -> np.ndarray:
        """Bytes that each id stands for, int64 of shape (size,); 0 for `bos`."""


class Tokens(Protocol):
    """How text becomes ids, before any text was seen."""

    @property
    def size(self) -> int:
        """Number of ids of the encoder that `fit` returns."""

    @property
    def bos(self) -> int:
        """The id that begins a document."""

    @property
    def name(self) -> str:
        """A short name for messages and folders."""

    def identity(self) -> dict[str, str]:
        """All that ids depend on beside the training text."""

    def fit(self, texts: Iterable[bytes], folder: Path) -> Encoder:
        """Learns from training texts what there is to learn and keeps it in a folder.

        Raises:
            ValueError: if there is too little to learn from.
        """

    def load(self, folder: Path) -> Encoder:
        """What `fit` kept.

        Raises:
            OSError, ValueError: if it isn't there, is broken or of another size.
        """


@dataclass(frozen=True)
class Bytes:
    """A byte is its own id; nothing is learnt."""

    size: int = BYTES + 1
    bos: int = BOS
    name: str = "bytes"

    def __post_init__(self) -> None:
        _check_bos(self.bos)
        if self.size != BYTES + 1:
            raise ValueError(f"tokens.size is {self.size}, but bytes have {BYTES + 1} ids with the beginning's")

    def identity(self) -> dict[str, str]:
        """Of no parameters."""
        return {"tokens": self.name}

    def fit(self, texts: Iterable[bytes], folder: Path) -> Encoder:
        """Returns itself."""
        return self

    def load(self, folder: Path) -> Encoder:
        """Returns itself."""
        return self

    def encode(self, text: bytes) -> np.ndarray:
        """As in `Encoder`."""
        return np.frombuffer(text, np.uint8).astype(np.int64)

    def decode(self, ids: np.ndarray) -> bytes:
        """As in `Encoder`."""
        ids = _checked(ids, self.size)
        return ids[ids != self.bos].astype(np.uint8).tobytes()

    @property
    def bytes_per_token(self) -> np.ndarray:
        """As in `Encoder`."""
        return (np.arange(self.size) != self.bos).astype(np.int64)


@dataclass(frozen=True)
class BPE:
    """Merges of frequent pairs, learnt from the training split; any bytes can be encoded, UTF-8 or not.

    Attributes:
        size: ids in all: 256 bytes, the beginning's and merges.
        bos: 256.
        sample_bytes: bytes of the training split to learn from, at most.
        longest: bytes of a merged token, at most.
        path: a fitted `tokenizer.json` to take instead of learning.
    """

    size: int = 4096
    bos: int = BOS
    sample_bytes: int = 100_000_000
    longest: int = 32
    path: str | Path | None = None
    name: str = "bpe"

    def __post_init__(self) -> None:
        _check_bos(self.bos)
        if not BYTES + 1 < self.size <= 2**20:
            raise ValueError(f"tokens.size is {self.size}, expected more than {BYTES + 1} and at most {2**20}")

    def identity(self) -> dict[str, str]:
        """Size, sample and pieces, or those of the file.

        Raises:
            OSError: if there is no such file.
        """
        if self.path is not None:
            return {
                "tokens": self.name,
                "sha256": hashlib.sha256(Path(self.path).expanduser().read_bytes()).hexdigest(),
            }
        learnt = {"size": self.size, "sample_bytes": self.sample_bytes, "longest": self.longest, "pieces": PIECES}
        return {"tokens": self.name} | {key: str(value) for key, value in learnt.items()}

    def fit(self, texts: Iterable[bytes], folder: Path) -> MergedBytes:
        """Learns the merges and writes them to `tokenizer.json` in the folder, at once; the same texts give the same file.

        Raises:
            ValueError: if the texts have too few pairs for so many ids, or `path` is of another size or no tokenizer.
            OSError: if there is no file at `path`.
        """
        if self.path is not None:
            given = Path(self.path).expanduser()
            self._read(given)
            publish(given.read_bytes(), folder / FILE)
            return self.load(folder)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
        trainer = trainers.BpeTrainer(
            vocab_size=self.size - 1,
            initial_alphabet=[chr(byte) for byte in range(BYTES)],
            max_token_length=self.longest,
            show_progress=False,
        )
        tokenizer.train_from_iterator(_characters(texts, self.sample_bytes), trainer)
        found = tokenizer.get_vocab_size() + 1
        if found != self.size:
            raise ValueError(f"the training text has pairs for {found} ids; set tokens.size to at most that")
        publish(tokenizer.to_str(pretty=True).encode(), folder / FILE)
        return self.load(folder)

    def load(self, folder: Path) -> MergedBytes:
        """As in `Tokens`."""
        return self._read(folder / FILE)

    def _read(self, path: Path) -> MergedBytes:
        encoder = MergedBytes(path)
        if encoder.size != self.size:
            raise ValueError(f"{path}: {encoder.size} ids, tokens.size is {self.size}")
        return encoder


class MergedBytes:
    """A fitted `BPE`.

    Args:
        path: its `tokenizer.json`.

    Raises:
        OSError, ValueError: if the file is missing or not one that `BPE.fit` wrote.
    """

    bos = BOS

    def __init__(self, path: Path) -> None:
        content = path.read_text("utf-8")
        try:
            self.tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{path}: not a tokenizer ({error})") from error
        pieces: dict[int, str] = {rank: piece for piece, rank in self.tokenizer.get_vocab().items()}
        if [pieces.get(byte) for byte in range(BYTES)] != [chr(byte) for byte in range(BYTES)]:
            raise ValueError(f"{path}: its first {BYTES} tokens are not the bytes, so BPE.fit did not write it")
        ranks = [pieces[rank].encode("latin-1") for rank in range(len(pieces))]
        self.table = [*ranks[:BOS], b"", *ranks[BOS:]]
        self.size = len(self.table)

    def encode(self, text: bytes) -> np.ndarray:
        """As in `Encoder`."""
        ranks = np.array(self.tokenizer.encode(text.decode("latin-1"), add_special_tokens=False).ids, np.int64)
        return ranks + (ranks >= BOS)

    def decode(self, ids: np.ndarray) -> bytes:
        """As in `Encoder`."""
        return b"".join(self.table[index] for index in _checked(ids, self.size).tolist())

    @property
    def bytes_per_token(self) -> np.ndarray:
        """As in `Encoder`."""
        return np.array([len(piece) for piece in self.table], np.int64)


def publish(content: bytes, path: Path) -> None:
    """Writes a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def before_last_word(text: bytes) -> int:
    """Where the space before the last word is, or else the end; no token reaches from before that space to behind it."""
    at = text.rfind(b" ", 1)
    while at > 0 and text[at - 1 : at].isspace():
        at = text.rfind(b" ", 1, at)
    return at if at > 0 else len(text)


def blocks(text: bytes, size: int = 1 << 20) -> Iterator[bytes]:
    """A text in pieces of at most so many bytes, cut before a word where a piece has any: their ids are the text's."""
    start = 0
    while start < len(text):
        block = text[start : start + size]
        end = len(block) if start + size >= len(text) else before_last_word(block)
        yield block[:end]
        start += end


def _characters(texts: Iterable[bytes], most: int) -> Iterator[str]:
    """A character for each byte (Latin-1), so that the library, which takes strings, sees bytes alone."""
    left = most
    for text in texts:
        yield text[:left].decode("latin-1")
        left -= len(text)
        if left <= 0:
            return


def _check_bos(bos: int) -> None:
    if bos != BOS:
        raise ValueError(f"tokens.bos is {bos}, but bytes are 0 to 255 and {BOS} begins a document")


def _checked(ids: np.ndarray, size: int) -> np.ndarray:
    ids = np.asarray(ids, np.int64)
    wrong = (ids < 0) | (ids >= size)
    if wrong.any():
        place = int(wrong.argmax())
        raise ValueError(f"token {ids[place]} at place {place} is out of range: there are {size}")
    return ids
