"""PEFT's LoRA folders as experts: the base with the exact product added, piece by piece."""

import pathlib
import re
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from mergejax.checkpoints import safetensors
from mergejax.checkpoints.files import Files, ranges
from mergejax.checkpoints.folder import ADAPTER, Model, read_file, read_json
from mergejax.checkpoints.safetensors import Product, Tensor
from mergejax.checkpoints.vocabulary import EMBEDDING, LEAF
from mergejax.errors import MergeError, did_you_mean, raise_all, some

# Names of what adapters of any kind hold beside whole tensors.
_FACTOR = re.compile(r"\.(lora_|trainable_tokens|vera_|oft_|ia3_)")
_MAGNITUDE = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_magnitude_vector(?:\.weight)?")
_INNER = re.compile(r"(?<=\.)(base_layer\.|modules_to_save\.(default\.)?)")
_BLOCK = 2**18  # elements of a matrix that are looked at together
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
        The base's tensors; those that the adapter changes with its product, of DoRA with its
        magnitudes too; biases and modules that the adapter saves whole are the adapter's own.
        Values are read as float32, the product is taken in float64 and rounded once.

    Raises:
        MergeError: what LoRA and DoRA of linear layers do not have, each by its name; layers that
            the base lacks, or that have another size there.
    """
    if base is None:
        raise MergeError(f"{path} is an adapter and needs a base; name it with --base")
    file = next((path / name for name in _FILES if (path / name).is_file()), None)
    if file is None:
        raise MergeError(f"{path} has no {_FILES[0]}; download it")
    config = read_json(path / ADAPTER)
    try:
        tensors = _changed(file, config, base)
    except MergeError as error:
        raise MergeError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return Model(name, path, tensors)


def _changed(file: pathlib.Path, config: Mapping[str, Any], base: Model) -> dict[str, Tensor]:
    """The base's tensors with what the adapter's file makes of them."""
    from mergejax.lowrank.peft import from_peft

    stored, dora = read_file(file), bool(config.get("use_dora"))
    whole = {key: t for key, t in stored.items() if not _FACTOR.search(key)}
    sizes = {m[1]: t for key, t in stored.items() if dora and (m := _MAGNITUDE.fullmatch(key))}
    rest = {k: t for k, t in stored.items() if k not in whole and t not in sizes.values()}
    plain = {**config, "use_dora": False}
    if config.get("bias") in ("all", "lora_only"):
        plain["bias"] = "none"
    factors, magnitudes = from_peft(_values(rest), plain), _values(sizes)
    tensors, problems = dict(base.tensors) | _saved(whole, config, base), []
    straight = bool(config.get("fan_in_fan_out"))
    for leaf, own in factors.items():
        down, up = (np.asarray(x, np.float64) for x in (own.down, own.up))
        left, right = (down, up) if straight else (up.T, down.T)
        shape = (left.shape[0], right.shape[1])
        known, size = tensors.get(leaf), magnitudes.pop(leaf.removesuffix(".weight"), None)
        if known is None:
            near = did_you_mean(leaf, tensors)
            problems.append(f"it changes '{leaf}', which the base lacks, {near}")
        elif known.shape != shape:
            problems.append(
                f"it changes '{leaf}' by a matrix of shape {list(shape)}, but the base's has "
                f"{list(known.shape)}; take the base that it was trained on"
            )
        elif dora and (size is None or size.size != shape[straight]):
            problems.append(f"it has no magnitudes of '{leaf}'; download it whole")
        else:
            product = Product(file, left * own.scale, right)
            if dora:
                product = product._replace(factors=_Factors(known, product, size, straight))
            tensors[leaf] = known._replace(product=product)
    if magnitudes:
        problems.append(f"it has magnitudes of {some(list(magnitudes))} without factors")
    raise_all(problems)
    return tensors


def _saved(whole: Mapping[str, Tensor], config: Mapping[str, Any], base: Model) -> dict[str, Any]:
    """The tensors that the adapter holds whole, by the base's names."""
    found, problems = {}, []
    apart = set(config.get("modules_to_save") or ())
    for key, tensor in whole.items():
        name = _INNER.sub("", key.removeprefix("base_model.model."))
        parts = name.split(".")[:-1]
        alone = config.get("bias") in (None, "none") and apart.isdisjoint(parts)
        if alone and name.endswith(".bias"):
            problems.append(f"'{key}' is a bias, but the configuration has bias='none'")
        elif name not in base.tensors:
            near = did_you_mean(name, base.tensors)
            problems.append(f"it saves '{name}', which the base lacks, {near}")
        elif not apart.isdisjoint(parts) and _is_shared(name, base, config):
            problems.append(
                f"it saves '{name}' apart from the output layer that shares it in the base; store "
                "the base with tie_word_embeddings=false"
            )
        else:
            found[name] = tensor
    raise_all(problems)
    return found


def _is_shared(name: str, base: Model, config: Mapping[str, Any]) -> bool:
    """Whether an embedding of the base is its output layer too."""
    if not EMBEDDING.search(name) or config.get("ensure_weight_tying"):
        return False
    tied = base.config.get("tie_word_embeddings", True)
    return bool(tied) and sum(bool(LEAF.search(other)) for other in base.tensors) == 1


class _Factors:
    r"""DoRA's factors, :math:`m_j/\lVert W_j+\Delta W_j\rVert`, taken when they are first needed.

    Args:
        tensor: the base's matrix W.
        product: the adapter's, without factors.
        magnitudes: m, one for each output.
        straight: whether the matrix is stored [in, out], so that outputs are columns.
    """

    def __init__(self, tensor: Tensor, product: Product, magnitudes: np.ndarray, straight: bool):
        self._tensor, self._product = tensor, product
        self._magnitudes, self._straight = magnitudes.astype(np.float64), straight
        self._lock, self._known = threading.Lock(), np.zeros((0, 0))

    def __call__(self) -> np.ndarray:
        with self._lock:
            if not self._known.size:
                self._known = self._measure()
            return self._known

    def _measure(self) -> np.ndarray:
        rows, columns = self._tensor.shape
        size = self._tensor.dtype.itemsize
        squares = np.zeros((1, columns) if self._straight else (rows, 1))
        with Files() as files:
            for first, last in ranges(0, rows, max(1, _BLOCK // columns)):
                content = bytearray((last - first) * columns * size)
                place = self._tensor.offset + first * columns * size
                files.read_into(self._tensor.path, place, memoryview(content))
                stored = np.frombuffer(content, self._tensor.dtype).reshape(-1, columns)
                product = self._product.left[first:last] @ self._product.right
                whole = np.square(stored.astype(np.float64) + product)
                if self._straight:
                    squares += whole.sum(0, keepdims=True)
                else:
                    squares[first:last] = whole.sum(1, keepdims=True)
        return self._magnitudes.reshape(squares.shape) / np.sqrt(squares)


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
