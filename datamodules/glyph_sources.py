"""The fonts and photographs of the glyph set, and which of them each split may use.

A family of fonts, and a photograph, belongs to one split only: no shape seen in training is met again in a test.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from datamodules.embedded_source import SourceError, cache_folder, extract, fetch, publish_folder, read_wheel_list

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
WHEEL_LIST = Path(__file__).with_name("glyph_wheels.txt")

FAMILIES: dict[Split, tuple[str, ...]] = {
    "train": (
        "abril-fatface", "alegreya-sans", "archivo-narrow", "arvo", "bebas-neue", "bitter", "bungee", "cabin", "caveat",
        "changa-one", "cinzel", "comfortaa", "crimson-text", "dosis", "exo-2", "fjalla-one", "indie-flower",
        "inconsolata", "josefin-sans", "lobster-two", "montserrat", "permanent-marker", "playfair-display", "quicksand",
        "roboto-slab", "righteous", "space-mono",
    ),
    "val": ("signika", "lora", "teko", "kalam", "varela-round", "alfa-slab-one"),
    "test": ("open-sans", "pt-serif", "anton", "shadows-into-light", "nunito", "zilla-slab", "libre-baskerville", "oswald"),
}  # fmt: skip

PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": ("coffee.png", "chelsea.png", "camera.png", "brick.png", "hubble_deep_field.jpg", "ihc.png"),
    "val": ("rocket.jpg", "gravel.png"),
    "test": ("astronaut.png", "grass.png", "retina.jpg"),
}


@dataclass(frozen=True)
class Sources:
    """Where the files of one split lie.

    Attributes:
        fonts: font files by family, in a fixed order.
        photographs: photograph files, in a fixed order.
    """

    fonts: dict[str, tuple[Path, ...]]
    photographs: tuple[Path, ...]


def sources_digest() -> str:
    """Returns the sha256 of the list of wheels, which itself pins the sha256 of every wheel."""
    return hashlib.sha256(WHEEL_LIST.read_bytes()).hexdigest()


@cache
def prepare_sources(cache: Path | None = None) -> Path:
    """Downloads and unpacks the fonts and photographs once.

    Args:
        cache: the cache folder; ``cache_folder()`` where left out.

    Returns:
        A folder with ``fonts/<family>/*.ttf`` and ``photographs/*``.

    Raises:
        SourceError: if a wheel cannot be had or is altered.
    """
    root = cache or cache_folder()
    unpacked = root / "glyphs" / f"sources-{sources_digest()[:12]}"
    if unpacked.exists():
        return unpacked
    wheels = read_wheel_list(WHEEL_LIST)
    paths = fetch(wheels, root / "wheels")
    photographs = {name for names in PHOTOGRAPHS.values() for name in names}

    def fill(folder: Path) -> None:
        for wheel, path in zip(wheels, paths, strict=True):
            if wheel.name.startswith("fontpkg-"):
                family = folder / "fonts" / wheel.name.removeprefix("fontpkg-")
                extract(path, lambda member: member.endswith((".ttf", "/LICENSE")), family)
            else:
                extract(path, lambda member: Path(member).name in photographs, folder / "photographs")

    return publish_folder(unpacked, fill)


def split_sources(folder: Path, split: Split) -> Sources:
    """Lists the files of one split in the folder that ``prepare_sources`` made.

    Raises:
        SourceError: if a family or a photograph is missing.
    """
    fonts = {family: tuple(sorted((folder / "fonts" / family).glob("*.ttf"))) for family in FAMILIES[split]}
    photographs = tuple(folder / "photographs" / name for name in PHOTOGRAPHS[split])
    missing = [name for name, files in fonts.items() if not files]
    missing += [path.name for path in photographs if not path.exists()]
    if missing:
        raise SourceError(f"{folder}: {missing[0]} is missing; delete that folder and run again")
    return Sources(fonts, photographs)
