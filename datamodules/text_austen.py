"""Jane Austen's six novels, long documents: a Debian package that apt brings, read and never installed."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from datamodules.embedded_source import SourceError, cache_folder, sha256_of
from datamodules.text_documents import Document, Split
from datamodules.text_r_data import read_lazy_data

PACKAGE = "r-cran-janeaustenr"
VERSION = "1.0.0-1"
SHA256 = "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
HELD_OUT: dict[str, Split] = {"persuasion": "test", "northangerabbey": "val"}


@dataclass(frozen=True)
class Austen:
    """Six novels of 4,025,023 bytes: Persuasion for testing, Northanger Abbey for validation, the rest for training."""

    name: str = "austen"

    def identity(self, cache: Path | None = None) -> dict[str, str]:
        """The package's sha256."""
        return {"source": self.name, "sha256": SHA256, "splits": str(HELD_OUT)}

    def documents(self, split: Split, cache: Path | None = None) -> Iterator[Document]:
        """The novels of a split by name.

        Raises:
            SourceError: if the package cannot be fetched or is altered.
        """
        path = fetch_package((cache or cache_folder()) / "debs")
        files = read_package(path, ("Rdata.rdx", "Rdata.rdb"))
        novels = read_lazy_data(files["Rdata.rdx"], files["Rdata.rdb"], str(path))
        for name in sorted(novels):
            if HELD_OUT.get(name, "train") == split:
                yield Document(name, b"\n".join(novels[name]))


def fetch_package(folder: Path) -> Path:
    """Makes the Debian package present in `folder`, downloading it with apt-get where it is missing.

    Raises:
        SourceError: if there is no apt-get, the download fails or the sha256 is another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{PACKAGE}_{VERSION}_all.deb"
    with FileLock(folder / ".lock"):
        if not path.exists():
            _download(path)
    if sha256_of(path) != SHA256:
        raise SourceError(f"{path}: sha256 is not {SHA256[:12]}...; delete the file and run again")
    return path


def _download(path: Path) -> None:
    remedy = f"place {path.name} of Debian at {path} by hand and run again"
    if shutil.which("apt-get") is None:
        raise SourceError(f"no apt-get to download {PACKAGE} with; {remedy}")
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        result = subprocess.run(
            ["apt-get", "download", "-qq", f"{PACKAGE}={VERSION}"],
            cwd=temporary,
            capture_output=True,
            text=True,
            check=False,
        )
        brought = Path(temporary, path.name)
        if result.returncode != 0 or not brought.exists():
            reason = [line for line in result.stderr.splitlines() if line.startswith("E:")] or ["no message"]
            raise SourceError(f"apt-get could not download {PACKAGE} ({reason[0]}); run apt-get update, or {remedy}")
        os.replace(brought, path)


def read_package(path: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """Reads the files of a Debian package that have one of the `wanted` names in a folder `data`.

    Raises:
        SourceError: if the package is broken or lacks one of them.
    """
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_data_archive(path))) as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                if member.isfile() and parts[-2:-1] == ("data",) and parts[-1] in wanted:
                    content = archive.extractfile(member)
                    assert content is not None
                    files[parts[-1]] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SourceError(f"{path}: not a readable Debian package ({error}); delete the file and run again") from error
    lacking = set(wanted) - set(files)
    if lacking:
        raise SourceError(f"{path}: holds no {', '.join(sorted(lacking))}")
    return files


def _data_archive(path: Path) -> bytes:
    """The member data.tar.* of an ar archive: 8 bytes of magic, then headers of 60 bytes before even-sized members."""
    content, offset = path.read_bytes(), 8
    if content[:8] == b"!<arch>\n":
        while offset + 60 <= len(content):
            member, size = content[offset : offset + 16], content[offset + 48 : offset + 58].strip()
            if not size.isdigit():
                break
            end = offset + 60 + int(size)
            if member.startswith(b"data.tar"):
                return content[offset + 60 : end]
            offset = end + end % 2
    raise SourceError(f"{path}: not a Debian package; delete the file and run again")
