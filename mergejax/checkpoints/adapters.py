"""PEFT's LoRA folders as experts: the base with the exact product added, piece by piece."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mergejax.checkpoints import safetensors
from mergejax.checkpoints.files import Files
from mergejax.checkpoints.folder import ADAPTER, Model, read_file, read_json
from mergejax.checkpoints.safetensors import Product, Tensor
from mergejax.errors import MergeError, did_you_mean, raise_all

_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def is_adapter(path: pathlib.Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (path / ADAPTER).is_file()


def open_adapter(path: pathlib.Path, name: str, base: Model | None) -> Model:
    """The model that a base and its adapter make.

    Args:
        path: a folder with adapter_config.json and the factors.
        name: what to call the model.
        base: the model that the adapter was trained on.

    Returns:
        The base's tensors, those that the adapter changes with its product; values are read as
        float32, the product is taken in float64 and rounded once.

    Raises:
        MergeError: what plain LoRA of linear layers does not have, each by its name; layers that
            the base lacks, or that have another size there.
    """
    from mergejax.lowrank.peft import from_peft

    if base is None:
        raise MergeError(f"{path} is an adapter and needs a base; name it with --base")
    file = next((path / name for name in _FILES if (path / name).is_file()), None)
    if file is None:
        raise MergeError(f"{path} has no {_FILES[0]}; download it")
    config = read_json(path / ADAPTER)
    try:
        factors = from_peft(_values(read_file(file)), config)
    except MergeError as error:
        raise MergeError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    straight = bool(config.get("fan_in_fan_out"))
    tensors, problems = dict(base.tensors), []
    for leaf, own in factors.items():
        down, up = (np.asarray(x, np.float64) for x in (own.down, own.up))
        left, right = (down, up) if straight else (up.T, down.T)
        shape = (left.shape[0], right.shape[1])
        known = tensors.get(leaf)
        if known is None:
            near = did_you_mean(leaf, tensors)
            problems.append(f"{path} changes '{leaf}', which the base lacks, {near}")
        elif known.shape != shape:
            problems.append(
                f"{path} changes '{leaf}' by a matrix of shape {list(shape)}, but the base's has "
                f"{list(known.shape)}; take the base that it was trained on"
            )
        else:
            tensors[leaf] = known._replace(product=Product(file, left * own.scale, right))
    raise_all(problems)
    return Model(name, path, tensors)


def _values(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    found = {}
    with Files() as files:
        for name, tensor in tensors.items():
            content = bytearray(tensor.bytes)
            files.read_into(tensor.path, tensor.offset, memoryview(content))
            found[name] = np.frombuffer(content, tensor.dtype).reshape(tensor.shape)
    return {
        name: x.astype(np.float32) if safetensors.CODES[x.dtype] != "F32" else x
        for name, x in found.items()
    }
