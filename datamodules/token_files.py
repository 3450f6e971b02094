"""Documents as token ids on disk: one memory-mapped file a split and an index, written once and published whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.embedded_source import publish_folder
from datamodules.text_documents import SPLITS, Split, TextSource
from datamodules.tokens import FILE, Encoder, Tokens, blocks, publish

FORM = 1  # raised when the files change their meaning
INDEX = "index.json"


@dataclass(frozen=True)
class TokenFile:
    """A split's documents one after another, each opened by its beginning's token.

    Attributes:
        path: the file, little-endian uint16 or uint32.
        ids: (n,) memory-mapped.
        starts: (d + 1,) int64: where each document starts, and the end.
        names: of the d documents.
        text_bytes: (d,) int64 bytes of text of each.
        size: ids are below this.
    """

    path: Path
    ids: np.ndarray
    starts: np.ndarray
    names: tuple[str, ...]
    text_bytes: np.ndarray
    size: int

    def read(self, places: np.ndarray) -> np.ndarray:
        """Ids at places of the file, int64 of any shape.

        Raises:
            ValueError: if an id is out of range; the message names file, offset and id.
        """
        ids = self.ids[places].astype(np.int64)
        if ids.size and ids.max() >= self.size:
            wrong = np.unravel_index(int(ids.argmax()), ids.shape)
            offset = int(places[wrong]) * self.ids.itemsize
            raise ValueError(
                f"{self.path}: token {ids[wrong]} at byte {offset} is out of range, there are {self.size}; "
                f"delete the folder {self.path.parent} and run again"
            )
        return ids


def token_folder(source: TextSource, tokens: Tokens, cache: Path) -> Path:
    """Where the token files of a source lie: another folder for whatever ids depend on."""
    depends = json.dumps([FORM, source.identity(cache), tokens.identity()], sort_keys=True)
    return cache / "text" / f"{source.name}-{tokens.name}-{hashlib.sha256(depends.encode()).hexdigest()[:16]}"


def write_token_files(source: TextSource, tokens: Tokens, cache: Path) -> Path:
    """Writes the token files of a source where the cache lacks them; several processes may call at once.

    Returns:
        Their folder.

    Raises:
        OSError, ValueError: as the source and the tokens say, and if no split has a document.
    """

    def fill(folder: Path) -> None:
        encoder = tokens.fit((document.text for document in source.documents("train", cache)), folder)
        index = {split: _write(source, split, encoder, folder, cache) for split in SPLITS}
        if not any(entry["names"] for entry in index.values()):
            raise ValueError(f"{source.name}: no documents ({source.identity(cache)})")
        described = {"source": source.identity(cache), "tokens": tokens.identity(), "size": encoder.size}
        (folder / INDEX).write_text(json.dumps({"form": FORM, **described, "splits": index}))

    return publish_folder(token_folder(source, tokens, cache), fill)


def learnt(folder: Path) -> str:
    """The sha256 of what the tokens of a folder of token files were learnt, "" where they learn nothing."""
    return hashlib.sha256((folder / FILE).read_bytes()).hexdigest() if (folder / FILE).exists() else ""


def keep_tokenizer(folder: Path, run: Path) -> None:
    """Copies what the tokens of a folder of token files were learnt, if they were, into the folder of a run.

    Raises:
        ValueError: if the run has another already.
    """
    if not (folder / FILE).exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    kept, content = run / FILE, (folder / FILE).read_bytes()
    if kept.exists() and kept.read_bytes() != content:
        raise ValueError(
            f"{kept}: the run's tokens aren't those of this text; set datamodule.tokens.path={kept} to go on, or delete it"
        )
    publish(content, kept)


def _write(source: TextSource, split: Split, encoder: Encoder, folder: Path, cache: Path) -> dict[str, Any]:
    kind = np.dtype("<u2" if encoder.size <= 2**16 else "<u4")
    checksum, text_checksum = hashlib.sha256(), hashlib.sha256()
    names, starts, text_bytes = [], [0], []
    with (folder / f"{split}.bin").open("wb") as file:
        for document in source.documents(split, cache):
            length = 0
            parts = chain([np.array([encoder.bos])], map(encoder.encode, blocks(document.text)))
            for part in parts:
                ids = part.astype(kind).tobytes()
                file.write(ids)
                checksum.update(ids)
                length += len(part)
            text_checksum.update(document.text)
            names.append(document.name)
            starts.append(starts[-1] + length)
            text_bytes.append(len(document.text))
    sums = {"sha256": checksum.hexdigest(), "text_sha256": text_checksum.hexdigest()}
    return {"dtype": kind.str, "names": names, "starts": starts, "bytes": text_bytes, **sums}


def open_token_files(folder: Path) -> dict[Split, TokenFile]:
    """Opens the files that `write_token_files` wrote.

    Raises:
        OSError: if a file is missing.
        ValueError: if the index is broken or a file hasn't the length that it says.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text("utf-8"))
        if index["form"] != FORM:
            raise ValueError(f"form {index['form']}, expected {FORM}")
        return {split: _open(folder / f"{split}.bin", index["splits"][split], index["size"]) for split in SPLITS}
    except (KeyError, TypeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: {reason}; delete the folder and run again") from error


def _open(path: Path, entry: Mapping[str, Any], size: int) -> TokenFile:
    names, starts, text_bytes = (
        _list_of(str, entry, "names"),
        _list_of(int, entry, "starts"),
        _list_of(int, entry, "bytes"),
    )
    if not isinstance(size, int):
        raise ValueError(f"size is {size!r}, expected a whole number")
    if (len(starts), len(text_bytes)) != (len(names) + 1, len(names)) or starts[0] != 0:
        raise ValueError(f"{len(starts)} starts and {len(text_bytes)} bytes of {path.name} for {len(names)} documents")
    if any(end <= start for start, end in pairwise(starts)):  # each has its beginning's token
        raise ValueError(f"the starts of {path.name} don't ascend")
    if entry["dtype"] not in ("<u2", "<u4"):
        raise ValueError(f"dtype {entry['dtype']!r} of {path.name}, expected '<u2' or '<u4'")
    kind = np.dtype(entry["dtype"])
    expected, found = starts[-1] * kind.itemsize, path.stat().st_size
    if found != expected:
        raise ValueError(f"{path.name} has {found} bytes, expected {expected}")
    ids = np.memmap(path, kind, mode="r") if found else np.zeros(0, kind)  # an empty file cannot be mapped
    return TokenFile(path, ids, np.array(starts, np.int64), tuple(names), np.array(text_bytes, np.int64), size)


def _list_of(kind: type, entry: Mapping[str, Any], key: str) -> list[Any]:
    found = entry[key]
    if not isinstance(found, list) or not all(type(item) is kind for item in found):
        raise ValueError(f"{key} is not a list of {kind.__name__}")
    return found
