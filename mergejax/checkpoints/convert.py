"""One model from one file format to another, every value as it was."""

import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mergejax.checkpoints import safetensors
from mergejax.checkpoints.folder import open_model
from mergejax.checkpoints.safetensors import CODES, QUANTIZED, Tensor
from mergejax.errors import MergeError, did_you_mean, raise_all, some

FORMATS = {"safetensors": ".safetensors", "npz": ".npz", "msgpack": ".msgpack", "orbax": ""}
Arrays = Mapping[str, np.ndarray]


def convert(
    source: str | os.PathLike, target: str | os.PathLike, form: str | None = None
) -> pathlib.Path:
    """Writes a model in another format: safetensors, npz, Flax msgpack, Orbax.

    Leaves of trees have names such as 'block_0/dense/kernel' in flat formats; in trees, names are
    taken apart at each '/'.

    Args:
        source: whatever a merge reads, a Flax msgpack file, an Orbax folder, or a quantised model
            (`mj.quantize.save`), which becomes an ordinary one.
        target: the file, or the folder for Orbax, to write; nothing may stand there.
        form: 'safetensors', 'npz', 'msgpack' or 'orbax'; by default what the target's name ends
            with, and Orbax for a name without ending.

    Returns:
        The path that was written.

    Raises:
        MergeError: a source that cannot be read, a target that exists, an unknown format, types
            that the format does not have.

    Example:
        >>> import tempfile, numpy as np
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> np.savez(folder / 'a.npz', **{'dense/kernel': np.ones((2, 3), np.float32)})
        >>> written = convert(folder / 'a.npz', folder / 'a.safetensors')
        >>> list(read(written)), read(written)['dense/kernel'].shape
        (['dense/kernel'], (2, 3))
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    suffixes = {suffix: name for name, suffix in FORMATS.items()}
    chosen = form or suffixes.get(target.suffix, "")
    problems = []
    if chosen not in FORMATS:
        problems.append(
            f"{target}: its format is unknown, {did_you_mean(form or target.suffix, FORMATS)}"
        )
    if target.exists():
        problems.append(f"{target} exists; choose another target, or remove it")
    raise_all(problems)
    arrays = read(source)
    staged = target.with_name(f".{target.name}.new")
    _remove(staged)
    staged.parent.mkdir(parents=True, exist_ok=True)
    try:
        _WRITERS[chosen](staged, arrays)
        os.replace(staged, target)
    finally:
        _remove(staged)
    return target


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read(path: pathlib.Path) -> Arrays:
    """The arrays of a model by name, memory-mapped where the format allows it.

    Raises:
        MergeError: it cannot be read.
    """
    if path.suffix == ".msgpack":
        return _read_msgpack(path)
    if path.suffix == ".safetensors" and _is_quantized(path):
        from mergejax.quantize import dequantize, load

        return {name: np.asarray(x) for name, x in dequantize(load(path)).items()}
    if path.is_dir() and any(path.glob("_METADATA")):
        from mergejax.checkpoints import orbax

        return _flat(orbax.restore(path))
    return {name: _mapped(tensor) for name, tensor in open_model(path).tensors.items()}


def _is_quantized(path: pathlib.Path) -> bool:
    return path.is_file() and safetensors.read_header(path)[1].get("format") == QUANTIZED


def _mapped(tensor: Tensor) -> np.ndarray:
    if not tensor.size:
        return np.zeros(tensor.shape, tensor.dtype)
    return np.memmap(tensor.path, tensor.dtype, "r", tensor.offset, tensor.shape)


def _read_msgpack(path: pathlib.Path) -> Arrays:
    from flax import serialization

    try:
        return _flat(serialization.msgpack_restore(path.read_bytes()))
    except OSError as error:
        raise MergeError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except MergeError:
        raise
    except Exception as error:  # the library lets through whatever its parser raises
        raise MergeError(f"{path} is no Flax msgpack file ({type(error).__name__})") from None


def _flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """A nested dictionary's arrays by names that '/' joins."""
    if not isinstance(tree, Mapping):
        return {prefix[:-1]: np.asarray(tree)}
    found: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}/")
    return found


def _nested(arrays: Arrays) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, x in arrays.items():
        *outer, last = name.split("/")
        place = tree
        for key in outer:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise MergeError(f"'{name}' lies inside another leaf; no tree can hold both")
        if last in place:
            raise MergeError(f"'{name}' is a leaf and holds others; no tree can hold both")
        place[last] = np.asarray(x)
    return tree


def _write_safetensors(path: pathlib.Path, arrays: Arrays) -> None:
    unknown = [name for name, x in arrays.items() if x.dtype not in CODES]
    if unknown:
        raise MergeError(f"safetensors has no type for {some(unknown)}; cast them first")
    tensors = {name: Tensor(path, x.dtype, x.shape, 0) for name, x in arrays.items()}
    ordered = safetensors.in_file_order(tensors)
    with path.open("wb") as file:
        file.write(safetensors.header_bytes(ordered, {"format": "pt"}))
        for name in ordered:
            file.write(np.ascontiguousarray(arrays[name]).tobytes())


def _write_npz(path: pathlib.Path, arrays: Arrays) -> None:
    foreign = [name for name, x in arrays.items() if x.dtype.kind == "V"]
    if foreign:
        raise MergeError(f"npz has no type for {some(foreign)} (bfloat16, float8); choose msgpack")
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _write_msgpack(path: pathlib.Path, arrays: Arrays) -> None:
    from flax import serialization

    path.write_bytes(serialization.msgpack_serialize(_nested(arrays)))


def _write_orbax(path: pathlib.Path, arrays: Arrays) -> None:
    from mergejax.checkpoints import orbax

    orbax.save(path, _nested(arrays))


_WRITERS: dict[str, Callable[[pathlib.Path, Arrays], None]] = {
    "safetensors": _write_safetensors,
    "npz": _write_npz,
    "msgpack": _write_msgpack,
    "orbax": _write_orbax,
}
