"""The running interpreter's standard library: Python code with nothing to download."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datamodules.embedded_source import SourceError
from datamodules.text_documents import Document, Split, check_utf8, split_of

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
GENERATED = "_sysconfigdata"


@dataclass(frozen=True)
class StandardLibrary:
    """Every .py that isn't a test, idlelib's, a table (encodings, pydoc_data, sysconfig's) or empty.

    Packages and modules are split whole by the sha256 of their names, a twentieth of them for testing and one for
    validation. The bytes depend on the interpreter's patch version (9,145,579 on CPython 3.11.7), so give it with every figure.
    """

    name: str = "stdlib"

    def identity(self, cache: Path | None = None) -> dict[str, str]:
        """Implementation, version and size."""
        files = _files()
        return {
            "source": self.name,
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "splits": "by package",
            "files": str(len(files)),
            "bytes": str(sum(path.stat().st_size for _, path in files)),
        }

    def documents(self, split: Split, cache: Path | None = None) -> Iterator[Document]:
        """The files of a split by path.

        Raises:
            SourceError: if this Python has no standard library in source form.
            ValueError: if a file isn't UTF-8.
        """
        for name, path in _files():
            if split_of(name.split("/")[0].removesuffix(".py")) == split:
                yield Document(name, check_utf8(path.read_bytes(), str(path)))


def _files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - LEFT_OUT
        paths += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(GENERATED)]
    files = sorted((path.relative_to(root).as_posix(), path) for path in paths if path.stat().st_size)
    if not files:
        raise SourceError(f"{root}: this Python has no standard library in source form")
    return files
