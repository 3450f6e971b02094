"""Published corpora in the form that their authors gave them: WikiText-103 (arXiv 1609.07843) and PG-19 (arXiv 1911.05507)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from datamodules.embedded_source import SourceError
from datamodules.text_documents import SPLITS, Document, Split, check_utf8, existing

# One "=" each side, alone between blank lines: formulas within a paragraph have the same look.
TITLE = re.compile(rb"(?:\A|(?<=\A\n)|(?<=\A \n)|(?<=\n\n)|(?<=\n \n)) = (?!= )([^\n]*)(?<! =) = \n(?= ?\n)")
FOLDERS: dict[Split, str] = {"train": "train", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class WikiText103:
    """Articles of `wiki.train.tokens`, `wiki.valid.tokens` and `wiki.test.tokens`; nothing of a file is left out.

    Attributes:
        path: the folder of the three files.
        ending: "tokens", or "raw" for the raw version's files.
        name: for messages and folders.
    """

    path: str | Path
    ending: str = "tokens"
    name: str = "wikitext103"

    def identity(self, cache: Path | None = None) -> dict[str, str]:
        """Sizes and times of the files.

        Raises:
            SourceError: if one is missing.
        """
        return _identity(self.name, self.path, [self._file(split) for split in SPLITS])

    def documents(self, split: Split, cache: Path | None = None) -> Iterator[Document]:
        """Articles, each from its title line ` = Title = ` to before the next.

        Raises:
            SourceError: if the file is missing or has no such line.
            ValueError: if it isn't UTF-8.
        """
        file = self._file(split)
        text = check_utf8(file.read_bytes(), str(file))
        titles = list(TITLE.finditer(text))
        if not titles:
            raise SourceError(f"{file}: no line ' = Title = ', so this is not WikiText-103")
        bounds = [0, *(title.start() for title in titles[1:]), len(text)]
        for number, (title, (start, end)) in enumerate(zip(titles, pairwise(bounds), strict=True)):
            yield Document(f"{number} {title[1].decode()}", text[start:end])

    def _file(self, split: Split) -> Path:
        part = "valid" if split == "val" else split
        return existing(Path(self.path).expanduser() / f"wiki.{part}.{self.ending}", "file")


@dataclass(frozen=True)
class PG19:
    """Books: every .txt of the folders `train`, `validation` and `test`.

    Attributes:
        path: the folder of the three folders.
        name: for messages and folders.
    """

    path: str | Path
    name: str = "pg19"

    def identity(self, cache: Path | None = None) -> dict[str, str]:
        """Sizes and times of the files.

        Raises:
            SourceError: if a folder is missing or empty.
        """
        return _identity(self.name, self.path, [file for split in SPLITS for file in self._files(split)])

    def documents(self, split: Split, cache: Path | None = None) -> Iterator[Document]:
        """Books by file name.

        Raises:
            SourceError: if the folder is missing or holds no book.
            ValueError: if a book is empty or isn't UTF-8.
        """
        for file in self._files(split):
            text = check_utf8(file.read_bytes(), str(file))
            if not text.strip():
                raise ValueError(f"{file}: the file is empty")
            yield Document(file.stem, text)

    def _files(self, split: Split) -> list[Path]:
        folder = existing(Path(self.path).expanduser() / FOLDERS[split], "folder")
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise SourceError(f"{folder}: holds no .txt file")
        return files


def _identity(name: str, path: str | Path, files: Sequence[Path]) -> dict[str, str]:
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    where = str(Path(path).expanduser().resolve())
    return {"source": name, "path": where, "files": hashlib.sha256(repr(states).encode()).hexdigest()}
