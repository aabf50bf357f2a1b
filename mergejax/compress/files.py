"""Packed deltas in safetensors files, tied to the base that they belong to."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mergejax.checkpoints import tagged
from mergejax.compress.packed import Packed
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import MergeError

FORMAT, VERSION = "mergejax.compress", "1"


def fingerprint(base: Tree) -> str:
    """The SHA-256 of a tree's leaf names, shapes, types and bytes, as hexadecimal digits.

    Example:
        >>> fingerprint({'w': np.zeros(2, np.float32)})[:8]
        'b9362c06'
    """
    leaves, _ = leaves_by_name(base, "the base")
    return tagged.digest(leaves)


def _content(arrays: dict[str, Any], header: Mapping[str, str]) -> str:
    told = (header.get(field, "") for field in ("method", "experts", "leaves", "stacks", "base"))
    return tagged.digest(arrays, *told)


def save(path: str | os.PathLike[str], packed: Packed, base: Tree) -> None:
    """Writes packed deltas to a safetensors file, whole or not at all.

    The header says the method with its parameters, the format's version, the leaves, and the
    hashes of the base and of the content.

    Args:
        path: of the file; one that exists is replaced.
        packed: see `mj.compress.encode`.
        base: the model that the deltas belong to.

    Example:
        >>> import mergejax as mj, pathlib, tempfile
        >>> base = {'w': np.zeros(8, np.float32)}
        >>> packed = mj.compress.encode('bit_delta()', [{'w': np.ones(8, np.float32)}])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pathlib.Path(folder) / 'a.safetensors', packed, base)
        ...     mj.compress.size(load(pathlib.Path(folder) / 'a.safetensors', base)).payload
        5
    """
    arrays = {
        f"{leaf}#{part}": np.ascontiguousarray(x)
        for leaf, parts in packed.arrays.items()
        for part, x in parts.items()
    }
    header = {
        "format": FORMAT,
        "version": VERSION,
        "method": packed.method,
        "experts": str(packed.experts),
        "leaves": json.dumps(packed.leaves),
        "stacks": json.dumps(packed.stacks),
        "base": fingerprint(base),
    }
    header["content"] = _content(arrays, header)
    tagged.write(path, arrays, header)


def load(path: str | os.PathLike[str], base: Tree) -> Packed:
    """Reads packed deltas from a file that `save` wrote.

    Args:
        path: of the file.
        base: the model that the deltas belong to.

    Returns:
        Packed deltas.

    Raises:
        MergeError: a file that is missing, damaged, of another kind or version, or that belongs to
            another base.
    """
    otherwise = "holds no packed deltas; they are written by mj.compress.save"
    arrays, header = tagged.read(path, FORMAT, VERSION, otherwise)
    if header.get("content") != _content(arrays, header):
        raise MergeError(f"{path}: is damaged, its content is not what was written; take a copy")
    if header.get("base") != fingerprint(base):
        raise MergeError(
            f"{path}: belongs to another base (SHA-256 {header.get('base', '')[:12]}..., this one "
            f"is {fingerprint(base)[:12]}...); load it with the model that it was saved with"
        )
    named: dict[str, dict[str, Any]] = {}
    for key, x in arrays.items():
        leaf, part = key.rsplit("#", 1)
        named.setdefault(leaf, {})[part] = x
    leaves = tuple((n, tuple(shape), layout) for n, shape, layout in json.loads(header["leaves"]))
    stacks = tuple((name, count) for name, count in json.loads(header["stacks"]))
    return Packed(named, header["method"], int(header["experts"]), leaves, stacks)
