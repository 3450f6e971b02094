"""Your own text: a file, or a folder of text, code, .jsonl and .parquet, split by document."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datamodules.embedded_source import SourceError
from datamodules.text_documents import SPLITS, Document, Split, check_utf8, draw_splits, existing

TEXT = (".txt", ".md", ".rst", ".tex", ".html", ".csv", ".py", ".c", ".h", ".cpp", ".hpp", ".cu", ".rs", ".go",
        ".java", ".js", ".ts", ".sh", ".yaml", ".toml")  # fmt: skip
RECORDS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class TextFiles:
    """Documents of local files.

    A text file is one document, or several where a separator stands between them; a line of .jsonl and a row of .parquet
    are one each. Documents are drawn for validation and testing by the sha256 of their texts, so that equal ones stay
    together, or splits are given.

    Attributes:
        path: a file, or a folder that is searched with all its folders, but for hidden ones and symbolic links.
        separator: what stands between documents of a text file; it belongs to none. None: a file is one document.
        train, val, test: files or folders within `path` that make the splits and share no file; None for all three draws
            them.
        held_out: share of the documents drawn for validation, and for testing.
        key: key of .jsonl, column of .parquet that holds the text.
        suffixes: of text files, in lower case.
        skip_empty: leave out documents without text, which are refused otherwise.
        allow_invalid: take bytes that aren't UTF-8 as they are.
        name: for messages and folders.
    """

    path: str | Path
    separator: str | None = None
    train: str | None = None
    val: str | None = None
    test: str | None = None
    held_out: float = 0.05
    key: str = "text"
    suffixes: tuple[str, ...] = TEXT
    skip_empty: bool = False
    allow_invalid: bool = False
    name: str = "text_files"

    def __post_init__(self) -> None:
        object.__setattr__(self, "suffixes", tuple(self.suffixes))  # a config gives a list
        if self.separator == "":
            raise ValueError("separator is empty; give the text that stands between documents, or null")
        if not 0 < self.held_out < 0.5:
            raise ValueError(f"held_out is {self.held_out}, expected a share between 0 and 0.5")
        if self.train is None and (self.val, self.test) != (None, None):
            raise ValueError("val or test is given without train; give all of them, or none to draw the splits")

    def identity(self, cache: Path | None = None) -> dict[str, str]:
        """What is asked for, and the names, sizes and times of the files.

        Raises:
            SourceError: if files are missing.
            ValueError: if splits share a file, or a file is of no kind that is read.
        """
        files = list(self._given()) if self.train is not None else self._files(None)
        states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        asked = {key: str(value) for key, value in asdict(self).items()}
        path = str(Path(self.path).expanduser().resolve())
        asked |= {"source": self.name, "path": path, "drawn": "by text"}
        return asked | {"files": hashlib.sha256(repr(states).encode()).hexdigest()}

    def documents(self, split: Split, cache: Path | None = None) -> Iterator[Document]:
        """The documents of a split, files by path.

        Raises:
            SourceError: if files are missing, or lack the separator everywhere.
            ValueError: if a document is empty, isn't UTF-8 or cannot be read; the message names file and offset or line.
        """
        if self.train is not None:
            yield from self._read(file for file, its in self._given().items() if its == split)
            return
        files = self._files(None)
        identity = json.dumps(self.identity())
        wanted = _drawn(self, identity)[split]
        if wanted:
            yield from self._read(files, wanted)

    def _given(self) -> dict[Path, Split]:
        taken: dict[Path, Split] = {}
        for split in SPLITS:
            for file in self._files(split):
                if taken.setdefault(file, split) != split:
                    raise ValueError(f"{file}: is in {taken[file]} and in {split}; give splits that share no file")
        return taken

    def _files(self, split: Split | None) -> list[Path]:
        """None for all files."""
        root = whole = self._root()
        known = (*self.suffixes, *RECORDS)
        if split is not None:
            part = getattr(self, split)
            if part is None:
                return []
            root = _resolved(existing(whole / part, "file or folder"))
            if not root.is_relative_to(whole):
                raise ValueError(f"{split}={part}: {root} is not within {whole}")
        if root.is_file():
            if root.suffix.lower() not in ("", *known):
                raise ValueError(
                    f"{root}: {root.suffix} is of no kind that is read: {', '.join(known)}; convert the file, or if it is "
                    f"text set +datamodule.source.suffixes=[{root.suffix.lower()}]"
                )
            return [root]
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths = (Path(folder, name) for name in names if not name.startswith("."))
            found += [
                path for path in paths if path.suffix.lower() in known and path.is_file() and not path.is_symlink()
            ]
        if not found:
            raise SourceError(f"{root}: holds no file that ends in {', '.join(known)}")
        return sorted(found)

    def _root(self) -> Path:
        return _resolved(existing(Path(self.path).expanduser(), "file or folder"))

    def _read(self, files: Iterable[Path], wanted: Container[str] | None = None) -> Iterator[Document]:
        """Documents by name, None for all."""
        root = self._root()
        texts, separated = 0, False
        for file in files:
            name = file.name if file == root else file.relative_to(root).as_posix()
            match file.suffix.lower():
                case ".jsonl":
                    documents: Iterable[Document] = read_jsonl(file, name, self.key, wanted)
                case ".parquet":
                    documents = read_parquet(file, name, self.key)
                case _:
                    documents = list(self._pieces(file, name))
                    texts, separated = texts + 1, separated or len(documents) != 1 or documents[0].name != name
            for document in documents:
                if wanted is not None and document.name not in wanted:
                    continue
                if document.text and not document.text.isspace():
                    yield document
                elif not self.skip_empty:
                    raise ValueError(f"{file}: {document.name} is empty; remove it, or set skip_empty=true")
        if self.separator is not None and texts and not separated:
            raise SourceError(f"{root}: the separator {self.separator!r} occurs in none of {texts} text files")

    def _pieces(self, file: Path, name: str) -> Iterator[Document]:
        text = file.read_bytes()
        if not self.allow_invalid:
            check_utf8(text, str(file))
        pieces = [text] if self.separator is None else text.split(self.separator.encode())
        if len(pieces) == 1:
            yield Document(name, text)
            return
        for number, piece in enumerate(pieces):
            if piece and not piece.isspace():  # a separator may also open or end the file
                yield Document(f"{name}#{number}", piece)


def _resolved(path: Path) -> Path:
    """A file that is a link keeps its own name, which says what it is."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


