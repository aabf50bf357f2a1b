"""The heads of attention layers, read from a tree and written back."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mergejax.door import leaves_by_name
from mergejax.errors import MergeError, raise_all, some

Tree = Any
PARTS = ("query", "key", "value", "out")


@dataclasses.dataclass(frozen=True)
class Attention:
    """Where one attention layer lies in a tree, and how its heads are arranged.

    Attributes:
        name: of the layer, such as 'block_0/attention'; it has `query`, `key`, `value` and `out`
            with kernels [width, heads * size] or [width, heads, size], and `out` the other way.
        heads: of the queries.
        groups: heads of keys and values.
        rotary: whether positions turn dimension i of queries and keys with dimension i + size/2.
    """

    name: str
    heads: int
    groups: int
    rotary: bool = False


def attentions(
    params: Tree, heads: int, groups: int | None = None, rotary: bool = False
) -> list[Attention]:
    """Finds the attention layers of a Flax model by the names of their parts.

    Args:
        params: a tree with kernels of `query`, `key`, `value` and `out` side by side.
        heads: of the queries.
        groups: heads of keys and values; by default as many.
        rotary: see `Attention`.

    Raises:
        MergeError: there is no such layer.

    Example:
        >>> kernel = {'kernel': np.zeros((4, 4))}
        >>> [a.name for a in attentions({'mix': dict.fromkeys(PARTS, kernel)}, heads=2)]
        ['mix']
    """
    names, _ = leaves_by_name(params, "params")
    found = [
        Attention(name.removesuffix("/query/kernel"), heads, groups or heads, rotary)
        for name in names
        if name.endswith("/query/kernel")
        and all(f"{name.removesuffix('query/kernel')}{part}/kernel" in names for part in PARTS)
    ]
    if not found:
        raise MergeError(
            "no layer has kernels of 'query', 'key', 'value' and 'out' side by side; give the "
            f"layers of these names as Attention(...): {some(list(names))}"
        )
    return found


@dataclasses.dataclass
class Heads:
    """One layer in float64, biases as the last row: per group the heads' matrices.

    Attributes:
        query: [groups, heads per group, width + 1, size].
        key, value: [groups, width + 1, size].
        out: [groups, heads per group, size, width].
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    out: np.ndarray


def read(leaves: Mapping[str, Any], layer: Attention) -> Heads:
    """The heads of one layer."""

    def rows(part: str, count: int) -> np.ndarray:
        kernel = np.asarray(leaves[f"{layer.name}/{part}/kernel"], np.float64)
        matrix = kernel.reshape(kernel.shape[0], -1)
        bias = leaves.get(f"{layer.name}/{part}/bias", np.zeros(matrix.shape[1]))
        both = np.concatenate([matrix, np.asarray(bias, np.float64).reshape(1, -1)])
        return both.reshape(len(both), count, -1).swapaxes(0, 1)

    query = rows("query", layer.heads)
    width = np.shape(leaves[f"{layer.name}/out/kernel"])[-1]
    out = np.asarray(leaves[f"{layer.name}/out/kernel"], np.float64).reshape(-1, width)
    return Heads(
        query.reshape(layer.groups, -1, *query.shape[1:]),
        rows("key", layer.groups),
        rows("value", layer.groups),
        out.reshape(layer.groups, layer.heads // layer.groups, -1, width),
    )


def write(leaves: dict[str, Any], layer: Attention, heads: Heads) -> None:
    """Puts the heads of one layer back among the leaves, in the leaves' own types."""
    for part in PARTS:
        name = f"{layer.name}/{part}"
        kernel, bias = leaves[f"{name}/kernel"], leaves.get(f"{name}/bias")
        x = getattr(heads, part)
        if part == "out":  # its bias belongs to no head
            matrix = x
        else:
            rows = x.reshape(-1, *x.shape[-2:]).swapaxes(0, 1)
            matrix = rows[:-1]
            if bias is not None:
                leaves[f"{name}/bias"] = _like(bias, rows[-1])
        leaves[f"{name}/kernel"] = _like(kernel, matrix)


def _like(leaf: Any, values: np.ndarray) -> np.ndarray:
    return values.reshape(np.shape(leaf)).astype(leaf.dtype)


def checked(
    tree: Tree, layers: Sequence[Attention], owner: str
) -> tuple[dict[str, Any], Callable[[Any], Tree]]:
    """The leaves by name and what makes a tree of them, after a look at the layers."""
    found, rebuild = leaves_by_name(tree, owner)
    leaves, problems = dict(found), []
    for layer in layers:
        missing = [p for p in PARTS if f"{layer.name}/{p}/kernel" not in leaves]
        if missing:
            problems.append(
                f"{owner}: layer '{layer.name}' has no kernel of {some(missing)}; name another"
            )
            continue
        kernel = leaves[f"{layer.name}/query/kernel"]
        columns = np.size(kernel) // len(kernel)
        if columns % layer.heads or layer.heads % layer.groups:
            problems.append(
                f"{owner}: layer '{layer.name}' has {columns} columns of queries, which are not "
                f"{layer.heads} heads in {layer.groups} groups"
            )
    raise_all(problems)
    return leaves, rebuild
