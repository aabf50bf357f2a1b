"""Sums over the rows that the layers of a model see, whatever is summed."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mergejax.collect.streaming import (
    Function,
    Mask,
    Progress,
    as_function,
    length,
    nnx_parts,
    row_weights,
    running,
    total,
)
from mergejax.collect.taps import tap_linen, tap_nnx
from mergejax.errors import MergeError, raise_all, some
from mergejax.leaves import name_of, unmatched

Sums = dict[str, tuple[Any, Any]]
RowMask = Callable[[str, jax.Array], jax.Array | None]


class Rows(NamedTuple):
    """The rows that a layer sees in one batch.

    Attributes:
        values: float32 [rows, features]; 0 where the weight is.
        weighted: the same times their weights.
        weight: the sum of the weights.
    """

    values: jax.Array
    weighted: jax.Array
    weight: jax.Array


class Measurement(NamedTuple):
    """What is summed, and at which layers.

    Attributes:
        caller: named in errors and in progress.
        kinds: classes of the layers.
        view: (layer, inputs) -> rows [..., features].
        reduce: (layer, `Rows`) -> what is summed.
        refuse: layer -> why it cannot be measured, or None.
        complete: whether a kernel that is not seen is an error.
    """

    caller: str
    kinds: tuple[type, ...]
    view: Callable[[Any, jax.Array], jax.Array]
    reduce: Callable[[Any, Rows], Any]
    refuse: Callable[[Any], str | None] = lambda layer: None
    complete: bool = True


def sums_of_batch(
    measurement: Measurement,
    model: Any,
    params: Any,
    batch: Any,
    weights: Any = None,
    exclude: Sequence[str] = (),
    row_mask: RowMask | None = None,
) -> Sums:
    """{leaf name: (Σ, Σ weights)} of one batch, a pure function of params, batch and weights."""
    make, function, params = _prepared(model, params)
    statistic = make(function.call, measurement, tuple(exclude), row_mask, None)
    return statistic(params, (batch, weights))


def sums(
    measurement: Measurement,
    model: Any,
    params: Any,
    batches: Iterable[Any],
    mask: Mask | None,
    exclude: str | Sequence[str],
    row_mask: RowMask | None = None,
    progress: Progress | None = None,
    budget: int | None = None,
) -> Sums:
    """The sums of all batches, added up on the device, of as many layers as the budget allows."""
    caller = measurement.caller
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    make, function, params = _prepared(model, params)
    raise_all([f"{caller}: {problem}" for problem in unmatched(exclude, list(shapes_of(params)))])
    items = lambda: ((batch, row_weights(mask, batch, caller)) for batch in batches)
    options = (measurement, exclude, row_mask)
    told = progress, caller
    count = length(batches, caller)
    if budget is None:
        return total(make, function, (*options, None), params, items(), count, told)
    if iter(batches) is batches:
        raise MergeError(
            f"{caller}: a budget takes several passes over the batches, but they can be read "
            "once; pass a list"
        )
    found: Sums = {}
    first = make(function.call, *options, None)
    for only in _groups(caller, first, params, next(items(), None), budget):
        part = total(make, function, (*options, only), params, items(), count, told)
        found |= jax.device_get(part)
    return found


def _groups(
    caller: str, statistic: Callable[..., Any], params: Any, item: Any, budget: int
) -> list[frozenset[str] | None]:
    """Leaf names that are summed together, in the order of the calls; None if there is no batch."""
    if item is None:
        return [None]
    with running(caller, "batch 1", item[0]):
        shapes = jax.eval_shape(statistic, params, item)
    sizes = {
        name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(value))
        for name, value in shapes.items()
    }
    largest = max(sizes, key=lambda name: sizes[name])
    if sizes[largest] > budget:
        raise MergeError(
            f"{caller}: the sums of '{largest}' take {sizes[largest]} bytes, more than the budget "
            f"of {budget}; raise it, or leave the layer out with exclude=('{largest}',)"
        )
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        if sum(sizes[other] for other in groups[-1]) + size > budget:
            groups.append([])
        groups[-1].append(name)
    return [frozenset(group) for group in groups]


def _prepared(model: Any, params: Any) -> tuple[Any, Function, Any]:
    if isinstance(model, nnx.Module):
        build, params = nnx_parts(model, params)
        return _nnx_statistic, Function(build, False), params
    return _linen_statistic, *as_function(model, params)


def _linen_statistic(function, *options):
    return lambda params, item: _measured(tap_linen, function, options, params, *item)


def _nnx_statistic(build, *options):
    return lambda params, item: _measured(tap_nnx, build, options, params, *item)


def _measured(tap, function, options, params, batch, weights):
    """{leaf name: (Σ, Σ weights)} of one batch, in the order of the calls."""
    measurement, exclude, row_mask, only = options
    caller = measurement.caller
    problems: list[str] = []

    def measure(layer, name, inputs):
        left_out = only is not None and name not in only
        if left_out or any(re.search(pattern, name) for pattern in exclude):
            return None
        if reason := measurement.refuse(layer):
            problems.append(
                f"{caller}: layer '{name}' {reason}, which one Gram matrix cannot describe; "
                f"leave it out with exclude=('{name}',)"
            )
            return None
        own = None if row_mask is None else row_mask(name, inputs)
        rows = weighted_rows(caller, name, measurement.view(layer, inputs), weights, own)
        return measurement.reduce(layer, rows), rows.weight

    found, _ = tap(function, params, batch, measure, kinds=measurement.kinds)
    if measurement.complete and only is None:
        problems = problems or missing(caller, params, exclude, found)
    raise_all(problems)
    return OrderedDict(found)  # JAX sorts the keys of other dictionaries


def shapes_of(params: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of all leaves, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {name_of(path): jnp.shape(leaf) for path, leaf in leaves}


def weighted_rows(caller: str, name: str, rows: jax.Array, weights: Any, own: Any = None) -> Rows:
    """Rows [..., features] by the weights of the batch and those that are the layer's own."""
    x = rows.astype(jnp.float32)
    shape = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1])
    if weights is None and own is None:
        return Rows(flat, flat, jnp.float32(len(flat)))
    w = jnp.ones(shape, jnp.float32)
    for given in (weights, own):
        w = w if given is None else w * _fitting(caller, name, given, shape)
    w = w.reshape(-1, 1)
    # Where, not a product: padding may hold anything, NaN included.
    flat = jnp.where(w > 0, flat, 0)
    return Rows(flat, flat * w, w.sum())


