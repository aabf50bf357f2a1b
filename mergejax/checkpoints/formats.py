"""Where a model's values lie in a file of each format, and what is written around them.

A merge and a conversion write values to their places, in any order and by any thread, and
`Layout.write` then adds headers, names and checksums. Every format but Orbax's OCDBT allows that,
so all of them are staged, resumed and verified alike, and their bytes follow from the values alone.
"""

import functools
import io
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from mergejax.checkpoints import msgpack, orbax_arrays, safetensors
from mergejax.checkpoints.files import Files, pieces_of
from mergejax.checkpoints.safetensors import Tensor
from mergejax.errors import MergeError, some

Types = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
NPZ = "model.npz"


class Layout(NamedTuple):
    """A model's files before their values are written.

    Attributes:
        placed: where each tensor's values go.
        write: writes the rest, once the values are there.
        bytes: of all files together.
    """

    placed: Mapping[str, Tensor]
    write: Callable[[Files], None]
    bytes: int


def lay_out(form: str, types: Types, folder: pathlib.Path) -> Layout:
    """The layout of one model in one format.

    Args:
        form: 'safetensors' (one file), 'npz', 'msgpack' or 'orbax'.
        types: type and shape by name.
        folder: that will hold the files; for Orbax it is the checkpoint.

    Raises:
        MergeError: a type or a name that the format does not have.
    """
    return _FORMATS[form](types, folder)


def _safetensors(types: Types, folder: pathlib.Path) -> Layout:
    file = folder / FILES["safetensors"]
    bare = {name: Tensor(file, dtype, shape, 0) for name, (dtype, shape) in types.items()}
    ordered = safetensors.in_file_order(bare)
    header = safetensors.header_bytes(ordered, {"format": "pt"})
    placed, end = {}, len(header)
    for name, tensor in ordered.items():
        placed[name] = tensor._replace(offset=end)
        end += tensor.bytes
    return Layout(placed, lambda output: output.write_from(file, 0, memoryview(header)), end)


def _msgpack(types: Types, folder: pathlib.Path) -> Layout:
    file = folder / msgpack.FILE
    placed, frame, end = msgpack.deal(types, file)
    return Layout(placed, functools.partial(msgpack.write_frame, frame, file), end)


def _orbax(types: Types, folder: pathlib.Path) -> Layout:
    placed, texts = orbax_arrays.deal(types, folder)

    def write(output: Files) -> None:
        for name, text in texts.items():
            output.write_from(folder / name, 0, memoryview(text.encode()))

    size = sum(len(text.encode()) for text in texts.values())
    return Layout(placed, write, size + sum(tensor.bytes for tensor in placed.values()))


def _npz(types: Types, folder: pathlib.Path) -> Layout:
    foreign = [name for name, (dtype, _) in types.items() if dtype.isbuiltin != 1]
    if foreign:
        raise MergeError(f"npz has no type for {some(foreign)} (bfloat16, float8); choose msgpack")
    file = folder / NPZ
    placed: dict[str, Tensor] = {}
    end, tail = 0, 22
    for name, (dtype, shape) in types.items():
        entry = f"{name}.npy".encode()
        start = end + 30 + len(entry) + 20 + len(_npy_header(dtype, shape))
        placed[name] = Tensor(file, dtype, shape, start)
        end = start + placed[name].bytes
        tail += 46 + len(entry)
    return Layout(placed, lambda output: _write_zip(file, placed), end + tail)


def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    text = io.BytesIO()
    described = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": described, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(text, header)
    return text.getvalue()


def _write_zip(file: pathlib.Path, placed: Mapping[str, Tensor]) -> None:
    """Lets the library write the archive over the values, which stay where they are."""
    file.touch()
    with Files() as source, file.open("r+b") as raw, zipfile.ZipFile(raw, "w") as archive:
        for name, tensor in placed.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                entry.write(_npy_header(tensor.dtype, tensor.shape))
                if raw.tell() != tensor.offset:
                    raise OSError(f"{file} is laid out otherwise than this version expects")
                for piece in pieces_of(file, tensor.offset, tensor.bytes, source):
                    entry.write(piece)


FILES = {
    "safetensors": "model.safetensors",
    "orbax": "",
    "msgpack": msgpack.FILE,
    "npz": NPZ,
}
_FORMATS: Mapping[str, Callable[[Types, pathlib.Path], Layout]] = {
    "safetensors": _safetensors,
    "orbax": _orbax,
    "msgpack": _msgpack,
    "npz": _npz,
}
