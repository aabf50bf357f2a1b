"""What a workdir's checkpoints were trained from, so that other settings never mix with them."""

import json
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from mergejax import errors
from mergejax.data.task import Split, Task

FOLDER = "checkpoints"
FILE = "fingerprint.json"
DETERMINING = ("data", "model", "training", "seed")  # fields of a config
ABSENT = "absent"


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file by renaming, so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.new")
    staged.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(staged, path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads what `write_json` wrote; an empty dictionary if there is no such file.

    Raises:
        MergeError: if the file is no JSON object.
    """
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise errors.MergeError(
            f"{path}: not the JSON that was written there ({error}); "
            "restore the file from a copy, or choose another --workdir"
        ) from error


def _digest(split: Split) -> str:
    checksum = zlib.crc32(np.ascontiguousarray(split.labels).data)
    checksum = zlib.crc32(np.ascontiguousarray(split.inputs).data, checksum)
    return f"{len(split)} examples, {checksum:08x}"


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, ml_collections.ConfigDict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key in value:
        flat |= _flat(f"{name}.{key}", value[key])
    return flat


def fingerprint(
    config: ml_collections.ConfigDict, tasks: Mapping[str, Task] | None = None
) -> dict[str, Any]:
    """Lists what determines the trained models.

    Args:
        config: its `data`, `model`, `training` and `seed` count.
        tasks: if given, numbers and checksums of their examples count too.

    Returns:
        Plain values by dotted name, as JSON gives them back.

    Example:
        >>> config = ml_collections.ConfigDict(
        ...     {"data": {"tasks": ("mirror",)}, "model": {}, "training": {}, "seed": 0})
        >>> fingerprint(config)
        {'data.tasks': ['mirror'], 'seed': 0}
    """
    found: dict[str, Any] = {}
    for name in DETERMINING:
        found |= _flat(name, config[name])
    for task in (tasks or {}).values():
        for part in ("train", "validation", "test"):
            found[f"examples.{task.name}.{part}"] = _digest(getattr(task, part))
    return json.loads(json.dumps(found))


def check(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    tasks: Mapping[str, Task] | None = None,
) -> None:
    """Refuses a workdir whose checkpoints come from other data, models or training.

    Args:
        config: what is wanted now.
        workdir: may be empty or absent; nothing is written to it.
        tasks: if given, their examples are compared too.

    Raises:
        MergeError: names every setting that differs, as stored and as wanted.
    """
    path = pathlib.Path(workdir) / FOLDER / FILE
    stored = read_json(path)
    if not stored:
        return
    wanted = fingerprint(config, tasks)
    names = sorted(set(wanted) | {name for name in stored if not name.startswith("examples.")})
    differences = [
        f"{name}: {stored.get(name, ABSENT)} there, {wanted.get(name, ABSENT)} wanted"
        for name in names
        if stored.get(name, ABSENT) != wanted.get(name, ABSENT)
    ]
    if differences:
        raise errors.MergeError(
            f"{workdir} holds models that were trained otherwise ({'; '.join(differences)}): "
            "choose another --workdir, or take the former settings back"
        )


def claim(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, tasks: Mapping[str, Task]
) -> None:
    """Checks a workdir and notes in it what its checkpoints will come from.

    Args:
        config: what is wanted now.
        workdir: may be empty or absent.
        tasks: what the models are trained on.

    Raises:
        MergeError: as `check`.
    """
    check(config, workdir, tasks)
    write_json(pathlib.Path(workdir) / FOLDER / FILE, fingerprint(config, tasks))
