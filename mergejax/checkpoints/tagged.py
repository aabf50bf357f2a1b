"""Safetensors files of a format of this library, written whole and read with their version."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mergejax.errors import MergeError


def digest(arrays: Mapping[str, Any], *texts: str) -> str:
    """The SHA-256 of arrays with their names, shapes and types, and of texts, as digits.

    Arrays are asked for one by one, so a mapping may read them.
    """
    found = hashlib.sha256(json.dumps(texts).encode())
    for name in sorted(arrays):
        x = np.ascontiguousarray(arrays[name])
        found.update(json.dumps([name, list(x.shape), str(x.dtype)]).encode())
        found.update(x.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def write(path: str | os.PathLike[str], arrays: dict[str, Any], header: dict[str, str]) -> None:
    """Writes a file whole or not at all; one that exists is replaced.

    Args:
        path: of the file.
        arrays: C-contiguous arrays by name.
        header: the metadata, with its 'format' and 'version'.
    """
    path = pathlib.Path(path)
    staged = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        safetensors.numpy.save_file(arrays, staged, metadata=header)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def read(
    path: str | os.PathLike[str], form: str, version: str, otherwise: str
) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Reads a file that `write` wrote.

    Args:
        path: of the file.
        form: the format that is expected.
        version: the version that is expected.
        otherwise: what a file of another format is not, and what writes such files.

    Returns:
        Arrays by name; the header.

    Raises:
        MergeError: a file that is missing, damaged, or of another format or version.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise MergeError(
            f"{path}: cannot be read ({error}); it is missing or damaged, take a copy"
        ) from None
    if header.get("format") != form:
        raise MergeError(f"{path}: {otherwise}")
    if header.get("version") != version:
        raise MergeError(
            f"{path}: is of version {header.get('version')}, this release reads {version}; take "
            "the release of mergejax that wrote it"
        )
    return arrays, header
