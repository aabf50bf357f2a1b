"""What comes in and goes out: trees become leaves by name, are checked, and become trees again."""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.errors import MergeError, did_you_mean, raise_all, some
from mergejax.leaves import LeafInfo, name_of
from mergejax.units import Units

Tree = Any


def leaves_by_name(tree: Tree, owner: str) -> tuple[dict[str, Any], Callable[[Mapping], Tree]]:
    """A tree's leaves by name, and the function that makes such a tree of them again.

    Raises:
        MergeError: a leaf is no array, or two leaves have one name.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, Units)
    )
    names = [name_of(path) for path, _ in paths]
    problems = [
        f"leaf '{name}' of {owner} is {type(leaf).__name__}, not an array; leave it out of the tree"
        for name, (_, leaf) in zip(names, paths, strict=True)
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype")
    ]
    doubled = sorted(name for name, count in collections.Counter(names).items() if count > 1)
    problems += [f"{owner} has two leaves called {some(doubled)}; rename one"] * bool(doubled)
    if not paths:
        problems.append(f"{owner} has no leaves; pass a tree of arrays, such as model parameters")
    raise_all(problems)
    by_name = dict(zip(names, (leaf for _, leaf in paths), strict=True))
    return by_name, lambda leaves: jax.tree.unflatten(structure, [leaves[n] for n in names])


def check_alike(
    reference: Mapping[str, Any], experts: Sequence[Mapping[str, Any]], owners: Sequence[str]
) -> None:
    """Refuses experts whose leaves, shapes or types differ from the reference's.

    Raises:
        MergeError: with every leaf that differs, and whose it is.
    """
    problems = []
    for owner, expert in zip(owners, experts, strict=True):
        missing = [name for name in reference if name not in expert]
        extra = [name for name in expert if name not in reference]
        problems += [
            f"{owner} has no leaf '{name}', which the other models have; "
            + (did_you_mean(name, extra) if extra else "merge models of one architecture")
            for name in missing
        ]
        problems += [
            f"{owner} has a leaf '{name}' that the other models lack; leave it out of the tree"
            for name in extra
        ]
        for name in reference.keys() & expert.keys():
            wanted, got = reference[name], expert[name]
            if tuple(wanted.shape) != tuple(got.shape):
                problems.append(
                    f"leaf '{name}' of {owner} has shape {tuple(got.shape)}, expected "
                    f"{tuple(wanted.shape)}; merge models of one size"
                )
            elif wanted.dtype != got.dtype:
                problems.append(
                    f"leaf '{name}' of {owner} has dtype {got.dtype}, expected {wanted.dtype}; "
                    "cast it first"
                )
    raise_all(sorted(problems))


def merged_buffer(name: str, values: Sequence[Any], counter: bool) -> Any:
    """An integer, boolean or key leaf: the one that all models share, or a counter of the first.

    Raises:
        MergeError: the models differ and the leaf is no known counter.
    """
    first = values[0]
    random_key = jnp.issubdtype(first.dtype, jax.dtypes.prng_key)
    if counter or random_key or any(isinstance(v, jax.core.Tracer) for v in values):
        return first
    if all(np.array_equal(np.asarray(first), np.asarray(value)) for value in values[1:]):
        return first
    raise MergeError(
        f"leaf '{name}' holds {first.dtype} values that differ between the models and cannot be "
        f"merged; exclude it with exclude='{name}' to keep the base's"
    )


def statistics_by_leaf(
    stats: Mapping[str, Sequence[Tree]], shapes: Mapping[str, tuple[int, ...]], experts: int
) -> dict[str, dict[str, list[Any]]]:
    """Statistics as {leaf name: {statistic: one array per expert}}.

    Raises:
        MergeError: a statistic for another number of experts or for a leaf that does not exist.
    """
    problems = []
    found: dict[str, dict[str, list[Any]]] = {}
    for need, several in stats.items():
        if isinstance(several, Mapping) or len(several) != experts:
            count = "one tree" if isinstance(several, Mapping) else f"{len(several)} trees"
            problems.append(
                f"stats['{need}'] holds {count}, expected a list with one for each of the "
                f"{experts} experts"
            )
            continue
        named = [
            leaves_by_name(tree, f"stats['{need}'][{i}]")[0] if len(tree) else {}
            for i, tree in enumerate(several)
        ]
        for name in dict.fromkeys(name for tree in named for name in tree):
            owners = [i for i, tree in enumerate(named) if name not in tree]
            if name not in shapes:
                hint = did_you_mean(name, shapes)
                problems.append(f"stats['{need}'] has a leaf '{name}' that no model has, {hint}")
            elif owners:
                problems.append(
                    f"stats['{need}'][{owners[0]}] has no leaf '{name}'; collect it too"
                )
            else:
                found.setdefault(name, {})[need] = [tree[name] for tree in named]
    raise_all(problems)
    return found


def shared_by_leaf(
    shared: Mapping[str, Tree], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, Any]]:
    """Statistics that belong to no expert, as {leaf name: {statistic: array}}.

    Raises:
        MergeError: a statistic for a leaf that does not exist.
    """
    found: dict[str, dict[str, Any]] = {}
    problems = []
    for need, tree in shared.items():
        for name, array in leaves_by_name(tree, f"shared['{need}']")[0].items():
            if name not in shapes:
                hint = did_you_mean(name, shapes)
                problems.append(f"shared['{need}'] has a leaf '{name}' that no model has, {hint}")
            found.setdefault(name, {})[need] = array
    raise_all(problems)
    return found


def check_statistics(
    infos: Sequence[LeafInfo], known: Mapping[str, Mapping[str, Any]], values: bool
) -> None:
    """Refuses statistics whose shape does not fit their leaf, and negative Fisher information.

    Args:
        infos: the leaves that are merged.
        known: by leaf name and statistic, one array per expert.
        values: whether values can be looked at; they cannot inside a trace.

    Raises:
        MergeError: with every leaf whose statistic does not fit.
    """
    problems = []
    for info in infos:
        for need, several in known.get(info.name, {}).items():
            wanted = _shape_of(need, info)
            shapes = {_of_one_group(need, info, tuple(x.shape)) for x in several} - {wanted}
            if wanted is not None and shapes:
                problems.append(
                    f"statistic '{need}' of leaf '{info.name}' has shape {shapes.pop()}, expected "
                    f"{wanted}; collect it again with this model"
                )
            elif values and need in ("fisher", "norm_square") and _any_negative(several):
                problems.append(
                    f"statistic '{need}' of leaf '{info.name}' has negative values, but it is a "
                    "mean of squares; collect it again"
                )
    raise_all(problems)


def _shape_of(need: str, info: LeafInfo) -> tuple[int, ...] | None:
    """The shape of a statistic that the library knows, else None."""
    if need in ("fisher", "mask", "norm_square"):
        return info.shape
    axes = info.shape if info.layers is None else info.shape[1:]
    stacked = info.shape[: len(info.shape) - len(axes)]
    if need == "block_fisher":
        return (*stacked, math.prod(axes), math.prod(axes))
    if need == "norm_moments":
        return (*stacked, 2, *axes)
    # Which axes of a kernel a matrix is over, how often, and how many ones are beside them.
    sides = {
        "gram": ("ihwl", 1, 0),
        "output_gram": ("o", 1, 0),
        "affine_gram": ("ihwl", 1, 1),
        "drift": ("ihwl", 2, 1),
    }
    if need in sides and info.layout:
        side, times, ones = sides[need]
        size = math.prod(n for n, axis in zip(axes, info.layout, strict=True) if axis in side)
        return (*stacked, times * size + ones, times * size + ones)
    return None


def _of_one_group(need: str, info: LeafInfo, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the axis of a grouped convolution's groups, each of which has some of its outputs."""
    first = 0 if info.layers is None else 1
    if need not in ("gram", "affine_gram") or len(shape) != first + 3 or "w" not in info.layout:
        return shape
    axes = info.shape[first:]
    outputs = axes[info.layout.index("o")]
    return shape[:first] + shape[first + 1 :] if outputs % shape[first] == 0 else shape


def _any_negative(several: Sequence[Any]) -> bool:
    return any(x.size and bool(jnp.min(x) < 0) for x in several)


def unknown_statistics(given: Sequence[str], known: Sequence[str]) -> list[str]:
    """One sentence for every name that no method knows."""
    return [
        f"no method reads a statistic called '{need}', {did_you_mean(need, known)}"
        for need in given
        if need not in known
    ]
