"""Saves and restores parameter trees with Orbax: a checkpoint is there whole or not at all."""

import json
import pathlib
import shutil
import zlib
from typing import Any

import jax
import numpy as np
from orbax import checkpoint

from mergejax import errors

Tree = Any
CHECKSUMS = "checksums.json"  # of the other files; Orbax alone would not notice a flipped bit


def _checksums(folder: pathlib.Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {path.relative_to(folder).as_posix(): zlib.crc32(path.read_bytes()) for path in files}


def _damage(folder: pathlib.Path) -> str:
    """Names the files that are not as they were saved; '' if all are, or nobody noted checksums."""
    if not (folder / CHECKSUMS).is_file():
        return ""
    try:
        noted = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except ValueError:
        return f"file {CHECKSUMS}"
    found = _checksums(folder)
    changed = [name for name in noted if found.get(name) != noted[name]]
    return f"file {errors.some(changed)}" if changed else ""


def save(path: str | pathlib.Path, tree: Tree) -> None:
    """Writes a tree of arrays, in place of what was saved there before.

    The tree is staged beside `path` and moved there by renaming, so that an interruption at any
    moment leaves either no checkpoint, the former or the new one.

    Args:
        path: folder that will hold the checkpoint; its parents are made.
        tree: nested dictionaries of arrays, any shapes and dtypes.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp() + "/model"
        >>> save(folder, {"block_0": {"kernel": np.ones([2, 3])}})
        >>> restore(folder)["block_0"]["kernel"].shape
        (2, 3)
    """
    path = pathlib.Path(path).absolute()
    staged, former = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in (former, *path.parent.glob(f"{staged.name}*")):
        shutil.rmtree(left_over, ignore_errors=True)
    with checkpoint.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(staged, tree)
    noted = json.dumps(_checksums(staged), indent=1)
    (staged / CHECKSUMS).write_text(noted, encoding="utf-8")
    if path.exists():
        path.rename(former)
    staged.rename(path)
    shutil.rmtree(former, ignore_errors=True)


def is_saved(path: str | pathlib.Path) -> bool:
    """Tells whether a whole checkpoint lies at `path`.

    Example:
        >>> is_saved("no/such/folder")
        False
    """
    return pathlib.Path(path).is_dir()


def restore(path: str | pathlib.Path) -> Tree:
    """Reads a tree of arrays back.

    Args:
        path: folder of a checkpoint.

    Returns:
        Nested dictionaries of NumPy arrays, shapes and dtypes as saved.

    Raises:
        MergeError: if no checkpoint lies there, or it cannot be read.

    Example:
        >>> restore("no/such/folder")
        Traceback (most recent call last):
        mergejax.errors.MergeError: no/such/folder: there is no checkpoint; check the path
    """
    if not is_saved(path):
        raise errors.MergeError(f"{path}: there is no checkpoint; check the path")
    damage, cause = _damage(pathlib.Path(path)), None
    try:
        if not damage:
            return _read(pathlib.Path(path).absolute())
    except Exception as error:  # Orbax lets through what its many readers raise
        damage, cause = (str(error).strip() or type(error).__name__).splitlines()[0][:200], error
    raise errors.MergeError(
        f"{path}: the checkpoint is damaged ({damage}); "
        "restore the folder from a copy, or delete it to have it made again"
    ) from cause


def _read(path: pathlib.Path) -> Tree:
    with checkpoint.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree
        as_numpy = checkpoint.RestoreArgs(restore_type=np.ndarray)
        arguments = jax.tree.map(lambda _: as_numpy, saved)
        return checkpointer.restore(path, restore_args=arguments)
