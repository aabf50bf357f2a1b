"""Gram matrices of the gradients at the outputs of a model's layers."""

import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mergejax.collect.gram import products, whole
from mergejax.collect.labels import check, cotangents, labelled
from mergejax.collect.layers import Rows, missing, shapes_of, weighted_rows
from mergejax.collect.rows import refusal
from mergejax.collect.statistics import Statistics, means
from mergejax.collect.streaming import (
    Function,
    Mask,
    Progress,
    as_function,
    length,
    nnx_parts,
    total,
)
from mergejax.collect.taps import tap_linen, tap_nnx
from mergejax.errors import raise_all
from mergejax.leaves import unmatched

CALLER = "output_gram"


def output_gram(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    estimator: Literal["exact", "sampled", "empirical"] = "exact",
    labels: Callable[[Any], Any] | None = None,
    mask: Mask | None = None,
    key: jax.Array | None = None,
    exclude: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> Statistics:
    r"""Mean Gram matrix of the gradients at the outputs of every layer with a kernel.

    .. math:: B=\sum_rw_r\sum_cp_c(x_{n(r)})\,g_{rc}^\top g_{rc}\,/\,\sum_rw_r,\qquad
        g_{rc}=\partial\log p_c(x_{n(r)})/\partial y_r

    over the rows r (tokens, pixels) of the outputs y of all examples n, in the exact form; with one
    label for each example otherwise, drawn or of the data, as in `fisher`. A gradient belongs to
    one example and is not divided by their number. With `gram` it makes the layer's K-FAC operator.
    Sums are float32 at the highest matmul precision.

    A batch costs one forward pass and as many backward passes as there are classes (exact), or
    one. What is held besides is one matrix for each layer.

    Args:
        model: (params, batch) -> logits [examples, classes] in which examples do not influence each
            other; a function, a linen or an NNX model, as for `gram`.
        params: as for `gram`.
        batches: arrays, or trees of them, with the examples along the first axis.
        estimator: 'exact', 'sampled' or 'empirical'.
        labels: batch -> integer classes [examples]; needed by 'empirical'.
        mask: as for `gram`: weights [examples] or [examples, tokens, ...].
        key: `jax.random.key`, needed by 'sampled'.
        exclude: regular expressions of kernels to leave out; that of a head with a large vocabulary
            takes classes² numbers.
        progress: called as progress(done, total, 'output_gram') after each batch.

    Returns:
        {leaf name of the kernel: B [out, out] float32, symmetric}; the features of DenseGeneral
        are flattened in order. A layer that is called several times sums over its calls.

    Raises:
        MergeError: what `gram` and `fisher` refuse; layers inside nn.scan, nn.vmap or nnx.scan,
            whose gradients add up over the layers of the stack.

    Example:
        >>> model, x = nn.Dense(2), jnp.ones((3, 1))
        >>> params = {'kernel': jnp.zeros((1, 2)), 'bias': jnp.zeros(2)}
        >>> output_gram(model, params, [x])['kernel'].round(3).tolist()  # diag(p) - p pᵀ, p = 1/2
        [[0.25, -0.25], [-0.25, 0.25]]

    Source: MaTS, Merging by Matching Models in Task Parameter Subspaces, 2024, arXiv:2312.04339.
    """
    check(CALLER, estimator, key, labels)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    tap: Any
    if isinstance(model, nnx.Module):
        run, _ = as_function(model, params)
        build, params = nnx_parts(model, params)
        tap, function = tap_nnx, Function(build, False)
    else:
        run, params = as_function(model, params)
        tap, function = tap_linen, run
    raise_all([f"{CALLER}: {problem}" for problem in unmatched(exclude, list(shapes_of(params)))])
    read = labels if estimator == "empirical" else None
    drawn = key if estimator == "sampled" else None
    items = (
        (batch, None if mask is None else weights, targets, start, drawn)
        for batch, weights, targets, start in labelled(
            CALLER, run.call, params, batches, read, mask, axes=8
        )
    )
    options = (tap, estimator, exclude)
    sums = total(
        _statistic, function, options, params, items, length(batches, CALLER), (progress, CALLER)
    )
    return means(CALLER, sums, "output gradients", form=whole)


def _statistic(function, tap, estimator, exclude):
    return lambda params, item: _measured(function, tap, estimator, exclude, params, *item)


def _measured(function, tap, estimator, exclude, params, batch, weights, targets, start, key):
    """{leaf name: (Σ w gᵀg, Σ w)} of one batch, in the order of the calls."""

    def run(probe):
        return tap(function, params, batch, lambda layer, name, inputs: None, probe)[1]

    sizes = _sizes(run, exclude, params)
    rows = {name: jnp.zeros((1, size), jnp.float32) for name, size in sizes.items()}
    nothing = jnp.zeros((), jnp.float32)
    zeros = OrderedDict((n, (products(Rows(x, x, nothing)), nothing)) for n, x in rows.items())

    def logits_of(sums):
        def probe(layer, name, output):
            if name not in sums:
                return output
            return _probe((name, _axes(layer)), output, sums[name], weights)

        return run(probe)

    logits, pull = jax.vjp(logits_of, zeros)
    draw = lambda logit, target, place: cotangents(logit, target, place, estimator, key)
    scores = jax.vmap(draw)(
        logits.astype(jnp.float32), targets, start + jnp.arange(len(logits), dtype=jnp.int32)
    )

    def add(sums, score):
        return jax.tree.map(jnp.add, sums, pull(score.astype(logits.dtype))[0]), None

    sums, _ = jax.lax.scan(add, zeros, jnp.swapaxes(scores, 0, 1))
    passes = scores.shape[1]  # each of them counts every row
    return OrderedDict((name, (total, count / passes)) for name, (total, count) in sums.items())


def _sizes(run, exclude, params):
    """{leaf name of a kernel: number of its outputs}, in the order of the calls."""
    shapes = shapes_of(params)
    sizes: dict[str, int] = {}
    problems: dict[str, str] = {}

    def probe(layer, name, output):
        if any(re.search(pattern, name) for pattern in exclude):
            return output
        leave = f"leave it out with exclude=('{name}',)"
        if reason := refusal(layer):
            problems[name] = (
                f"{CALLER}: layer '{name}' {reason}, which one Gram matrix cannot describe; {leave}"
            )
        elif _kernel(layer).shape != shapes[name]:
            problems[name] = (
                f"{CALLER}: layer '{name}' is one of a stack (nn.scan, nn.vmap, nnx.scan), whose "
                f"gradients cannot be told apart; unroll the layers, or {leave}"
            )
        sizes[name] = int(np.prod(output.shape[-_axes(layer) :]))
        return output

    jax.eval_shape(lambda: run(probe))
    raise_all(list(problems.values()) or missing(CALLER, params, exclude, sizes))
    return sizes


def _axes(layer: Any) -> int:
    """How many of the last axes of a layer's output are its features."""
    own = layer.features if isinstance(layer, nn.Module) else layer.out_features
    return len(np.atleast_1d(own))


def _kernel(layer: Any) -> Any:
    if isinstance(layer, nn.Module):
        return nn.meta.unbox(layer.get_variable("params", "kernel"))
    return layer.kernel


# The gradient of what does not enter the output: the backward pass leaves its products there, and
# they add up over the calls of a layer, under remat and jit too, as gradients do.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probe(place, output, sums, weights):
    return output


def _forward(place, output, sums, weights):
    return output, weights


def _backward(place, weights, gradient):
    name, axes = place
    rows = gradient.reshape(*gradient.shape[: gradient.ndim - axes], -1)
    weighted = weighted_rows(CALLER, name, rows, weights)
    unmoved = None if weights is None else jnp.zeros_like(weights)
    return gradient, (products(weighted), weighted.weight), unmoved


_probe.defvjp(_forward, _backward)
