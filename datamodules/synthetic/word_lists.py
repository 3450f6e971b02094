"""English words by part of speech: the lists of the wonderwords wheel (MIT), read from the wheel and never installed."""

from __future__ import annotations

import zipfile
from functools import cache
from typing import Literal

from datamodules.embedded_source import SourceError, Wheel, cache_folder, fetch

WHEEL = Wheel("wonderwords", "3.0.1", "4dd66deb6a76ca9e0b0422d1d3e111f9b910d7c16922d42de733ee8def98f8d0")


@cache
def word_list(part: Literal["adjective", "noun", "verb"]) -> tuple[str, ...]:
    """Returns the words of one part of speech, of the letters a to z alone, sorted; downloaded once.

    Raises:
        SourceError: if the wheel cannot be had or is altered.
    """
    (path,) = fetch((WHEEL,), cache_folder() / "wheels")
    member = f"wonderwords/assets/{part}list.txt"
    try:
        with zipfile.ZipFile(path) as archive:
            lines = archive.read(member).decode().splitlines()
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceError(f"{path}: no {member} in it ({error}); delete the file and run again") from error
    return tuple(sorted({line for line in lines if line.isascii() and line.isalpha() and line.islower()}))
