"""Safetensors files: headers read with every check, and written as the reference writer does."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mergejax.checkpoints.rows import Rows
from mergejax.errors import MergeError, did_you_mean, raise_all, some

# From the widest to the narrowest: the order in which the reference writer lays tensors out.
DTYPES = {
    "C64": np.dtype(np.complex64),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {code: rank for rank, code in enumerate(DTYPES)}
_LONGEST = 100_000_000  # bytes of a header; the reference reader refuses longer ones
QUANTIZED = "mergejax.quantize"  # the format of files of `mj.quantize.save`
POINTER = b"version https://git-lfs"


class Product(NamedTuple):
    """What an adapter makes of a matrix when it is read: W + left right, or that times a factor.

    Attributes:
        path: of the file that it comes from.
        left, right: [rows, r] and [r, columns], float64.
        factors: gives one factor a row, [rows, 1], or a column, [1, columns], float64; None for
            plain LoRA.
    """

    path: pathlib.Path
    left: np.ndarray
    right: np.ndarray
    factors: Callable[[], np.ndarray] | None = None

    def onto(self, values: np.ndarray, start: int, stop: int) -> np.ndarray:
        """The elements from `start` to `stop` in the order of rows, float32.

        Args:
            values: those elements of the matrix, flat.
            start, stop: the first one, and the one behind the last.
        """
        columns = self.right.shape[1]
        first, last = start // columns, -(-stop // columns)
        mine = slice(start - first * columns, stop - first * columns)
        product = (self.left[first:last] @ self.right).reshape(-1)[mine]
        if self.factors is None:
            return values.astype(np.float32) + product.astype(np.float32)
        factors = self.factors()
        factors = factors[first:last] if factors.shape[1] == 1 else factors
        every = np.broadcast_to(factors, (last - first, columns)).reshape(-1)[mine]
        return ((values.astype(np.float64) + product) * every).astype(np.float32)


class Tensor(NamedTuple):
    """Where the values of one tensor lie.

    Attributes:
        path: of the file, or a `files.Source` that stands for one.
        dtype: of the values.
        shape: of the tensor.
        offset: of its first byte in the file.
        product: an adapter's part, added when the values are read, or None.
        rows: the parts of other tensors that this one consists of, or None; path and offset are
            then those of its first part.
    """

    path: Any  # pathlib.Path | Source
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    product: Product | None = None
    rows: Rows | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def source(self) -> str:
        """The name of the file to look at if something is wrong with the values."""
        return (self.path if self.product is None else self.product.path).name

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def paths(self) -> set[pathlib.Path]:
        """The files that the values come from."""
        if self.rows is not None:
            return self.rows.paths
        own = self.path if isinstance(self.path, pathlib.Path) else self.path.path
        return {own} if self.product is None else {own, self.product.path}


def read_header(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what a safetensors file holds, and nothing of its values.

    Returns:
        The tensors by name, in the order of the file, and the metadata.

    Raises:
        MergeError: one sentence for everything that is wrong with the header, its entries or the
            length of the file.
    """
    entries, start, length = _entries(path)
    metadata = entries.pop("__metadata__", {})
    problems = []
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append(f"{path}: its metadata are no texts by name; save the model again")
        metadata = {}
    found: dict[str, tuple[Tensor, int, int]] = {}
    for name, entry in entries.items():
        if problem := _entry_problem(entry, length - start):
            problems.append(f"{path}: tensor '{name}' {problem}")
            continue
        first, last = entry["data_offsets"]
        tensor = Tensor(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + first)
        if tensor.bytes != last - first:
            problems.append(
                f"{path}: tensor '{name}' of shape {list(tensor.shape)} and type {entry['dtype']} "
                f"needs {tensor.bytes} bytes, but its offsets hold {last - first}; "
                "save the model again"
            )
            continue
        found[name] = (tensor, first, last)
    problems += _layout_problems(path, found, length - start) if not problems else []
    raise_all(problems)
    ordered = sorted(found.items(), key=lambda item: item[1][1:])
    return {name: tensor for name, (tensor, _, _) in ordered}, metadata


def _entries(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
    """The header as it stands, where the values start, and the length of the file."""
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            size = int.from_bytes(head, "little")
            rest = file.read(size) if 8 + size <= length and size <= _LONGEST else b""
            start = head + (rest or file.read(32))
    except OSError as error:
        raise MergeError(f"{path} cannot be read ({error.strerror}); check the file") from None
    if length == 0:
        raise MergeError(f"{path} is empty; download it again")
    if start.startswith(POINTER):
        raise MergeError(f"{path} is a git-lfs pointer, not the weights; run 'git lfs pull'")
    if len(head) < 8 or size > length - 8:
        raise MergeError(
            f"{path}: the file has {length} bytes, less than its header claims; it is truncated "
            "or no safetensors file"
        )
    if size > _LONGEST:
        raise MergeError(f"{path}: its header claims {size} bytes; this is no safetensors file")
    try:
        header = json.loads(rest.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise MergeError(
            f"{path}: its header is corrupt ({reason}); save the model again"
        ) from None
    if not isinstance(header, dict):
        raise MergeError(f"{path}: its header is no table of tensors; save the model again")
    return header, 8 + size, length


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A table of a JSON text, whose names differ; ValueError otherwise."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"it has {some(twice)} twice")
    return dict(pairs)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry_problem(entry: Any, available: int) -> str:
    """What is wrong with one entry of a header, or nothing."""
    again = "; save the model again"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        return f"has no dtype, shape and data_offsets{again}"
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        return (
            f"has the unknown type {entry['dtype']!r}, {did_you_mean(str(entry['dtype']), DTYPES)}"
        )
    if not isinstance(entry["shape"], list) or not all(map(_is_size, entry["shape"])):
        return f"has the impossible shape {str(entry['shape'])[:80]}{again}"
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        return f"has the impossible offsets {str(offsets)[:80]}{again}"
    if offsets[0] > offsets[1]:
        return f"ends at byte {offsets[1]}, before its start at {offsets[0]}{again}"
    if offsets[1] > available:
        return (
            f"ends at byte {offsets[1]} of the values, but the file holds {available}; it is "
            "truncated, download it again"
        )
    return ""


def _layout_problems(
    path: pathlib.Path, found: Mapping[str, tuple[Tensor, int, int]], available: int
) -> list[str]:
    """Overlaps, gaps and what stands behind the last tensor."""
    problems, end, before = [], 0, "the start"
    for name, (_, first, last) in sorted(found.items(), key=lambda item: item[1][1:]):
        if first < end:
            problems.append(
                f"{path}: tensors {before} and '{name}' overlap by {end - first} bytes; "
                "save the model again"
            )
        elif first > end:
            problems.append(
                f"{path}: {first - end} bytes between {before} and '{name}' belong to no tensor; "
                "save the model again"
            )
        if last >= end:
            end, before = last, f"'{name}'"
    if end < available:
        problems.append(
            f"{path}: {available - end} bytes behind {before} belong to no tensor; "
            "save the model again"
        )
    return problems


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The header of a file whose tensors lie one behind the other in the given order.

    Args:
        tensors: their types and shapes; path and offset are not read.
        metadata: texts by name.

    Returns:
        The length and the header, padded with spaces to a multiple of eight bytes.

    Example:
        >>> header_bytes({}, {"format": "pt"})[8:]
        b'{"__metadata__":{"format":"pt"}}'
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.bytes],
        }
        start += tensor.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The order in which the reference writer lays tensors out: wide types first, then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (_RANKS[CODES[item[1].dtype]], item[0])))
