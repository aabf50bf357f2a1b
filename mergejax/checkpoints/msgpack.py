"""Flax's msgpack files: where each array lies, and the bytes around the values.

A file is a nested map of names; an array is an extension that holds its shape, its type's name and
its bytes, and one of more than 2^30 bytes is a map of such pieces, as `flax.serialization` writes.
"""

import math
import mmap
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401, NumPy knows bfloat16 and float8 by name once it is imported
import msgpack
import numpy as np

from mergejax.checkpoints.files import Files, Held, Spread
from mergejax.checkpoints.safetensors import CODES, Tensor
from mergejax.errors import MergeError, raise_all, some

FILE = "model.msgpack"
_CHUNKED = "__msgpack_chunked_array__"
_LARGEST = 2**30  # bytes of an array that is one piece
_ARRAY, _SCALAR = 1, 3  # numbers of Flax's extensions
# By the first byte: bytes that the length takes, and what stands there.
_LENGTHS = {
    0xC4: (1, "bin"), 0xC5: (2, "bin"), 0xC6: (4, "bin"),
    0xC7: (1, "ext"), 0xC8: (2, "ext"), 0xC9: (4, "ext"),
    0xD9: (1, "str"), 0xDA: (2, "str"), 0xDB: (4, "str"),
    0xDC: (2, "list"), 0xDD: (4, "list"), 0xDE: (2, "map"), 0xDF: (4, "map"),
}  # fmt: skip
_PLAIN = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b",
          0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}  # fmt: skip


