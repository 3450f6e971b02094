"""Reads the data of an R package without R: objects in R's serialisation (version 2 or 3, big-endian), lazily loaded."""

from __future__ import annotations

import gzip
import struct
import zlib
from typing import Any

# what bytes that are no such data lead to; ValueError: text that isn't UTF-8, names without values
_MALFORMED = (
    struct.error,
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    RecursionError,
    OverflowError,
    MemoryError,
)


def read_lazy_data(index: bytes, data: bytes, name: str) -> dict[str, Any]:
    """Reads every object of a lazy-load database.

    Args:
        index: content of `Rdata.rdx`.
        data: content of `Rdata.rdb`: a 4-byte length and a zlib stream for each object.
        name: of the file, for messages.

    Returns:
        Vectors as lists, lists with names as dicts, by the name of the object.

    Raises:
        ValueError: if the bytes are no such database, or hold objects other than vectors and lists of them.
    """
    try:
        variables = read_serialised(gzip.decompress(index), name)["variables"]
        objects = {}
        for key, (offset, length) in variables.items():
            (size,) = struct.unpack_from(">I", data, offset)
            content = zlib.decompress(data[offset + 4 : offset + length])
            if len(content) != size:
                raise _RefusedError(f"{name}: object {key} has {len(content)} bytes, its header says {size}")
            objects[key] = read_serialised(content, name)
        return objects
    except _RefusedError:
        raise
    except (OSError, EOFError, zlib.error, *_MALFORMED) as error:
        raise ValueError(f"{name}: not a lazy-load database of R ({error})") from error


def read_serialised(content: bytes, name: str) -> Any:
    """Reads one object.

    Raises:
        ValueError: if it isn't one, or is of a type that is not known here.
    """
    if content[:2] != b"X\n":
        raise _RefusedError(f"{name}: not an object in R's binary serialisation")
    try:
        return _Reader(content, name).whole()
    except _RefusedError:
        raise
    except _MALFORMED as error:
        raise _RefusedError(f"{name}: the object breaks off or is malformed ({error})") from error


class _RefusedError(ValueError):
    """What this reader found itself; its message names the file."""


class _Reader:
    def __init__(self, content: bytes, name: str) -> None:
        self.content = content
        self.name = name
        self.offset = 2
        self.symbols: list[str] = []

    def whole(self) -> Any:
        version, _, _ = self.numbers("i", 3)
        if version not in (2, 3):
            raise _RefusedError(f"{self.name}: serialisation version {version}, expected 2 or 3")
        if version == 3:
            self.take(self.length())  # the encoding that the writer's machine used
        return self.item()

    def take(self, count: int) -> bytes:
        part = self.content[self.offset : self.offset + count]
        if count < 0 or len(part) != count:
            raise _RefusedError(f"{self.name}: the object breaks off at byte {len(self.content)}")
        self.offset += count
        return part

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        form = f">{count}{code}"
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def length(self) -> int:
        return int(self.numbers("i", 1)[0])

    def item(self) -> Any:
        (flags,) = self.numbers("I", 1)
        kind, attributed = flags & 0xFF, bool(flags & 0x200)
        match kind:
            case 254:  # NULL
                return None
            case 255:  # a symbol met before
                return self.symbols[(flags >> 8) - 1]
            case 1:
                self.symbols.append(self.item().decode())
                return self.symbols[-1]
            case 2:  # a pairlist: (attributes), tag, value, rest
                return self.pairs(flags)
            case 9:  # a string's bytes; length −1 is NA
                count = self.length()
                return None if count == -1 else self.take(count)
            case 10 | 13:
                vector: list[Any] = list(self.numbers("i", self.length()))
            case 14:
                vector = list(self.numbers("d", self.length()))
            case 16 | 19:
                vector = [self.item() for _ in range(self.length())]
            case _:
                raise _RefusedError(
                    f"{self.name}: an R object of type {kind} at byte {self.offset - 4}, expected vectors"
                )
        names = self.item().get("names") if attributed else None
        return vector if names is None else dict(zip([key.decode() for key in names], vector, strict=True))

    def pairs(self, flags: int) -> dict[str, Any]:
        found = {}
        while flags & 0xFF == 2:
            if flags & 0x200:
                self.item()
            tag = self.item() if flags & 0x400 else ""
            found[tag] = self.item()
            (flags,) = self.numbers("I", 1)
        return found
