"""Scenes in shards, `NAME.scenes`: the arrays of each as they lie in memory with a CRC, an index at the end, read by number.

A shard is `MAGIC`, the scenes, the index (JSON), and a footer that says where the index begins and what its CRC is. A scene is
a head of counts, its id and its arrays, each from a multiple of eight bytes on. Numbers are little-endian.
`python -m tools.waymo_to_shards` makes shards of Waymo's files; its manifest.json, if there, tells `SceneShards` which belong
together.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.scene import Scene
from datamodules.waymo_extra import google_crc32c

MAGIC = b"scenes\x00\x01"
SUFFIX = ".scenes"
MANIFEST = "manifest.json"
_FOOTER = struct.Struct("<QQI4x8s")  # begin and length of the index, its CRC, MAGIC
_HEAD = struct.Struct("<4q8q")  # bytes, bytes of the id, current, sdc; a, t, k, i, m, p, l, 0
_ALIGNED = 8
_LAYOUT: dict[str, tuple[torch.dtype, str]] = {
    "origin": (torch.float64, "3"),
    "times": (torch.float64, "t"),
    "agent_ids": (torch.int64, "a"),
    "agent_types": (torch.int64, "a"),
    "positions": (torch.float32, "at3"),
    "sizes": (torch.float32, "at3"),
    "headings": (torch.float32, "at"),
    "velocities": (torch.float32, "at2"),
    "valid": (torch.bool, "at"),
    "to_predict": (torch.int64, "k"),
    "difficulties": (torch.int64, "k"),
    "of_interest": (torch.int64, "i"),
    "feature_ids": (torch.int64, "m"),
    "feature_types": (torch.int64, "m"),
    "feature_starts": (torch.int64, "M"),
    "points": (torch.float32, "p3"),
    "light_lanes": (torch.int64, "l"),
    "light_states": (torch.int64, "tl"),
    "light_stops": (torch.float32, "tl3"),
    "light_valid": (torch.bool, "tl"),
}
"""Field of `Scene` → dtype and shape, a letter or digit an axis; M is m + 1."""


class ShardError(ValueError):
    """A shard that can't be read; the message names the file and, where it is one, the scene."""


class Place(NamedTuple):
    """Where a scene lies in its shard."""

    scenario_id: str
    offset: int
    length: int
    crc: int


def pack(scene: Scene) -> bytes:
    """A scene as bytes.

    Raises:
        ValueError: a field of another dtype or shape than `Scene` says, naming scene and field.
    """
    counts = {"a": scene.agents, "t": scene.steps, "k": len(scene.to_predict), "i": len(scene.of_interest)}
    counts |= {"m": len(scene.feature_ids), "p": len(scene.points), "l": len(scene.light_lanes)}
    name = scene.scenario_id.encode()
    parts = [_padded(name)]
    for field, (dtype, axes) in _LAYOUT.items():
        value, shape = getattr(scene, field), _shape(axes, counts)
        if value.dtype != dtype or tuple(value.shape) != shape:
            raise ValueError(
                f"scenario {scene.scenario_id}: {field} is {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}"
            )
        parts.append(_padded(value.contiguous().numpy().tobytes()))
    body = b"".join(parts)
    sizes = _HEAD.size + len(body), len(name), scene.current, scene.sdc
    return _HEAD.pack(*sizes, *counts.values(), 0) + body


def unpack(data: np.ndarray) -> Scene:
    """The scene of bytes (n,) uint8, whose memory it shares.

    Raises:
        ValueError: the bytes are no scene.
    """
    if len(data) < _HEAD.size:
        raise ValueError(f"{len(data)} bytes are no scene")
    length, named, current, sdc, *numbers = _HEAD.unpack_from(data.data)
    if length != len(data) or min(named, *numbers) < 0:
        raise ValueError(f"{len(data)} bytes are no scene of {length}")
    counts = dict(zip("atkimpl", numbers, strict=False))
    at = _HEAD.size
    name = data[at : at + named].tobytes().decode()
    at += _aligned(named)
    fields: dict[str, Any] = {"scenario_id": name, "current": current, "sdc": sdc}
    for field, (dtype, axes) in _LAYOUT.items():
        shape = _shape(axes, counts)
        count = 1
        for side in shape:
            count *= side
        size = count * dtype.itemsize
        if at + size > length:
            raise ValueError(f"{field} reaches beyond the scene")
        if count:
            fields[field] = torch.frombuffer(data, dtype=dtype, count=count, offset=at).view(shape)
        else:
            fields[field] = torch.empty(shape, dtype=dtype)  # frombuffer refuses nothing
        at += _aligned(size)
    return Scene(**fields)


def _shape(axes: str, counts: dict[str, int]) -> tuple[int, ...]:
    return tuple(counts["m"] + 1 if axis == "M" else int(axis) if axis.isdigit() else counts[axis] for axis in axes)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _padded(data: bytes) -> bytes:
    return data.ljust(_aligned(len(data)), b"\0")


