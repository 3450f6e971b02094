"""Images in WebDataset shards, `<split>/*.tar` with members KEY.jpg and KEY.cls, read by index.

A shard is an uncompressed tar, so an index of where each image begins turns shards into a dataset with random access:
one read an image and no file to open by the million, while shuffling, repeats and the split over ranks and workers stay
those of the samplers, exact and the same as for folders. `python -m datamodules.image_shards FOLDER` writes the index.
"""

from __future__ import annotations

import os
import re
import sys
import tarfile
import uuid
from pathlib import Path

import numpy as np

INDEX_NAME = "index.npz"
CLASSES_NAME = "classes.txt"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def write_index(folder: Path) -> Path:
    """Read the headers of every shard of a split and write `index.npz` beside them (some minutes for ImageNet).

    Members are grouped as WebDataset does: the key is the path up to the first dot of its last part. Each key needs one
    image and one `.cls` with the class as a decimal number; further members such as `.json` are passed over.

    Raises:
        FileNotFoundError: no shard, or a gap in the shards' numbers.
        ValueError: a damaged shard, an image without a class, or a class that isn't a number.
    """
    shards = sorted(folder.glob("*.tar"))
    _check_numbers(folder, shards)
    rows: list[tuple[int, int, int, int, bytes]] = []  # shard, offset, length, class, key
    for number, shard in enumerate(shards):
        try:
            rows += [(number, *row) for row in _read_headers(shard)]
        except tarfile.ReadError as error:
            raise ValueError(f"path: shard {shard} is damaged ({error}); fetch it again") from error
    shard_numbers, offsets, lengths, labels, keys = zip(*rows, strict=True) if rows else ((),) * 5
    index = folder / INDEX_NAME
    partial = folder / f"{INDEX_NAME}.{uuid.uuid4().hex}.partial"
    try:
        with partial.open("wb") as file:
            np.savez(
                file,
                shards=np.array([shard.name for shard in shards]),
                sizes=np.array([shard.stat().st_size for shard in shards], dtype=np.int64),
                shard=np.array(shard_numbers, dtype=np.int64),
                offset=np.array(offsets, dtype=np.int64),
                length=np.array(lengths, dtype=np.int64),
                label=np.array(labels, dtype=np.int64),
                key=np.array(keys, dtype=np.bytes_),
            )
    except PermissionError as error:
        raise PermissionError(
            f"path: cannot write {index}; run `python -m datamodules.image_shards {folder}` with the right to, "
            "or link the shards into a folder of your own"
        ) from error
    partial.replace(index)  # at once: nodes that share the folder may write it together
    return index


class ShardImages:
    """An `ImageSource` over the shards of one split.

    Args:
        folder: holds the shards and `index.npz`. Class names come from `classes.txt` in the folder above, one a line in
            label order; without that file a class is named by its number.

    Raises:
        FileNotFoundError: no index, or a shard of the index is gone.
        ValueError: shards that changed since they were indexed, or classes outside `classes.txt`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX_NAME
        if not index.is_file():
            raise FileNotFoundError(
                f"path: the shards in {folder} have no {INDEX_NAME}; run `python -m datamodules.image_shards {folder}`"
            )
        with np.load(index, allow_pickle=False) as arrays:
            self._shards: list[str] = arrays["shards"].tolist()
            sizes: list[int] = arrays["sizes"].tolist()
            self._shard, self._offset, self._length = arrays["shard"], arrays["offset"], arrays["length"]
            self._key, self.labels = arrays["key"], arrays["label"]
        self._check_shards(dict(zip(self._shards, sizes, strict=True)))
        self.class_names = self._read_class_names()

    def name(self, index: int) -> str:
        return f"{self.folder / self._shards[self._shard[index]]}:{os.fsdecode(self._key[index])}"

    def read(self, index: int) -> bytes:
        with (self.folder / self._shards[self._shard[index]]).open("rb") as file:
            file.seek(int(self._offset[index]))
            return file.read(int(self._length[index]))

    def _check_shards(self, indexed: dict[str, int]) -> None:
        found = {shard.name: shard.stat().st_size for shard in self.folder.glob("*.tar")}
        remedy = f"restore it, or delete {self.folder / INDEX_NAME} to index the shards that are there"
        for name in sorted(indexed.keys() - found.keys()):
            raise FileNotFoundError(f"path: shard {self.folder / name} is missing; {remedy}")
        for name in sorted(found):
            if indexed.get(name) != found[name]:
                raise ValueError(f"path: shard {self.folder / name} is new or changed since it was indexed; {remedy}")

    def _read_class_names(self) -> list[str]:
        classes = int(self.labels.max(initial=-1)) + 1
        file = self.folder.parent / CLASSES_NAME
        if not file.is_file():
            return [str(label) for label in range(classes)]
        names = file.read_text(encoding="utf-8").split("\n")
        names = [name.strip() for name in names if name.strip()]
        if classes > len(names):
            raise ValueError(
                f"path: {self.folder} has class {classes - 1}, {file} names {len(names)}; add a line a class"
            )
        return names


def _check_numbers(folder: Path, shards: list[Path]) -> None:
    """Raise on a gap in `…-000123.tar`, the trace of a download that lost a shard."""
    if not shards:
        raise FileNotFoundError(f"path: no .tar shard in {folder}; put the split's shards there")
    matches = [re.search(r"(\d+)\.tar$", shard.name) for shard in shards]
    numbers = {int(match[1]) for match in matches if match}
    if len(numbers) < len(shards):
        return  # not numbered one by one, as in …-000123-of-001024.tar
    missing = sorted(set(range(min(numbers), max(numbers))) - numbers)
    if missing:
        raise FileNotFoundError(
            f"path: {folder} has shards {min(numbers)} to {max(numbers)}, but not {missing[0]}; fetch it, or renumber them"
        )


def _read_headers(shard: Path) -> list[tuple[int, int, int, bytes]]:
    """(offset, length, class, key) of each image of a shard, in its order."""
    images: dict[str, tuple[int, int]] = {}
    classes: dict[str, int] = {}
    with tarfile.open(shard, "r:") as archive:
        for member in archive:
            folder, _, last = member.name.rpartition("/")
            stem, _, extension = last.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if not member.isfile():
                continue
            if extension.lower() in IMAGE_EXTENSIONS:
                images[key] = member.offset_data, member.size
            elif extension == "cls":
                content = archive.extractfile(member)
                text = content.read() if content else b""
                if not text.strip().isdigit():
                    raise ValueError(f"path: {shard}:{key}.cls holds {text[:20]!r}, not a class number; repack it")
                classes[key] = int(text)
    for key in images.keys() ^ classes.keys():
        raise ValueError(f"path: {shard}:{key} has no {'class (.cls)' if key in images else 'image'}; repack the shard")
    return [(*place, classes[key], os.fsencode(key)) for key, place in images.items()]


if __name__ == "__main__":
    for split in sys.argv[1:]:
        print(write_index(Path(split)))