class _Array(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    length: int


class _Cursor:
    """Goes through a file item by item without reading what arrays hold."""

    def __init__(self, content: Any):
        self._content, self.place = content, 0

    def _take(self, count: int) -> bytes:
        start = self.place
        if start + count > len(self._content):
            raise ValueError("it ends too early")
        self.place += count
        return bytes(self._content[start : self.place])

    def head(self) -> tuple[str, Any]:
        """The kind of the next item, and its value, or its length if that follows."""
        byte = self._take(1)[0]
        if byte < 0x80 or byte >= 0xE0:
            return "plain", byte if byte < 0x80 else byte - 256
        if byte < 0xC0:
            kinds = {0x80: "map", 0x90: "list"}
            return (kinds[byte & 0xF0], byte & 15) if byte < 0xA0 else ("str", byte & 31)
        if byte in (0xC0, 0xC2, 0xC3):
            return "plain", {0xC0: None, 0xC2: False, 0xC3: True}[byte]
        if 0xD4 <= byte <= 0xD8:
            return "ext", 2 ** (byte - 0xD4)
        if byte in _LENGTHS:
            size, kind = _LENGTHS[byte]
            return kind, int.from_bytes(self._take(size), "big")
        if byte not in _PLAIN:
            raise ValueError(f"byte {self.place - 1} is no msgpack")
        form = _PLAIN[byte]
        return "plain", struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def item(self, depth: int = 0) -> Any:
        """The next item: nested dictionaries, numbers, texts, and arrays by their places."""
        kind, value = self.head()
        if depth > 100:
            raise ValueError("it is nested too deeply")
        if kind == "map":
            pairs = [(self.item(depth + 1), self.item(depth + 1)) for _ in range(value)]
            return {str(key): x for key, x in pairs}
        if kind == "list":
            return {str(i): self.item(depth + 1) for i in range(value)}
        if kind == "str":
            return self._take(value).decode()
        if kind == "bin":
            return self._take(value)
        if kind == "ext":
            number = self._take(1)[0]
            end = self.place + value
            found = self._array() if number in (_ARRAY, _SCALAR) else b""
            if self.place > end or end > len(self._content):
                raise ValueError("an array ends behind its place")
            self.place = end
            return found
        return value

    def _array(self) -> _Array:
        kind, count = self.head()
        if (kind, count) != ("list", 3):
            raise ValueError(f"byte {self.place} begins no array")
        shape = tuple(int(size) for size in self.item().values())
        name = self.item()
        dtype = np.dtype(name.decode() if isinstance(name, bytes) else name)
        _, length = self.head()
        array = _Array(dtype, shape, self.place, length)
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != length:
            raise ValueError(f"an array of shape {list(shape)} has {length} bytes")
        self.place += length
        return array


def read_msgpack(path: pathlib.Path) -> dict[str, Tensor]:
    """The arrays of a Flax msgpack file by names that '/' joins; none of their values is read.

    Raises:
        MergeError: the file is damaged, or a leaf is neither an array nor a number.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
            cursor = _Cursor(held)
            tree = cursor.item()
            if cursor.place < len(held):
                raise ValueError(f"{len(held) - cursor.place} bytes follow its end")
    except OSError as error:
        raise MergeError(f"{path} cannot be read ({error.strerror}); check the file") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise MergeError(f"{path} is no Flax msgpack file ({error}); save it again") from None
    if not isinstance(tree, dict):
        raise MergeError(f"{path} holds no tree of arrays; save a dictionary of them")
    found, problems = {}, []
    for name, value in _leaves(tree):
        tensor = _tensor(path, value)
        if tensor is None or tensor.dtype not in CODES:
            kind = type(value).__name__ if tensor is None else f"type {tensor.dtype}"
            problems.append(f"{path}: '{name}' of {kind} cannot be merged; leave it out")
        else:
            found[name] = tensor
    raise_all(problems)
    return found


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and _CHUNKED not in value:
            yield from _leaves(value, f"{prefix}{key}/")
        elif value is not None:
            yield prefix + key, value


def _tensor(path: pathlib.Path, value: Any) -> Tensor | None:
    if isinstance(value, _Array):
        return Tensor(path, value.dtype, value.shape, value.offset)
    if isinstance(value, dict):
        chunks = list(value["chunks"].values())
        places = tuple((chunk.offset, chunk.length) for chunk in chunks)
        shape = tuple(value["shape"].values())
        return Tensor(Spread(path, places), chunks[0].dtype, shape, 0)
    if isinstance(value, bool | int | float):
        number = np.asarray(value)
        return Tensor(Held(path, number.tobytes()), number.dtype, (), 0)
    return None


def nested(names: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries of leaves whose names '/' joins.

    Raises:
        MergeError: a leaf lies inside another.

    Example:
        >>> nested({'a/b': 1, 'a/c': 2})
        {'a': {'b': 1, 'c': 2}}
    """
    tree: dict[str, Any] = {}
    inner = [name for name in names if any(outer in names for outer in _outer(name))]
    if inner:
        raise MergeError(f"{some(inner)} lies inside another leaf; no tree can hold both")
    for name, x in names.items():
        *outer, last = name.split("/")
        place = tree
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = x
    return tree


def _outer(name: str) -> Iterator[str]:
    parts = name.split("/")
    return ("/".join(parts[:length]) for length in range(1, len(parts)))


def deal(types: Mapping[str, tuple[np.dtype, tuple[int, ...]]], file: pathlib.Path) -> Any:
    """Where values lie in a file that Flax would write, and the bytes between them.

    Args:
        types: type and shape by name.
        file: its path.

    Returns:
        The tensors by name; the frame as (offset, bytes); the length of the file.
    """
    frame: list[tuple[int, bytes]] = []
    placed: dict[str, Tensor] = {}
    end = 0

    def put(text: bytes) -> None:
        nonlocal end
        frame.append((end, text))
        end += len(text)

    def array(dtype: np.dtype, shape: tuple[int, ...]) -> tuple[int, int]:
        nonlocal end
        count = math.prod(shape) * dtype.itemsize
        inner = b"\x93" + msgpack.packb(shape) + msgpack.packb(dtype.name) + _length("bin", count)
        put(_length("ext", len(inner) + count) + bytes([_ARRAY]) + inner)
        place = end, count
        end += count
        return place

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        put(_map(len(tree)))
        for key, value in tree.items():
            put(msgpack.packb(key))
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}/")
                continue
            dtype, shape = value
            if math.prod(shape) * dtype.itemsize > _LARGEST:
                places = chunks(dtype, shape)
                placed[prefix + key] = Tensor(Spread(file, tuple(places)), dtype, shape, 0)
            else:
                placed[prefix + key] = Tensor(file, dtype, shape, array(dtype, shape)[0])

    def chunks(dtype: np.dtype, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        sizes = {str(i): size for i, size in enumerate(shape)}
        put(_map(3) + msgpack.packb(_CHUNKED) + b"\xc3" + msgpack.packb("shape"))
        put(msgpack.packb(sizes) + msgpack.packb("chunks"))
        length, count = _LARGEST // dtype.itemsize, math.prod(shape)
        starts = range(0, count, length)
        put(_map(len(starts)))
        found = []
        for i, start in enumerate(starts):
            put(msgpack.packb(str(i)))
            found.append(array(dtype, (min(length, count - start),)))
        return found

    walk(nested(types), "")
    return {name: placed[name] for name in types}, frame, end


def _map(count: int) -> bytes:
    return msgpack.Packer().pack_map_header(count)


def _length(kind: str, count: int) -> bytes:
    """The shortest head of a binary or an extension, as the library packs it."""
    if kind == "ext" and count in (1, 2, 4, 8, 16):
        return bytes([0xD4 + count.bit_length() - 1])
    size = 1 if count < 2**8 else 2 if count < 2**16 else 4
    byte = next(b for b, entry in _LENGTHS.items() if entry == (size, kind))
    return bytes([byte]) + count.to_bytes(size, "big")


def write_frame(frame: list[tuple[int, bytes]], file: pathlib.Path, output: Files) -> None:
    """Writes the bytes between the values."""
    for offset, text in frame:
        output.write_from(file, offset, memoryview(text))
