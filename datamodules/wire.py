"""The wire format of protocol buffers for numpy: variable-length integers, and messages of one layout viewed together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, end) of the variable-length integer at a byte.

    Raises:
        IndexError: the data ends within it, or it is longer than ten bytes.
    """
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise IndexError("an integer is longer than ten bytes")


def varints(data: np.ndarray) -> np.ndarray:
    """(n,) int64 of the variable-length integers that fill `data` (bytes,) uint8; negative numbers take ten bytes.

    Raises:
        ValueError: the last one is cut off, or one is longer than ten bytes.
    """
    last = data < 0x80
    if last.all():
        return data.astype(np.int64)
    if not last[-1]:
        raise ValueError("a list of integers is cut off")
    ends = last.nonzero()[0] + 1
    starts = np.concatenate(([0], ends[:-1]))
    lengths = ends - starts
    if lengths.max() > 10:
        raise ValueError("an integer is longer than ten bytes")
    values = np.zeros(len(ends), np.uint64)
    for place in range(int(lengths.max())):  # the place-th byte of each that has one
        longer = (lengths > place).nonzero()[0]
        values[longer] |= (data[starts[longer] + place].astype(np.uint64) & np.uint64(0x7F)) << np.uint64(7 * place)
    return values.view(np.int64)


def gather(data: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """(n, length) uint8: the bytes of `data` (bytes,) uint8 from each start (n,) on, which may overlap."""
    items: np.ndarray = np.ndarray((len(data) - length + 1,), f"V{length}", data, strides=(1,))  # one at every byte
    return items[starts].view(np.uint8).reshape(len(starts), length)


def by_length(messages: list[bytes]) -> Iterator[tuple[np.ndarray | slice, np.ndarray]]:
    """Messages of one length together: their indices (n,) and their bytes (n, length) uint8. Empty ones are left out."""
    data = np.frombuffer(b"".join(messages), np.uint8)
    kinds = set(map(len, messages)) - {0}
    if len(kinds) == 1 and len(data) == len(messages) * max(kinds):
        yield slice(None), data.reshape(len(messages), -1)
        return
    lengths = np.array(list(map(len, messages)), np.int64)
    starts = np.cumsum(lengths) - lengths
    for length in sorted(kinds):
        chosen = (lengths == length).nonzero()[0]
        yield chosen, gather(data, starts[chosen], length)


def numbers(records: np.ndarray, at: int, dtype: str) -> np.ndarray:
    """(n,) numbers that begin at one byte of records (n, bytes) uint8: a view."""
    return records[:, at : at + int(dtype[-1])].view(dtype)[:, 0]