def _fitting(caller: str, name: str, weights: Any, shape: tuple[int, ...]) -> jax.Array:
    """Weights of rows of some shape, broadcast from its first axes."""
    weights = jnp.asarray(weights, jnp.float32)
    common = min(weights.ndim, len(shape))
    if common == 0 or weights.shape[:common] != shape[:common]:
        raise MergeError(
            f"{caller}: the mask has shape {weights.shape} and the rows of '{name}' have "
            f"{shape}; give weights whose axes are the first axes of the rows"
        )
    # A pooled row stands for an example that counts if any of its tokens does.
    weights = weights.max(axis=tuple(range(common, weights.ndim)))
    return weights.reshape(*weights.shape, *[1] * (len(shape) - common))


def missing(
    caller: str, params: Any, exclude: Sequence[str], found: Mapping[str, Any]
) -> list[str]:
    """What is wrong where kernels were not seen."""
    if not found:
        return [
            f"{caller}: no Dense, DenseGeneral or Conv layer was seen; pass a linen or NNX "
            "model, or a function that calls linen modules and was not compiled by jax.jit before"
        ]
    kernels = [
        name
        for name, shape in shapes_of(params).items()
        if name.split("/")[-1] == "kernel" and len(shape) > 1
    ]
    unseen = [
        name
        for name in kernels
        if name not in found and not any(re.search(pattern, name) for pattern in exclude)
    ]
    if not unseen:
        return []
    return [
        f"{caller}: nothing was seen of {some(unseen)}: the layer was not called, is of a kind "
        "without a Gram matrix, or runs in a function that jax.jit compiled before; call it "
        f"uncompiled, or leave it out with exclude=('{unseen[0]}',)"
    ]
