"""Bytes of many files at once: positional reads and writes that several threads may share."""

import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from mergejax.errors import MergeError

CHUNK = 2**23  # elements that have one digest
_ALIGNMENT = 64  # bytes; XLA reads such arrays without copying them first

# A float is not finite where all of these bits are set.
_EXPONENTS = {
    np.dtype(np.float64): 0x7FF0000000000000,
    np.dtype(np.float32): 0x7F800000,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.float8_e5m2): 0x7C,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
    np.dtype(ml_dtypes.float8_e8m0fnu): 0xFF,
}


class Files:
    """Open files by path, read or written at any place by any thread."""

    def __init__(self, flags: int = os.O_RDONLY):
        self._flags = flags | getattr(os, "O_BINARY", 0)
        self._open: dict[pathlib.Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _descriptor(self, path: pathlib.Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, self._flags, 0o644)
            return self._open[path]

    def read_into(self, path: pathlib.Path, offset: int, target: memoryview) -> None:
        """Fills a buffer from one place of a file."""
        done = 0
        while done < len(target):
            count = os.preadv(self._descriptor(path), [target[done:]], offset + done)
            if not count:
                raise MergeError(f"{path} became shorter while it was read; restore it")
            done += count

    def write_from(self, path: pathlib.Path, offset: int, source: memoryview) -> None:
        """Writes a buffer to one place of a file."""
        done = 0
        while done < len(source):
            done += os.pwrite(self._descriptor(path), source[done:], offset + done)

    def sync(self) -> None:
        """Waits until what was written lies on the disk."""
        for descriptor in self._open.values():
            os.fsync(descriptor)

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


class Buffers(threading.local):
    """Memory of each thread that is used again and again: fresh pages cost as much as reading."""

    def __init__(self) -> None:
        self._held: dict[object, np.ndarray] = {}

    def take(self, key: object, count: int) -> memoryview:
        """At least `count` bytes, aligned, the same ones at every call with this key."""
        held = self._held.get(key)
        if held is None or held.size < count + _ALIGNMENT:
            held = self._held[key] = np.empty(count + _ALIGNMENT, np.uint8)
        start = -held.ctypes.data % _ALIGNMENT
        return held.data[start : start + count]


def ranges(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """Cuts [start, stop) into pieces of at most `length`.

    Example:
        >>> list(ranges(0, 5, 2))
        [(0, 2), (2, 4), (4, 5)]
    """
    for first in range(start, stop, length):
        yield first, min(first + length, stop)


def is_finite(x: np.ndarray, scratch: memoryview) -> bool:
    """Whether no element of a float array is NaN or infinite; other types always are.

    Args:
        x: one axis.
        scratch: as many bytes as `x` has.

    Example:
        >>> is_finite(np.float32([1, np.inf]), memoryview(bytearray(8)))
        False
    """
    exponent = _EXPONENTS.get(x.dtype)
    if exponent is None or not x.size:
        return True
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    mask = unsigned.type(exponent)
    held = np.frombuffer(scratch, unsigned, x.size)
    return bool(np.bitwise_and(x.view(unsigned), mask, out=held).max() != mask)


def count_non_finite(x: np.ndarray) -> int:
    """The number of elements that are NaN or infinite.

    Example:
        >>> count_non_finite(np.float32([1, np.inf, np.nan]))
        2
    """
    return int((~np.isfinite(x.astype(np.float32))).sum())
