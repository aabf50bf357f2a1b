"""Statistics in safetensors files, tied to the model that they were collected from."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergejax.checkpoints import tagged
from mergejax.collect.statistics import Statistics
from mergejax.door import Tree, leaves_by_name
from mergejax.errors import MergeError, raise_all

FORMAT, VERSION = "mergejax.statistics", "1"
LAYOUT = "flax_in_out"  # features of matrices in the order of `mergejax.leaves.as_matrix`


def save(
    path: str | os.PathLike[str],
    found: Statistics | Sequence[Statistics],
    params: Tree,
    data: str | Sequence[str] = (),
) -> None:
    """Writes statistics of one model to a safetensors file, whole or not at all.

    The arrays are called 'gram#block/dense/kernel'. The header says the layout of matrices, the
    rows of each mean, the hashes of the model and of the content, and what the data are called.

    Args:
        path: of the file; one that exists is replaced.
        found: what collectors returned, one of each kind.
        params: the model's parameters that they were collected from.
        data: names of the data, such as 'cola/train[:256]'; `add` refuses the same name twice.
            None by default, or those that are known.

    Raises:
        MergeError: two of one kind, what was loaded for another model.

    Example:
        >>> import pathlib, tempfile, mergejax as mj
        >>> params = {'kernel': np.ones((2, 1), np.float32)}
        >>> found = mj.collect.Statistics('gram', {'kernel': np.eye(2)}, {'kernel': 3})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pathlib.Path(folder) / 'a.safetensors', found, params, 'cola')
        ...     again = load(pathlib.Path(folder) / 'a.safetensors', params)['gram']
        >>> again['kernel'].tolist(), float(again.rows['kernel']), again.data
        ([[1.0, 0.0], [0.0, 1.0]], 3.0, ('cola',))
    """
    several = [found] if isinstance(found, Statistics) else list(found)
    names = (data,) if isinstance(data, str) else tuple(data)
    model = fingerprint(params)
    kinds = [one.kind for one in several]
    problems = [
        f"{path}: there are two statistics of kind '{kind}'; add them first, or write two files"
        for kind in sorted(set(kinds))
        if kinds.count(kind) > 1
    ]
    problems += [
        f"{path}: '{one.kind}' was loaded for another model (SHA-256 {one.model[:12]}..., this one "
        f"is {model[:12]}...); save it with its own"
        for one in several
        if one.model not in (None, model) and one.model
    ]
    raise_all(problems)
    arrays = {
        f"{one.kind}#{name}": np.ascontiguousarray(x) for one in several for name, x in one.items()
    }
    rows = {f"{one.kind}#{name}": x.tolist() for one in several for name, x in one.rows.items()}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "layout": LAYOUT,
        "model": model,
        "data": json.dumps({one.kind: names or one.data for one in several}),
        "rows": json.dumps(rows),
    }
    header["content"] = _content(arrays, header)
    tagged.write(path, arrays, header)


def load(path: str | os.PathLike[str], params: Tree | None = None) -> dict[str, Statistics]:
    """Reads statistics from a file that `save` wrote.

    Args:
        path: of the file.
        params: the model that they must be of; None takes those of any model.

    Returns:
        {kind: statistics}, arrays of NumPy.

    Raises:
        MergeError: a file that is missing, damaged, of another kind or version, in another layout,
            or of another model.
    """
    arrays, header = tagged.read(path, FORMAT, VERSION, OTHERWISE)
    raise_all(header_problems(path, header, None if params is None else fingerprint(params)))
    if header.get("content") != _content(arrays, header):
        raise MergeError(f"{path}: is damaged, its content is not what was written; take a copy")
    return by_kind(arrays, header)


OTHERWISE = "holds no statistics; they are written by mj.collect.save"


def fingerprint(params: Tree) -> str:
    """The SHA-256 of a model's leaf names, shapes, types and bytes, as hexadecimal digits."""
    return tagged.digest(leaves_by_name(params, "the model")[0])


def _content(arrays: Mapping[str, Any], header: Mapping[str, str]) -> str:
    return tagged.digest(arrays, *(header.get(field, "") for field in ("model", "data", "rows")))


def header_problems(path: Any, header: Mapping[str, str], model: str | None) -> list[str]:
    """What a header tells against reading the file, for a model of this hash or for any."""
    if header.get("format") != FORMAT:
        return [f"{path}: {OTHERWISE}"]
    problems = []
    if header.get("version") != VERSION:
        problems.append(
            f"{path}: is of version {header.get('version')}, this release reads {VERSION}; take "
            "the release of mergejax that wrote it"
        )
    if header.get("layout") != LAYOUT:
        problems.append(
            f"{path}: its matrices have the layout '{header.get('layout')}', expected '{LAYOUT}'; "
            "collect them again"
        )
    if model is not None and header.get("model") != model:
        problems.append(
            f"{path}: was collected from another model (SHA-256 {header.get('model', '')[:12]}..., "
            f"this one is {model[:12]}...); collect it again from this one"
        )
    return problems


def by_kind(arrays: Mapping[str, Any], header: Mapping[str, str]) -> dict[str, Statistics]:
    """The statistics in a file, by kind."""
    rows, data = json.loads(header["rows"]), json.loads(header["data"])
    found: dict[str, dict[str, Any]] = {kind: {} for kind in data}
    for key, x in arrays.items():
        kind, name = key.split("#", 1)
        found[kind][name] = x
    return {
        kind: Statistics(
            kind, means, {n: rows[f"{kind}#{n}"] for n in means}, tuple(data[kind]), header["model"]
        )
        for kind, means in found.items()
    }
