"""What a leaf is: its name, role, place in the network and the meaning of its axes."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mergejax.chains import ROLES
from mergejax.errors import MergeError, did_you_mean, raise_all

STATISTIC = "statistic"  # running statistics of BatchNorm: averaged whatever the method
BUFFER = "buffer"  # integers, booleans, random keys, leaves without elements: copied
HEAD = "head"  # declared by the user: neither merged nor counted
ALL_ROLES = ROLES | {STATISTIC, BUFFER, HEAD}
LAYOUTS = frozenset({"io", "oi", "ioo", "iio", "hwio", "oihw", "lio", "oil", ""})

_EMBEDDING = re.compile(
    r"embed|wte|wpe|token_type|position|pos_|relative_attention_bias|shared\.weight"
)
_COUNTERS = re.compile(r"num_batches_tracked$|(^|[/.])(count|step|position_ids)$")
_EARLY = re.compile(r"embed|patch|stem|wte|wpe|cls|class_token|pos_|^conv1|pre_?norm|input")


@dataclasses.dataclass(frozen=True)
class LeafInfo:
    """What is known about a leaf before any of its values is read.

    Attributes:
        name: 'a/b/kernel'.
        shape, dtype: of the base, or of the first expert where there is no base.
        role: see `describe`.
        layout: meaning of the axes, i = in, o = out, h and w = kernel size, l = length.
        depth: position in the network, 0 to 1.
        block: index of the numbered block, -1 outside the blocks.
        layers: number of layers stacked along the first axis (scanned), or None.
        stats: names of the statistics that are known for the leaf.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    role: str
    layout: str
    depth: float
    block: int
    layers: int | None = None
    stats: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def name_of(path: Sequence[Any]) -> str:
    """Joins a JAX key path with '/'; the trailing '.value' of NNX variables is left out.

    Example:
        >>> name_of(jax.tree_util.tree_flatten_with_path({'a': [1.0]})[0][0][0])
        'a/0'
    """
    parts = []
    for key in path:
        for attribute in ("key", "idx", "name"):
            if hasattr(key, attribute):
                parts.append(str(getattr(key, attribute)))
                break
    if parts and parts[-1] == "value" and len(parts) > 1:
        parts.pop()
    return "/".join(parts)


def is_counter(name: str) -> bool:
    """Whether an integer leaf is a known counter or index table, of which the base's is kept."""
    return bool(_COUNTERS.search(name))


def is_floating(dtype: Any) -> bool:
    return not jax.dtypes.issubdtype(dtype, jax.dtypes.extended) and jnp.issubdtype(
        dtype, jnp.floating
    )


def role_of(name: str, shape: tuple[int, ...], dtype: Any) -> str:
    """The role of a leaf by its name, shape and type.

    Example:
        >>> role_of('block_0/dense/kernel', (8, 8), jnp.float32)
        'kernel'
    """
    last = re.split(r"[/.]", name)[-1]
    if not is_floating(dtype) or 0 in shape:
        return BUFFER
    if "batch_stats" in name or last in ("running_mean", "running_var"):
        return STATISTIC
    if "bias" in last or last in ("b", "beta"):
        return "embedding" if _EMBEDDING.search(name) and len(shape) > 1 else "bias"
    if len(shape) < 2:
        return "norm" if last in ("scale", "weight", "gamma", "g") else "vector"
    if _EMBEDDING.search(name) and "kernel" not in last and "patch" not in name:
        return "embedding"
    if len(shape) == 4 or ("conv" in name.lower() and len(shape) > 2):
        return "convolution"
    if len(shape) == 2 or last in ("kernel", "weight"):
        return "kernel"
    return "other"


def layout_of(name: str, shape: tuple[int, ...], role: str, style: str) -> str:
    """The meaning of a leaf's axes, for kernels and convolutions.

    Example:
        >>> layout_of('attention/query/kernel', (8, 2, 4), 'kernel', 'flax')
        'ioo'
    """
    flax = style == "flax"
    if role == "convolution":
        by_rank = {4: "hwio" if flax else "oihw", 3: "lio" if flax else "oil"}
        return by_rank.get(len(shape), "")
    if role == "kernel" and len(shape) == 2:
        return "io" if flax else "oi"
    if role == "kernel" and len(shape) == 3 and flax:
        return "iio" if re.search(r"(^|/)out/kernel$", name) else "ioo"
    return ""


def as_matrix(x: jax.Array, layout: str) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """The canonical [in, out] view of a kernel, and the way back.

    Convolutions become [in * height * width, out] with the channel first, the order of
    `jax.lax.conv_general_dilated_patches`.

    Args:
        x: a kernel or convolution in the given layout.
        layout: one of 'io', 'oi', 'ioo', 'iio', 'hwio', 'oihw', 'lio', 'oil'.

    Returns:
        The matrix, and a function that takes a matrix of that shape back to the layout.

    Example:
        >>> matrix, restore = as_matrix(jnp.ones((3, 3, 2, 5)), 'hwio')
        >>> matrix.shape, restore(matrix).shape
        ((18, 5), (3, 3, 2, 5))
    """
    if layout not in LAYOUTS - {""} or len(layout) != x.ndim:
        raise MergeError(
            f"an array of shape {x.shape} has no matrix view in layout '{layout}'; "
            "name its layout by pattern, for instance layouts={'out_proj': 'io'}"
        )
    inputs = [axis for axis, letter in enumerate(layout) if letter == "i"]
    window = [axis for axis, letter in enumerate(layout) if letter in "hwl"]
    outputs = [axis for axis, letter in enumerate(layout) if letter == "o"]
    order = inputs + window + outputs
    moved = jnp.transpose(x, order)
    rows = 1
    for axis in range(len(inputs + window)):
        rows *= moved.shape[axis]
    inverse = [order.index(axis) for axis in range(x.ndim)]
    return moved.reshape(rows, -1), lambda matrix: matrix.reshape(moved.shape).transpose(inverse)


