"""Gram matrices of the inputs of a model's layers."""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mergejax.collect.rows import input_rows, refusal
from mergejax.collect.streaming import (
    Function,
    Mask,
    Progress,
    as_function,
    length,
    nnx_parts,
    row_weights,
    total,
)
from mergejax.collect.taps import tap_linen, tap_nnx
from mergejax.errors import MergeError, raise_all, some
from mergejax.leaves import name_of, unmatched

_LEAKS = (
    jax.errors.UnexpectedTracerError,
    flax.errors.JaxTransformError,
    flax.errors.TraceContextError,
)


def gram(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    mask: Mask | None = None,
    exclude: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Mean Gram matrix of the inputs of every layer with a kernel, without changing the model.

    For a layer y = x W + b, G = Σ_r w_r x_rᵀ x_r / Σ_r w_r over all rows r (tokens, pixels) of all
    batches, w_r = 1 without a mask; x_r is a row of the canonical view in which the kernel is a
    matrix [in, out]: the contracted axes of DenseGeneral flattened in order, the patches of a
    convolution with the channel first (`mergejax.leaves.as_matrix`). The sums are float32 at the
    highest matmul precision. A layer that is called several times sums over its calls; stacked
    layers (nn.scan with variable_axes {'intermediates': 0}, nnx.scan) give [layers, in, in].

    Tapped are Dense, DenseGeneral and Conv of linen, Linear, LinearGeneral and Conv of NNX, so
    also the projections of attention. The model runs as it is called: call linen models with
    dropout off and running statistics in use (an NNX model is switched to evaluation).

    Args:
        model: a function (params, batch) that calls linen modules by `Module.apply`, outside
            other JAX transforms; its output is not used. Or a linen or NNX model that is called on
            the batch. Linen models and functions under `jax.jit` are compiled once for all
            experts, other functions once a call, as they may depend on what has changed since.
        params: the expert's parameters, a tree of arrays; for an NNX model its `nnx.Param` state,
            or None for the model's own. Kernels are named by their place in this tree.
        batches: any iterable of batches, the same shapes throughout except for the last one (each
            new shape compiles once more).
        mask: batch -> weights of the rows, 0 for padding: [examples], or [examples, tokens, ...]
            for layers whose rows have these axes; layers that see fewer axes (pooled ones) take
            the largest weight over the missing ones.
        exclude: regular expressions (`re.search` on leaf names) of kernels to leave out.
        progress: called as progress(done, total, 'gram') after each batch; total is 0 where
            `batches` has no length.

    Returns:
        {leaf name of the kernel ('block/dense/kernel'): G [in, in] float32, symmetric}.

    Raises:
        MergeError: no batch; a layer with an input that is not finite; a kernel that got no Gram
            matrix and is not excluded (its layer was not called or is of another kind); a mask
            that does not fit; a grouped convolution that is not excluded; a pattern that matches
            no leaf.

    Example:
        >>> import flax.linen as nn
        >>> model = nn.Dense(3)
        >>> batches = [jnp.array([[1.0, 2.0], [3.0, 4.0]])]
        >>> params = model.init(jax.random.key(0), batches[0])['params']
        >>> {name: g.tolist() for name, g in gram(model, params, batches).items()}
        {'kernel': [[5.0, 7.0], [7.0, 10.0]]}

    Source: RegMean, 2023, arXiv:2212.09849.
    """
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    if isinstance(model, nnx.Module):
        make, (build, params) = _nnx_statistic, nnx_parts(model, params)
        function = Function(build, False)
    else:
        make, (function, params) = _linen_statistic, as_function(model, params)
    raise_all([f"gram: {problem}" for problem in unmatched(exclude, list(shapes_of(params)))])
    items = ((batch, row_weights(mask, batch, "gram")) for batch in batches)
    try:
        sums = total(make, function, (exclude,), params, items, length(batches), (progress, "gram"))
    except _LEAKS as error:
        raise MergeError(
            "gram: a layer runs inside a JAX transform (jax.vmap, jax.checkpoint, jax.lax.scan); "
            "call the model on whole batches, with Flax's own nn.remat, nn.scan, nnx.remat, ..."
        ) from error
    return means("gram", "inputs", sums)


def _linen_statistic(function, exclude):
    return lambda params, item: _measured(tap_linen, function, exclude, params, *item)


def _nnx_statistic(build, exclude):
    return lambda params, item: _measured(tap_nnx, build, exclude, params, *item)


def _measured(tap, function, exclude, params, batch, weights):
    """{leaf name: (Σ w xᵀx, Σ w)} of one batch, in the order of the calls."""
    problems: list[str] = []

    def measure(layer, name, inputs):
        if any(re.search(pattern, name) for pattern in exclude):
            return None
        if reason := refusal(layer):
            problems.append(
                f"gram: layer '{name}' {reason}, which one Gram matrix cannot describe; "
                f"leave it out with exclude=('{name}',)"
            )
            return None
        return products("gram", name, input_rows(layer, inputs), weights)

    found, _ = tap(function, params, batch, measure)
    raise_all(problems or missing("gram", params, exclude, found))
    return OrderedDict(found)  # JAX sorts the keys of other dictionaries


def shapes_of(params: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of all leaves, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {name_of(path): jnp.shape(leaf) for path, leaf in leaves}


def products(
    caller: str, name: str, rows: jax.Array, weights: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(Σ w xᵀx [in, in], Σ w []) of rows [..., in]."""
    x = rows.astype(jnp.float32)
    if weights is None:
        count = jnp.float32(x.size // x.shape[-1])
        x = weighted = x.reshape(-1, x.shape[-1])
    else:
        shape = x.shape[:-1]
        common = min(weights.ndim, len(shape))
        if common == 0 or weights.shape[:common] != shape[:common]:
            raise MergeError(
                f"{caller}: mask(batch) has shape {weights.shape} and the rows of '{name}' have "
                f"{shape}; give weights whose axes are the first axes of the rows"
            )
        # A pooled row stands for an example that counts if any of its tokens does.
        weights = weights.max(axis=tuple(range(common, weights.ndim)))
        weights = weights.reshape(*weights.shape, *[1] * (len(shape) - common))
        w = jnp.broadcast_to(weights, shape).reshape(-1, 1)
        # Where, not a product: padding may hold anything, NaN included.
        x = jnp.where(w > 0, x.reshape(-1, x.shape[-1]), 0)
        weighted, count = x * w, w.sum()
    return jnp.matmul(weighted.T, x, precision=lax.Precision.HIGHEST), count


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


def means(
    caller: str, what: str, sums: Mapping[str, tuple[jax.Array, jax.Array]]
) -> dict[str, jax.Array]:
    """The symmetric means of products over rows, checked."""
    broken = [name for name, (products, _) in sums.items() if not jnp.isfinite(products).all()]
    if broken:
        raise MergeError(
            f"{caller}: the {what} of {len(broken)} of {len(sums)} layers are not finite, the "
            f"first is '{broken[0]}'; check the data and the expert's parameters"
        )
    empty = [name for name, (_, count) in sums.items() if not (count > 0).all()]
    if empty:
        raise MergeError(
            f"{caller}: every row of {some(empty)} has weight 0; give batches with unmasked rows"
        )
    means = {}
    for name, (products, count) in sums.items():
        mean = products / count[..., None, None]
        means[name] = (mean + jnp.swapaxes(mean, -1, -2)) / 2
    return means
