"""Folders of the Hub and trees of Flax on disk, each seen as the other without being loaded."""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from flax import traverse_util

from mergejax.checkpoints import folder
from mergejax.checkpoints.files import Files, Held, pieces_of
from mergejax.checkpoints.formats import lay_out
from mergejax.checkpoints.rearranged import Piece, Rearranged
from mergejax.checkpoints.safetensors import Tensor
from mergejax.errors import MergeError
from mergejax.models import planning, resnet, transfer

Path = str | os.PathLike


def config_for(model: folder.Model, path: Path | None = None) -> Mapping[str, Any]:
    """The configuration of a model on disk: a file that is named, its own, or a guess by its names.

    Raises:
        MergeError: it has none, and is no residual network.
    """
    if path is not None:
        return folder.read_json(pathlib.Path(path))
    if model.config:
        return model.config
    bare = {name.removeprefix("module."): t.shape for name, t in model.tensors.items()}
    guessed = resnet.guess(bare)
    if guessed is None:
        raise MergeError(f"{model.path} has no config.json; name one with config")
    return guessed


def is_flax(model: folder.Model) -> bool:
    """Whether the names are those of a Flax tree."""
    return any(name.startswith("params/") for name in model.tensors)


def in_flax(
    model: folder.Model,
    config: Mapping[str, Any],
    *,
    ignore: str | Sequence[str] = (),
    padding: str = "error",
    budget: int = 2**28,
) -> tuple[folder.Model, nn.Module, list[str]]:
    """A model of PyTorch on disk as the Flax tree that it becomes; nothing of its values is read.

    Args:
        model: opened.
        config: config.json.
        ignore, padding: as for `from_torch`.
        budget: bytes of a leaf that are made at once when it is read.

    Returns:
        The model with Flax's names and shapes; the module; what was left out or kept, in sentences.

    Raises:
        MergeError: everything that does not fit.
    """
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    how = planning.plan(
        shapes, config, ignore=ignore, padding=padding, owner=str(model.path), same=_same(model)
    )
    tensors = {}
    for leaf, place in how.places.items():
        source = model.tensors[how.given[place.name]]
        if how.rows is not None and source.shape[0] > how.rows == how.model.leaves[leaf][0]:
            source = source._replace(shape=(how.rows, *source.shape[1:]))
        tensors[leaf] = _rearranged([Piece(source, place.axes, place.part, place.parts)], 0, budget)
    return _with(model, tensors), how.model.module, how.said()


def in_torch(
    model: folder.Model, config: Mapping[str, Any], *, budget: int = 2**28
) -> tuple[folder.Model, nn.Module, list[str]]:
    """A Flax tree on disk as the model of PyTorch that it becomes; nothing of its values is read.

    Returns:
        The model with PyTorch's names and shapes; the Flax module; nothing.

    Raises:
        MergeError: everything that does not fit.
    """
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    flax, where = planning.fitting(shapes, config, str(model.path))
    tensors = {}
    for name, parts in transfer.by_torch(where).items():
        pieces = [
            Piece(model.tensors[leaf], tuple(int(i) for i in np.argsort(place.axes)))
            for leaf, place in parts
        ]
        join = parts[0][1].axes[-1] if len(parts) > 1 else 0
        tensors[name] = _rearranged(pieces, join, budget)
    zero = np.zeros((), np.int64)
    for name in transfer.counters(tensors):
        tensors[name] = Tensor(Held(model.path, zero.tobytes()), zero.dtype, (), 0)
    return _with(model, tensors), flax.module, []


def _rearranged(pieces: list[Piece], join: int, budget: int) -> Tensor:
    """The source itself where nothing is moved."""
    piece = pieces[0]
    if len(pieces) == piece.parts == 1 and piece.axes == tuple(sorted(piece.axes)):
        return piece.tensor
    return Rearranged(pieces, join, budget).tensor()


def _with(model: folder.Model, tensors: Mapping[str, Tensor]) -> folder.Model:
    return dataclasses.replace(model, tensors=tensors)


def _same(model: folder.Model) -> Callable[[str, str], bool]:
    """Whether two tensors of a model have the same bytes."""

    def same(a: str, b: str) -> bool:
        one, other = model.tensors[a], model.tensors[b]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        with Files() as files:
            pairs = (pieces_of(t.path, t.offset, t.bytes, files) for t in (one, other))
            return all(x == y for x, y in zip(*pairs, strict=True))

    return same


def load(
    path: Path,
    *,
    config: Path | None = None,
    ignore: str | Sequence[str] = (),
    padding: str = "error",
) -> tuple[nn.Module, dict[str, Any]]:
    """The Flax module and its variables from a folder of the Hub, a file, or a Flax tree on disk.

    Args:
        path: a folder of `transformers` (safetensors or PyTorch's own files, read without PyTorch),
            a bare file, or what `mergejax convert --layout flax` wrote.
        config: of another config.json than the one in the folder. A residual network without one
            is known by its names.
        ignore, padding: as for `from_torch`.

    Returns:
        The module, and variables for `module.apply` of NumPy arrays, every value as it was.

    Raises:
        MergeError: what cannot be read, an unknown architecture, everything that does not fit.

    Example:
        >>> load('no/such/folder')
        Traceback (most recent call last):
        mergejax.errors.MergeError: no/such/folder: there is no such file or folder; check the path
    """
    model = folder.open_model(pathlib.Path(path))
    chosen = config_for(model, config)
    if is_flax(model):
        shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
        module = planning.fitting(shapes, chosen, str(path))[0].module
    else:
        model, module, _ = in_flax(model, chosen, ignore=ignore, padding=padding)
    flat = {}
    with Files() as files:
        for name, tensor in model.tensors.items():
            content = np.empty(tensor.bytes, np.uint8)
            files.read_into(tensor.path, tensor.offset, content.data)
            flat[name] = content.view(tensor.dtype).reshape(tensor.shape)
    return module, traverse_util.unflatten_dict(flat, sep="/")


def save(path: Path, variables: Any, config: Mapping[str, Any]) -> pathlib.Path:
    """Writes a folder that `transformers` loads: model.safetensors and config.json.

    Args:
        path: of the folder; nothing may stand there.
        variables: of the Flax model.
        config: config.json.

    Returns:
        The folder.

    Raises:
        MergeError: something stands there, or the variables are not those of the config's model.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise MergeError(f"{path} exists; choose another folder, or remove it")
    state = transfer.to_torch(variables, config)
    staged = path.with_name(f".{path.name}.new")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        layout = lay_out("safetensors", {n: (x.dtype, x.shape) for n, x in state.items()}, staged)
        with Files(os.O_RDWR | os.O_CREAT) as writer:
            for name, place in layout.placed.items():
                writer.write_from(place.path, place.offset, memoryview(state[name].tobytes()))
            layout.write(writer)
            writer.sync()
        text = json.dumps(dict(config), indent=2, sort_keys=True)
        (staged / folder.CONFIG).write_text(text + "\n", encoding="utf-8")
        staged.rename(path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return path