def as_rows(x: jax.Array, layout: str) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """The view in which each row holds what leads to one output, and the way back.

    Kernels and convolutions become [out, in * height * width]; an array without a layout is taken
    by its last axis, a vector as one row.

    Args:
        x: a leaf in the given layout.
        layout: as for `as_matrix`, or '' where nobody knows the axes.

    Returns:
        The rows, and a function that takes rows of that shape back to the layout.

    Example:
        >>> as_rows(jnp.ones((3, 5)), 'io')[0].shape, as_rows(jnp.ones((3, 5)), '')[0].shape
        ((5, 3), (3, 5))
    """
    if not layout:
        return x.reshape(-1, x.shape[-1] if x.ndim else 1), lambda rows: rows.reshape(x.shape)
    matrix, restore = as_matrix(x, layout)
    return matrix.T, lambda rows: restore(rows.T)


def row_length(info: LeafInfo) -> int:
    """The number of elements in each row of `as_rows`.

    Example:
        >>> row_length(LeafInfo('a/kernel', (3, 5), jnp.float32, 'kernel', 'io', 0.0, -1))
        3
    """
    if not info.layout:
        return info.shape[-1] if info.shape else 1
    lengths = (n for n, letter in zip(info.shape, info.layout, strict=True) if letter != "o")
    return math.prod(lengths)


def _numbered(name: str) -> list[tuple[str, int]]:
    """(list, index) for every numbered part of a name: 'layers.0', 'block_0', 'layer1'."""
    parts = re.split(r"[/.]", name)
    found = []
    for position, part in enumerate(parts):
        match = re.fullmatch(r"(.*?)_?(\d+)", part)
        if match:
            prefix = "/".join([*parts[:position], match[1]])
            found.append((prefix, int(match[2])))
    return found


def blocks_of(names: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Block index and depth of each leaf; blocks are the outermost numbered list with two members.

    Returns:
        For each name (index, depth in [0, 1]); the index is -1 outside the blocks, where the
        depth is 0 for leaves that come early by their name (embeddings, stem) and 1 for others.

    Example:
        >>> blocks_of(['embed', 'block_0/w', 'block_1/w', 'head'])['block_1/w']
        (1, 1.0)
    """
    members: dict[str, set[int]] = {}
    numbered = {name: _numbered(name) for name in names}
    for found in numbered.values():
        for prefix, index in found:
            members.setdefault(prefix, set()).add(index)
    places = {}
    for name in names:
        places[name] = (-1, 0.0 if _EARLY.search(name) else 1.0)
        for prefix, index in numbered[name]:
            indices = sorted(members[prefix])
            if len(indices) > 1:
                rank = indices.index(index)
                places[name] = (rank, rank / (len(indices) - 1))
                break
    return places


def describe(
    specs: Mapping[str, tuple[tuple[int, ...], Any]],
    *,
    style: str = "flax",
    roles: Mapping[str, str] | None = None,
    layouts: Mapping[str, str] | None = None,
    exclude: str | Sequence[str] = (),
    scanned: str | None = None,
) -> list[LeafInfo]:
    """Describes leaves by name, shape and type; every entry can be overridden by pattern.

    Args:
        specs: shape and dtype by leaf name.
        style: 'flax' ([in, out], HWIO) or 'torch' ([out, in], OIHW).
        roles: regular expressions on names and the role to take instead.
        layouts: regular expressions on names and the layout to take instead.
        exclude: regular expressions of leaves that are neither merged nor counted.
        scanned: regular expression of leaves whose first axis stacks layers.

    Returns:
        One `LeafInfo` a leaf, in the order of `specs`.

    Raises:
        MergeError: an unknown style, role or layout, or a pattern that matches no leaf.
    """
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    given = {**dict.fromkeys(exclude, HEAD), **(roles or {})}
    layouts = layouts or {}
    problems = [
        f"{label}: '{value}' is unknown, {did_you_mean(value, known)}"
        for label, values, known in (
            ("layout", [style], {"flax", "torch"}),
            ("roles", list((roles or {}).values()), ALL_ROLES),
            ("layouts", list(layouts.values()), LAYOUTS),
        )
        for value in values
        if value not in known
    ]
    patterns = [*given, *layouts, *([scanned] if scanned else [])]
    problems += unmatched(patterns, list(specs))
    raise_all(problems)
    places = blocks_of(list(specs))
    infos = []
    for name, (shape, dtype) in specs.items():
        layers = shape[0] if scanned and shape and re.search(scanned, name) else None
        single = shape if layers is None else shape[1:]
        told = _first(given, name)
        role = told or role_of(name, single, dtype)
        layout = _first(layouts, name) or layout_of(name, single, role, style)
        if role == "kernel" and not told and not layout:
            role = "other"  # nobody knows which of its axes go in and which come out
        block, depth = places[name]
        infos.append(LeafInfo(name, shape, dtype, role, layout, depth, block, layers))
    return infos


def _first(patterns: Mapping[str, str], name: str) -> str | None:
    return next((v for pattern, v in patterns.items() if re.search(pattern, name)), None)


def unmatched(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """One sentence for every pattern that is broken or matches no name."""
    problems = []
    for pattern in patterns:
        try:
            hits = any(re.search(pattern, name) for name in names)
        except re.error as error:
            problems.append(f"'{pattern}' is not a regular expression ({error})")
            continue
        if not hits:
            near = did_you_mean(pattern, names) if len(names) < 200 else "check its spelling"
            problems.append(f"pattern '{pattern}' matches no leaf, {near}")
    return problems
