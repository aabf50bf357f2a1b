"""Means over examples of a function of each example's own gradients."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mergejax.collect.labels import cotangents, labelled
from mergejax.collect.statistics import Statistics, means
from mergejax.collect.streaming import Function, Mask, Progress, length, total
from mergejax.errors import MergeError
from mergejax.leaves import name_of


def mean_over_examples(
    caller: str,
    form: Callable[[jax.Array], jax.Array],
    names: Sequence[str],
    function: Function,
    params: Any,
    batches: Iterable[Any],
    drawing: tuple[str, Any, Any],
    mask: Mask | None,
    microbatch: int,
    progress: Progress | None,
) -> Statistics:
    """1/Σw Σ_n w_n Σ_v form(∂ leaf of vᵀ logits(x_n)) for the named leaves of params.

    Args:
        caller: who is named in errors and in progress.
        form: float32 gradient of one leaf -> what is added up.
        names: of the leaves, floating-point ones.
        function: (params, batch) -> logits.
        params: a tree of arrays.
        batches: with the examples along the first axis.
        drawing: the estimator, the function that reads the labels, the key.
        mask: batch -> weight of each example.
        microbatch: examples whose gradients are held at once.
        progress: called after each batch.
    """
    estimator, labels, key = drawing
    read = labels if estimator == "empirical" else None
    drawn = key if estimator == "sampled" else None
    # Of sequences there is no exact form: it would sum over all texts.
    sequences = estimator != "exact"
    checked = labelled(caller, function.call, params, batches, read, mask, sequences=sequences)
    sums, count = total(
        _statistic,
        function,
        (form, tuple(names), estimator, microbatch),
        params,
        ((*item, drawn) for item in checked),
        length(batches, caller),
        (progress, caller),
    )
    if not count > 0:
        raise MergeError(f"{caller}: every example has weight 0; give batches with unmasked ones")
    return means(caller, {name: (sums[name], count) for name in names}, "squared gradients")


def floating(params: Any) -> dict[str, Any]:
    """The leaves with a gradient, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {name_of(path): leaf for path, leaf in leaves}
    return {n: x for n, x in found.items() if jnp.issubdtype(jnp.result_type(x), jnp.floating)}


def _statistic(function, form, names, estimator, microbatch):
    options = (function, form, names, estimator, microbatch)
    return lambda params, item: _batch_sum(options, params, item)


def _batch_sum(options, params, item):
    """({name: Σ_n w_n F_n}, Σ_n w_n): microbatches in a scan, so few gradients live at once."""
    function, form, names, estimator, microbatch = options
    batch, weights, targets, start, key = item
    size = weights.shape[0]
    width = min(microbatch, size)
    padding = -size % width
    index = start + jnp.arange(size, dtype=jnp.int32)

    def split(x, mode):
        padded = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), mode=mode)
        return padded.reshape(-1, width, *x.shape[1:])

    def one(example, target, position):
        return _example(function, form, names, params, example, (target, position, estimator, key))

    def add(sums, chunk):
        *examples, w = chunk
        squares = jax.vmap(one)(*examples)

        def weighted(leaf):
            each = w.reshape(-1, *[1] * (leaf.ndim - 1))
            return jnp.where(each > 0, each * leaf, 0).sum(0)

        return jax.tree.map(lambda total, leaf: total + weighted(leaf), sums, squares), None

    # Padding repeats the last example: a real input, whose gradient then has weight 0.
    examples = jax.tree.map(lambda x: split(jnp.asarray(x), "edge"), (batch, targets, index))
    first = jax.tree.map(lambda x: x[0, 0], examples)
    zeros = _zeros(jax.eval_shape(one, *first))
    sums, _ = jax.lax.scan(add, zeros, (*examples, split(weights, "constant")))
    return sums, weights.sum()


def _example(function, form, names, params, example, drawing):
    """F of one example: Σ over cotangents v of form(vᵀ ∂logits/∂leaf), by leaf name."""
    single = jax.tree.map(lambda x: x[None], example)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    whole = {name_of(path): leaf for path, leaf in leaves}

    def logits_of(chosen):
        return function(jax.tree.unflatten(structure, (whole | chosen).values()), single)[0]

    logits, pull = jax.vjp(logits_of, {name: whole[name] for name in names})
    rows = cotangents(logits.astype(jnp.float32), *drawing).astype(logits.dtype)

    def forms(cotangent):
        gradients = pull(cotangent)[0]
        return {name: form(g.astype(jnp.float32)) for name, g in gradients.items()}

    def add(sums, cotangent):
        return jax.tree.map(jnp.add, sums, forms(cotangent)), None

    zeros = _zeros(jax.eval_shape(forms, rows[0]))
    return jax.lax.scan(add, zeros, rows, unroll=rows.shape[0] == 1)[0]


def _zeros(shapes):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