class ShardWriter:
    """Writes one shard, which appears when the `with` block ends without an error.

    Args:
        path: of the shard, with the suffix `SUFFIX`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if self.path.suffix != SUFFIX:
            raise ValueError(f"{self.path}: a shard is called NAME{SUFFIX}")
        self.about: dict[str, Any] = {}
        """What the index says besides; whatever JSON can hold."""
        self._places: list[Place] = []
        self._partial = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.partial")

    def __enter__(self) -> ShardWriter:
        self._file = self._partial.open("wb")
        self._file.write(MAGIC)
        return self

    def add(self, scene: Scene) -> None:
        data = pack(scene)
        self._places.append(Place(scene.scenario_id, self._file.tell(), len(data), google_crc32c.value(data)))
        self._file.write(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                index = json.dumps({"scenes": self._places, "about": self.about}).encode()
                begin = self._file.tell()
                self._file.write(index + _FOOTER.pack(begin, len(index), google_crc32c.value(index), MAGIC))
            self._file.close()
            if kind is None:
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)
            self._file.close()  # where writing failed


def read_index(path: Path) -> tuple[list[Place], dict[str, Any]]:
    """The scenes of a shard and what its writer said `about` it.

    Raises:
        ShardError: not a shard, or cut off, or its index is damaged.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(len(MAGIC))
        file.seek(max(size - _FOOTER.size, 0))
        footer = file.read()
        if magic != MAGIC or len(footer) != _FOOTER.size:
            raise ShardError(f"{path} is not a shard of scenes of this version; convert its source again")
        begin, length, crc, end = _FOOTER.unpack(footer)
        if end != MAGIC or begin + length + _FOOTER.size != size:
            raise ShardError(f"{path} is cut off; convert its source again")
        file.seek(begin)
        index = file.read(length)
    if google_crc32c.value(index) != crc:
        raise ShardError(f"{path}: its index fails its CRC; convert its source again")
    content = json.loads(index)
    return [Place(*place) for place in content["scenes"]], content["about"]


def read_place(path: Path, place: Place) -> Scene:
    """One scene of a shard; its CRC is checked.

    Raises:
        ShardError: the scene is damaged.
    """
    data = np.empty(place.length, np.uint8)
    with path.open("rb", buffering=0) as file:
        count = os.preadv(file.fileno(), [data.data], place.offset)
    if count != place.length or google_crc32c.value(data) != place.crc:
        raise ShardError(
            f"{path}: scene {place.scenario_id} at byte {place.offset} is damaged; convert its source again"
        )
    try:
        return unpack(data)
    except ValueError as error:
        raise ShardError(f"{path}: scene {place.scenario_id} at byte {place.offset}: {error}") from error


class SceneShards(Dataset[Scene]):
    """The scenes of all shards of a folder by number, in the order of the shards' names. Holds no open file; pickles.

    Args:
        folder: holds the shards; a manifest.json in it must agree with them.

    Raises:
        FileNotFoundError: no shard, or one of the manifest is gone.
        ShardError: a shard or the manifest is damaged, or a conversion isn't finished.
    """

    def __init__(self, folder: Path | str) -> None:
        if sys.byteorder != "little":
            raise OSError("shards of scenes hold little-endian numbers; this machine is big-endian")
        self.folder = Path(folder)
        self.shards = sorted(self.folder.glob(f"*{SUFFIX}"))
        if not self.shards:
            raise FileNotFoundError(
                f"{self.folder} holds no *{SUFFIX}; make shards with python -m tools.waymo_to_shards"
            )
        self._check_manifest()
        self._places = [(shard, place) for shard in self.shards for place in read_index(shard)[0]]
        self._numbers: dict[str, int] = {}

    def _check_manifest(self) -> None:
        path = self.folder / MANIFEST
        if not path.is_file():
            return
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            complete, listed = manifest["complete"], {shard["name"] for shard in manifest["shards"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{path} is no manifest of shards ({error!r}); convert again, or remove it") from error
        if not complete:
            raise ShardError(f"{self.folder}: the conversion isn't finished; run it again, it goes on where it stopped")
        found = {shard.name for shard in self.shards}
        if missing := sorted(listed - found):
            raise FileNotFoundError(f"{self.folder / missing[0]} is missing; convert again, the other shards are kept")
        if extra := sorted(found - listed):
            raise ShardError(f"{self.folder / extra[0]} isn't in {path}; move it elsewhere")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Scene:
        return read_place(*self._places[index])

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(len(self)))

    def scenario_id(self, index: int) -> str:
        """Without reading the scene."""
        return self._places[index][1].scenario_id

    def find(self, scenario_id: str) -> int:
        """The number of the (first) scene of that id.

        Raises:
            KeyError: there is none.
        """
        if not self._numbers:
            for index in reversed(range(len(self))):
                self._numbers[self.scenario_id(index)] = index
        if scenario_id not in self._numbers:
            raise KeyError(f"{self.folder} holds no scenario {scenario_id!r}")
        return self._numbers[scenario_id]
