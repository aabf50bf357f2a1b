"""Bytes of many files at once: positional reads and writes that several threads may share."""

import contextlib
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import xxhash

from mergejax.errors import MergeError

CHUNK = 2**23  # elements that have one digest
HASH = "xxh3_128"  # what files call it; it tells contents apart at the speed of memory
hasher = xxhash.xxh3_128
_HELD_OPEN = 256  # files; more are opened for each access, for systems allow a thousand or so
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
# These have one NaN, where others have minus zero, and no infinity.
_ONE_NAN = (np.dtype(ml_dtypes.float8_e4m3fnuz), np.dtype(ml_dtypes.float8_e5m2fnuz))


class Source(Protocol):
    """Bytes that are no plain part of a file; stands where a path does.

    Attributes:
        path: the file or the folder that they come from.
        name: its last part.
    """

    @property
    def path(self) -> pathlib.Path: ...

    @property
    def name(self) -> str: ...

    def read_into(self, files: "Files", offset: int, target: memoryview) -> None:
        """Fills a buffer with the bytes from `offset` on."""


class Spread(NamedTuple):
    """Bytes in several places of a file, read and written one behind the other.

    Attributes:
        path: of the file.
        places: (offset, length) of each part.
    """

    path: pathlib.Path
    places: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        return self.path.name

    def _within(self, offset: int, view: memoryview) -> Iterator[tuple[int, memoryview]]:
        start = 0
        for place, length in self.places:
            first, last = max(offset, start), min(offset + len(view), start + length)
            if first < last:
                yield place + first - start, view[first - offset : last - offset]
            start += length

    def read_into(self, files: "Files", offset: int, target: memoryview) -> None:
        for place, part in self._within(offset, target):
            files.read_into(self.path, place, part)

    def write_from(self, files: "Files", offset: int, source: memoryview) -> None:
        for place, part in self._within(offset, source):
            files.write_from(self.path, place, part)


class Held(NamedTuple):
    """A few bytes that are known already, such as a number in a header."""

    path: pathlib.Path
    content: bytes

    @property
    def name(self) -> str:
        return self.path.name

    def read_into(self, files: "Files", offset: int, target: memoryview) -> None:
        target[:] = self.content[offset : offset + len(target)]


class Files:
    """Open files by path, read or written at any place by any thread; sources stand for paths."""

    def __init__(self, flags: int = os.O_RDONLY):
        self._flags = flags | getattr(os, "O_BINARY", 0)
        self._open: dict[pathlib.Path, int] = {}
        self._others: set[pathlib.Path] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @contextlib.contextmanager
    def _descriptor(self, path: pathlib.Path) -> Iterator[int]:
        with self._lock:
            if path not in self._open and len(self._open) < _HELD_OPEN:
                self._open[path] = self._open_file(path)
            held = self._open.get(path)
        if held is not None:
            yield held
            return
        with self._lock:
            self._others.add(path)
        descriptor = self._open_file(path)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open_file(self, path: pathlib.Path) -> int:
        if self._flags & os.O_CREAT:
            path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, self._flags, 0o644)

    def read_into(self, path: pathlib.Path | Source, offset: int, target: memoryview) -> None:
        """Fills a buffer from one place of a file."""
        if not isinstance(path, pathlib.Path):
            path.read_into(self, offset, target)
            return
        done = 0
        with self._descriptor(path) as descriptor:
            while done < len(target):
                count = os.preadv(descriptor, [target[done:]], offset + done)
                if not count:
                    raise MergeError(f"{path} became shorter while it was read; restore it")
                done += count

    def write_from(self, path: pathlib.Path | Spread, offset: int, source: memoryview) -> None:
        """Writes a buffer to one place of a file."""
        if isinstance(path, Spread):
            path.write_from(self, offset, source)
            return
        done = 0
        with self._descriptor(path) as descriptor:
            while done < len(source):
                done += os.pwrite(descriptor, source[done:], offset + done)

    def sync(self) -> None:
        """Waits until what was written lies on the disk."""
        with self._lock:
            held, others = list(self._open.values()), list(self._others)
        for descriptor in held:
            os.fsync(descriptor)
        for path in others:
            with self._descriptor(path) as descriptor:
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


def pieces_of(
    path: pathlib.Path | Source, offset: int, count: int, files: Files, length: int = 2**22
) -> Iterator[memoryview]:
    """Reads bytes piece by piece; a piece is overwritten when the next one is taken."""
    buffer = memoryview(bytearray(min(count, length)))
    for start, stop in ranges(offset, offset + count, length):
        part = buffer[: stop - start]
        files.read_into(path, start, part)
        yield part


def is_finite(x: np.ndarray) -> bool:
    """Whether no element of a float array is NaN or infinite; other types always are.

    Those that are not finite are the largest of all, as signed integers if they are positive and as
    unsigned ones if they are negative; two maxima take half the time of `numpy.isfinite`.

    Args:
        x: one axis.

    Example:
        >>> is_finite(np.float32([1, -np.inf]))
        False
    """
    if x.dtype in _ONE_NAN:
        return not (x.view(np.uint8) == 0x80).any()
    exponent = _EXPONENTS.get(x.dtype)
    if exponent is None or not x.size:
        return True
    width = x.dtype.itemsize
    positive, negative = x.view(f"i{width}").max(), x.view(f"u{width}").max()
    return int(positive) < exponent and int(negative) < exponent | 1 << 8 * width - 1


def count_non_finite(x: np.ndarray) -> int:
    """The number of elements that are NaN or infinite.

    Example:
        >>> count_non_finite(np.float32([1, np.inf, np.nan]))
        2
    """
    return int((~np.isfinite(x.astype(np.float32))).sum())
