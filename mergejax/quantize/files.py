"""Quantised models in safetensors files, codes packed to the bit."""

import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from mergejax.checkpoints.safetensors import QUANTIZED as FORMAT
from mergejax.errors import MergeError
from mergejax.quantize.solve import Codes
from mergejax.quantize.trees import Quantized

VERSION = "1"
PACKED = (4, 8)  # bits that files hold


def save(path: str | os.PathLike[str], model: Quantized) -> None:
    """Writes a quantised model to a safetensors file, whole or not at all.

    Kernel 'NAME' is 'NAME#codes' (uint8, two codes of 4 bits a byte, the first in the lower half),
    'NAME#scale' (float32 [groups, out]) and 'NAME#zero' (uint8); other leaves are as they were.
    `mergejax convert` makes an ordinary file of it.

    Args:
        path: of the file; one that exists is replaced.
        model: with codes of 4 or 8 bits.

    Raises:
        MergeError: codes of other widths.

    Example:
        >>> import tempfile, mergejax as mj
        >>> model = mj.quantize.round_to_nearest({'kernel': np.eye(2, dtype=np.float32)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pathlib.Path(folder) / 'a.safetensors', model)
        ...     load(pathlib.Path(folder) / 'a.safetensors').kernels['kernel'].codes.tolist()
        [[15, 0], [0, 15]]
    """
    if model.bits not in PACKED:
        raise MergeError(f"codes of {model.bits} bits have no form in files; choose bits=4 or 8")
    path = pathlib.Path(path)
    arrays = {name: np.ascontiguousarray(x) for name, x in model.whole.items()}
    for name, kernel in model.kernels.items():
        arrays[f"{name}#codes"] = packed(np.asarray(kernel.codes), model.bits)
        arrays[f"{name}#scale"] = np.ascontiguousarray(kernel.scale)
        arrays[f"{name}#zero"] = np.asarray(kernel.zero).astype(np.uint8)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "bits": str(model.bits),
        "kernels": json.dumps(model.shapes),
    }
    staged = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        safetensors.numpy.save_file(arrays, staged, metadata=header)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Quantized:
    """Reads a quantised model.

    Args:
        path: of a file that `save` wrote.

    Returns:
        The model, as it was saved.

    Raises:
        MergeError: a file that is missing, damaged, or of another kind or version.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise MergeError(
            f"{path}: cannot be read ({error}); it is missing or damaged, take a copy"
        ) from None
    if header.get("format") != FORMAT:
        raise MergeError(f"{path}: is no quantised model; they are written by mj.quantize.save")
    if header.get("version") != VERSION:
        raise MergeError(
            f"{path}: is of version {header.get('version')}, this release reads {VERSION}; take "
            "the release of mergejax that wrote it"
        )
    try:
        return _model(header, arrays)
    except (KeyError, ValueError, TypeError) as error:
        raise MergeError(
            f"{path}: is damaged, its kernels do not fit its header ({error}); take a copy"
        ) from None


def _model(header: dict[str, str], arrays: dict[str, Any]) -> Quantized:
    bits, kernels, shapes = int(header["bits"]), {}, {}
    for name, (shape, dtype, layout) in json.loads(header["kernels"]).items():
        codes, scale, zero = (arrays.pop(f"{name}#{part}") for part in ("codes", "scale", "zero"))
        matrix = unpacked(codes, bits, int(np.prod(shape))).reshape(-1, scale.shape[-1])
        kernels[name] = Codes(
            jnp.asarray(matrix), jnp.asarray(scale), jnp.asarray(zero, jnp.float32)
        )
        shapes[name] = (tuple(shape), dtype, layout)
    return Quantized(kernels, arrays, shapes, bits)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 4 bits two a byte, of 8 bits as they are.

    Example:
        >>> packed(np.array([[1, 2, 3]], np.uint8), 4).tolist()
        [33, 3]
    """
    flat = codes.astype(np.uint8).ravel()
    if bits == 8:
        return flat
    even = np.pad(flat, (0, flat.size % 2))
    return even[0::2] | (even[1::2] << 4)


def unpacked(codes: np.ndarray, bits: int, size: int) -> np.ndarray:
    """The inverse of `packed`, flat.

    Example:
        >>> unpacked(np.array([33, 3], np.uint8), 4, 3).tolist()
        [1, 2, 3]
    """
    if bits == 8:
        return codes
    halves = np.stack([codes & 15, codes >> 4], axis=1)
    return halves.ravel()[:size]