@functools.lru_cache(maxsize=4)
def _drawn(source: TextFiles, identity: str) -> dict[Split, frozenset[str]]:
    """Names by split; reads everything once, and `identity` makes changed files be read anew."""
    texts = {d.name: hashlib.sha256(d.text).digest() for d in source._read(source._files(None))}
    drawn = draw_splits(texts.values(), source.held_out)
    return {split: frozenset(name for name, text in texts.items() if drawn[text] == split) for split in SPLITS}


def read_jsonl(file: Path, name: str, key: str, wanted: Container[str] | None = None) -> Iterator[Document]:
    """Reads lines that are JSON objects with the text under `key`; blank lines are passed over.

    Args:
        wanted: names of documents; the lines of others aren't parsed. None for all.

    Raises:
        ValueError: naming file and line, if one is something else.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            document = f"{name}#{number}"
            if line.isspace() or (wanted is not None and document not in wanted):
                continue
            where = f"{file}: line {number}"
            check_utf8(line, where)
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # also numbers of too many digits, lists in lists in lists
                raise ValueError(f"{where} is not JSON that can be read ({error})") from error
            yield Document(document, _text_of(record, key, where))


def _text_of(record: Any, key: str, where: str) -> bytes:
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        found = f"the keys {', '.join(map(repr, record))}" if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where} has no text under {key!r}, found {found}")
    try:
        return str(record[key]).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half a surrogate pair at character {error.start} of {key!r}") from error


def read_parquet(file: Path, name: str, column: str) -> Iterator[Document]:
    """Reads a column of strings, a group of rows at a time.

    Raises:
        ModuleNotFoundError: without pyarrow.
        ValueError: if the file is broken, or has no such column of text.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{file}: reading .parquet needs pyarrow: pip install 'rotalith[parquet]'") from error
    try:
        with parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                raise ValueError(f"{file}: no column {column!r}, found {', '.join(table.schema_arrow.names)}")
            row = 0
            for group in table.iter_batches(columns=[column]):
                for value in group.column(0).to_pylist():
                    if not isinstance(value, str):
                        raise ValueError(f"{file}: row {row} of column {column!r} is {type(value).__name__}, not text")
                    yield Document(f"{name}#{row}", value.encode())
                    row += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]})") from error
