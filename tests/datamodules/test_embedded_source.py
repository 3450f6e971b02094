"""What happens when a source is missing, altered or broken, without any network."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from datamodules.embedded_source import (
    SourceError,
    Wheel,
    extract,
    fetch,
    find_wheel,
    publish_folder,
    read_wheel_list,
)


def make_wheel(folder: Path) -> Wheel:
    path = folder / "some_font-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_font/files/a.ttf", b"outline")
        archive.writestr("some_font/__init__.py", b"raise RuntimeError")
    return Wheel("some-font", "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_wheel_placed_by_hand_is_used_without_pip(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    assert fetch([wheel], tmp_path) == [tmp_path / "some_font-1.0-py3-none-any.whl"]


def test_an_altered_wheel_is_refused_by_name(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    with (tmp_path / "some_font-1.0-py3-none-any.whl").open("ab") as file:
        file.write(b"x")
    with pytest.raises(SourceError, match=r"some_font-1\.0.*sha256.*delete"):
        fetch([wheel], tmp_path)


def test_a_failed_download_says_where_to_place_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourceError, match="some_font") as caught:
        fetch([Wheel("some-font", "1.0", "0" * 64)], tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_extract_takes_only_what_is_wanted(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    path = find_wheel(wheel, tmp_path)
    assert path is not None
    files = extract(path, lambda member: member.endswith(".ttf"), tmp_path / "fonts")
    assert [file.name for file in files] == ["a.ttf"]
    assert files[0].read_bytes() == b"outline"
    with pytest.raises(SourceError, match="none of the wanted"):
        extract(path, lambda member: member.endswith(".png"), tmp_path / "fonts")


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    final = tmp_path / "sources"
    with pytest.raises(OSError, match="disk full"):
        publish_folder(final, fail)
    assert not final.exists()
    publish_folder(final, lambda folder: (folder / "whole").touch())
    (tmp_path / "plain").mkdir()
    assert final.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as the umask has it
    publish_folder(final, fail)
    assert [path.name for path in final.iterdir()] == ["whole"]


def test_a_malformed_wheel_list_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "wheels.txt"
    path.write_text("some-font>=1.0\n")
    with pytest.raises(ValueError, match=r"some-font>=1\.0"):
        read_wheel_list(path)
