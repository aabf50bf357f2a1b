"""PyTorch files without PyTorch: where the tensors lie, found by a reader that can run no code.

A file is a pickle that names storages, and the storages' bytes. The pickle is read with a table of
the few names that state dicts use, each standing for a harmless description; any other name is
refused, so nothing in a file is ever called.
"""

import collections
import io
import pathlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mergejax.checkpoints.safetensors import Tensor
from mergejax.errors import MergeError, raise_all

SUFFIXES = (".bin", ".pt", ".pth", ".th", ".ckpt")
_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "Float8_e4m3fnStorage": ml_dtypes.float8_e4m3fn,
    "Float8_e5m2Storage": ml_dtypes.float8_e5m2,
}
_WHERE = ("state_dict", "model_state_dict", "model", "module", "params", "params_ema")


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str


class _Stored(NamedTuple):
    """A tensor as its file describes it: counts are elements of the storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Stored:
    return _Stored(storage, offset, tuple(shape), tuple(strides))


def _parameter(stored: Any, *_: Any) -> Any:
    return stored


class _Device:
    def __init__(self, *_: Any):
        pass


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "device"): _Device,
    ("torch", "Size"): tuple,
    **{("torch", name): np.dtype(dtype) for name, dtype in _STORAGES.items()},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise MergeError(f"it calls for {module}.{name}, which no state dict needs")
        return _NAMES[module, name]

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, *_ = identity
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise MergeError("it refers to something that is no storage")
        return _Storage(dtype, str(key))


def read_torch(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote from a state dict, by name.

    Args:
        path: of the file, in the zip format of PyTorch 1.6 and later or the older one.

    Returns:
        Where the values lie; none of them is read.

    Raises:
        MergeError: the file is damaged, holds something else than tensors by name, or asks for
            code to be run.
    """
    try:
        with path.open("rb") as file:
            zipped = zipfile.is_zipfile(file)
            file.seek(0)
            content, places = (_zipped if zipped else _legacy)(file)
    except MergeError as error:
        raise MergeError(
            f"{path} is refused: {error}; convert it to safetensors where you trust it"
        ) from None
    except OSError as error:
        raise MergeError(f"{path} cannot be read ({error.strerror}); check the file") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise MergeError(
            f"{path} is no readable PyTorch file ({type(error).__name__}); save it again"
        ) from None
    return _placed(path, _state(path, content), places)


def _zipped(file: Any) -> tuple[Any, Mapping[str, int]]:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        root = next(name for name in entries if name.endswith("data.pkl")).removesuffix("data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise MergeError("its values are compressed")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
        if order != b"little":
            raise MergeError("its values are big-endian")
        content = _Reader(io.BytesIO(archive.read(f"{root}data.pkl"))).load()
    places = {}
    for name, entry in entries.items():
        if name.startswith(f"{root}data/"):
            file.seek(entry.header_offset + 26)
            lengths = file.read(4)
            skip = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            places[name.removeprefix(f"{root}data/")] = entry.header_offset + 30 + skip
    return content, places


def _legacy(file: Any) -> tuple[Any, Mapping[str, int]]:
    """The format before PyTorch 1.6: five pickles, then each storage behind its length."""
    if _Reader(file).load() != _MAGIC:
        raise MergeError("it was not written by torch.save")
    _Reader(file).load()
    _Reader(file).load()
    storages: dict[str, np.dtype] = {}

    class Noting(_Reader):
        def persistent_load(self, identity: Any) -> _Storage:
            storage = super().persistent_load(identity)
            storages[storage.key] = storage.dtype
            return storage

    content = Noting(file).load()
    places = {}
    for key in _Reader(file).load():
        count = int.from_bytes(file.read(8), "little")
        places[str(key)] = file.tell()
        file.seek(count * storages[str(key)].itemsize, 1)
    return content, places


def _state(path: pathlib.Path, content: Any) -> dict[str, _Stored]:
    """The tensors by name, at the top or under one of the usual names."""
    candidates = [content] if isinstance(content, Mapping) else []
    candidates += [content[key] for key in _WHERE if candidates and key in content]
    for candidate in candidates:
        if isinstance(candidate, Mapping):
            found = {str(k): v for k, v in candidate.items() if isinstance(v, _Stored)}
            if found:
                return found
    raise MergeError(f"{path} holds no tensors by name; save the model's state_dict()")


def _placed(
    path: pathlib.Path, stored: Mapping[str, _Stored], places: Mapping[str, int]
) -> dict[str, Tensor]:
    problems, found, end = [], {}, path.stat().st_size
    for name, (storage, offset, shape, strides) in stored.items():
        start = places.get(storage.key, end) + offset * storage.dtype.itemsize
        tensor = Tensor(path, storage.dtype, shape, start)
        if not _is_contiguous(shape, strides):
            problems.append(f"{path}: tensor '{name}' is a view; save it with .contiguous()")
        elif start + tensor.bytes > end:
            problems.append(f"{path}: tensor '{name}' ends behind the file; it is truncated")
        found[name] = tensor
    raise_all(problems)
    return found


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != step:
            return False
        step *= length
    return True
