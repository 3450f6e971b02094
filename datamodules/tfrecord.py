"""TFRecord files without TensorFlow: each record is its length, a CRC of the length, the data and a CRC of the data.

Numbers are little-endian, the CRC is crc32c masked (rotated right by 15 and shifted by a constant), files are uncompressed.
Both CRCs are checked whenever a record is touched.
"""

from __future__ import annotations

import mmap
import os
import struct
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from datamodules.waymo_extra import google_crc32c

_HEAD, _TAIL = 12, 4  # bytes before and after the data
_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")


class RecordError(ValueError):
    """A record that can't be read. The message names the file and the offset of the record.

    Attributes:
        path: of the file.
        offset: bytes before the record.
        reason: what is wrong, without file and offset.
        next: offset of the record behind, or None where the damage hides it.
    """

    def __init__(self, path: Path, offset: int, reason: str, next_offset: int | None = None) -> None:
        super().__init__(path, offset, reason, next_offset)
        self.path, self.offset, self.reason, self.next = path, offset, reason, next_offset

    def __str__(self) -> str:
        return f"{self.path}: record at byte {self.offset}: {self.reason}"


def masked_crc(data: bytes | np.ndarray) -> int:
    """crc32c of the bytes as TFRecord stores it: rotr(crc, 15) + 0xa282ead8 modulo 2³²."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class TFRecordFile(Sequence[bytes]):
    """The records of one file by number. The lengths are scanned once, at the first use that needs a number.

    Reading is by memory map, so a record costs one pass for the CRC and one copy. Pickles as its path; a file that is
    replaced while it is open keeps showing its old content.

    Args:
        path: of the file.

    Raises:
        OSError: the file can't be opened.
        RecordError: at reading, naming file and offset: not a TFRecord, a flipped byte in length or data, a cut-off end.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            # an empty file can't be mapped; it holds no record
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        self._bytes = np.frombuffer(mapped, np.uint8)  # keeps the map open
        self._offsets: list[int] | None = None

    def __reduce__(self) -> tuple[type[TFRecordFile], tuple[Path]]:
        return TFRecordFile, (self.path,)

    def span(self, offset: int) -> tuple[int, int]:
        """(start, end) of the data of the record at a byte offset; the CRC of its length is checked, that of data isn't."""
        head = self._bytes[offset : offset + _HEAD].tobytes()
        if len(head) < _HEAD:
            raise RecordError(
                self.path, offset, f"the file ends {_HEAD - len(head)} bytes into its head; fetch it again"
            )
        if masked_crc(head[:8]) != _CRC.unpack(head[8:])[0]:
            if offset == 0:
                zipped = head[:2] == b"\x1f\x8b"
                raise RecordError(self.path, 0, "gzip, decompress it first" if zipped else "not a TFRecord file")
            raise RecordError(
                self.path, offset, "its length fails its CRC, so all that follows is lost; fetch the file again"
            )
        length = _LENGTH.unpack(head[:8])[0]
        start, left = offset + _HEAD, self.size - offset - _HEAD - _TAIL
        if length > left:
            raise RecordError(
                self.path, offset, f"{length} bytes long with {max(left, 0)} left: the file is cut off; fetch it again"
            )
        return start, start + length

    def view(self, offset: int) -> np.ndarray:
        """(length,) uint8 data of the record at a byte offset, a view of the file whose CRC was checked."""
        start, end = self.span(offset)
        data = self._bytes[start:end]
        if masked_crc(data) != _CRC.unpack(self._bytes[end : end + _TAIL].tobytes())[0]:
            raise RecordError(
                self.path, offset, f"its {end - start} bytes fail their CRC; fetch the file again", end + _TAIL
            )
        return data

    def views(self) -> Iterator[tuple[int, np.ndarray]]:
        """(offset, `view`) of each record in turn."""
        offset = 0
        while offset < self.size:
            data = self.view(offset)
            yield offset, data
            offset += _HEAD + len(data) + _TAIL

    def salvage(self) -> Iterator[tuple[int, bytes] | RecordError]:
        """(offset, data) of each sound record and the error of each other; behind a damaged length nothing is found."""
        offset: int | None = 0
        while offset is not None and offset < self.size:
            try:
                data = self.view(offset).tobytes()
            except RecordError as error:
                yield error
                offset = error.next
            else:
                yield offset, data
                offset += _HEAD + len(data) + _TAIL

    @property
    def offsets(self) -> list[int]:
        """Byte offset of each record."""
        if self._offsets is None:
            found, offset = [], 0
            while offset < self.size:
                found.append(offset)
                offset = self.span(offset)[1] + _TAIL
            self._offsets = found
        return self._offsets

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override] # no slices
        return self.view(self.offsets[index]).tobytes()

    def __iter__(self) -> Iterator[bytes]:
        for _, data in self.views():
            yield data.tobytes()


def write_tfrecord(path: Path | str, records: Iterable[bytes]) -> None:
    """Write the records to one file, which appears once it is whole."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            for data in records:
                length = _LENGTH.pack(len(data))
                file.write(length + _CRC.pack(masked_crc(length)))
                file.write(data)
                file.write(_CRC.pack(masked_crc(data)))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
