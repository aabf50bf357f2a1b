"""Quantised models in safetensors files, codes packed to the bit."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mergejax.checkpoints import tagged
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
        >>> import pathlib, tempfile, mergejax as mj
        >>> model = mj.quantize.round_to_nearest({'kernel': np.eye(2, dtype=np.float32)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pathlib.Path(folder) / 'a.safetensors', model)
        ...     load(pathlib.Path(folder) / 'a.safetensors').kernels['kernel'].codes.tolist()
        [[15, 0], [0, 15]]
    """
    if model.bits not in PACKED:
        raise MergeError(f"codes of {model.bits} bits have no form in files; choose bits=4 or 8")
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
    tagged.write(path, arrays, header)


def load(path: str | os.PathLike[str]) -> Quantized:
    """Reads a quantised model.

    Args:
        path: of a file that `save` wrote.

    Returns:
        The model, as it was saved.

    Raises:
        MergeError: a file that is missing, damaged, or of another kind or version.
    """
    otherwise = "is no quantised model; they are written by mj.quantize.save"
    arrays, header = tagged.read(path, FORMAT, VERSION, otherwise)
    try:
        return _model(header, arrays)
    except (KeyError, ValueError, TypeError) as error:
        raise MergeError(
            f"{path}: is damaged, its kernels do not fit its header ({error}); take a copy"
        ) from None


def _model(header: Mapping[str, str], arrays: dict[str, Any]) -> Quantized:
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
