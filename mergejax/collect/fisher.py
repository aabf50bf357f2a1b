"""Diagonal Fisher information by per-example gradients."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.collect.streaming import Mask, Progress, as_function, length, row_weights, total
from mergejax.errors import MergeError, did_you_mean, raise_all, some
from mergejax.leaves import name_of

ESTIMATORS = ("exact", "sampled", "empirical")


def fisher(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    estimator: Literal["exact", "sampled", "empirical"] = "exact",
    labels: Callable[[Any], Any] | None = None,
    mask: Mask | None = None,
    key: jax.Array | None = None,
    microbatch: int = 8,
    progress: Progress | None = None,
) -> Any:
    """Diagonal of the Fisher information of a classifier, one number per parameter.

    With p = softmax(logits) and the gradient of one example's log p_c(x_n), squared before any
    averaging:

        exact      F_j = 1/N Σ_n Σ_c p_c(x_n) (∂_j log p_c(x_n))²
        sampled    F_j = 1/N Σ_n (∂_j log p_y(x_n))²,  y drawn once from p(x_n)
        empirical  F_j = 1/N Σ_n (∂_j log p_y(x_n))²,  y the label of the data

    One example costs a forward pass and as many backward passes as there are classes (exact) or
    one. Gradients are cast to float32 before they are squared. Memory is a few times
    `microbatch` copies of the parameters.

    Args:
        model: a function (params, batch) -> logits [examples, classes] in which examples do not
            influence each other (running statistics in use, dropout off). Or a linen or NNX model
            that is called on the batch. Linen models and functions under `jax.jit` are compiled
            once for all experts, other functions once a call, as they may depend on what has
            changed since.
        params: the expert's parameters, a tree of arrays; for an NNX model its `nnx.Param` state,
            or None for the model's own.
        batches: any iterable of batches: arrays, or trees of arrays, with the examples along the
            first axis; each new number of examples compiles once more.
        estimator: 'exact', 'sampled' or 'empirical'.
        labels: batch -> integer classes [examples]; needed by 'empirical'.
        mask: batch -> weight of each example [examples], 0 for padding.
        key: `jax.random.key`, needed by 'sampled'; the draw of an example depends on the key and
            on its position in the data alone, not on the batches.
        microbatch: examples whose gradients are held at once.
        progress: called as progress(done, total, 'fisher') after each batch; total is 0 where
            `batches` has no length.

    Returns:
        A tree like `params` of float32 arrays, all at least 0; F has the unit of 1 / parameter².

    Raises:
        MergeError: an unknown estimator, a missing key or labels, no batch, labels out of range,
            logits that are not [examples, classes], a result that is not finite.

    Example:
        >>> inputs = jnp.array([[1.0], [2.0]])
        >>> params = {'kernel': jnp.zeros((1, 2))}  # p = 1/2, so F = mean x² / 4
        >>> fisher(lambda p, x: x @ p['kernel'], params, [inputs])['kernel'].round(3).tolist()
        [[0.625, 0.625]]

    Source: Merging Models with Fisher-Weighted Averaging, 2022, arXiv:2111.09832.
    """
    _check(estimator, key, labels, microbatch)
    function, params = as_function(model, params)

    read = labels if estimator == "empirical" else None
    drawn = key if estimator == "sampled" else None
    items = ((*item, drawn) for item in _items(function.call, params, batches, read, mask))
    options = (estimator, microbatch)
    sums, count = total(
        _statistic, function, options, params, items, length(batches), (progress, "fisher")
    )
    if not count > 0:
        raise MergeError("fisher: every example has weight 0; give batches with unmasked ones")
    flat = jax.tree_util.tree_leaves_with_path(sums)
    broken = [name_of(path) for path, leaf in flat if not jnp.isfinite(leaf).all()]
    if broken:
        raise MergeError(
            f"fisher: squared gradients of {some(broken)} are not finite; check the data and the "
            "expert's parameters"
        )
    return jax.tree.map(lambda leaf: leaf / count, sums)


def _check(estimator: str, key: Any, labels: Any, microbatch: int) -> None:
    problems = []
    if estimator not in ESTIMATORS:
        problems.append(
            f"fisher: estimator '{estimator}' is unknown, {did_you_mean(estimator, ESTIMATORS)}"
        )
    if estimator == "sampled" and key is None:
        problems.append("fisher: estimator 'sampled' draws labels; pass key=jax.random.key(0)")
    if estimator == "empirical" and labels is None:
        problems.append(
            "fisher: estimator 'empirical' needs the labels of the data; pass "
            "labels=lambda batch: batch['label'], or take 'exact'"
        )
    if microbatch < 1:
        problems.append(f"fisher: microbatch is {microbatch}, expected at least 1")
    raise_all(problems)


def _items(
    function: Callable, params: Any, batches: Iterable[Any], labels: Any, mask: Mask | None
) -> Iterator[tuple[Any, np.ndarray, np.ndarray, np.int32]]:
    """(batch, weights, targets, index of its first example) for each batch, checked."""
    start = 0
    for batch in batches:
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
        if len(sizes) != 1 or sizes == {()}:
            raise MergeError(
                f"fisher: the arrays of a batch have first axes {sorted(sizes)}, expected the same "
                "number of examples in all of them"
            )
        size = sizes.pop()[0]
        shape = jax.eval_shape(function, params, batch)
        shape = getattr(shape, "shape", type(shape).__name__)
        if len(shape) != 2 or shape[0] != size or shape[1] < 2:
            raise MergeError(
                f"fisher: the model gives {shape} for {size} examples, expected logits "
                "[examples, classes] with at least two classes"
            )
        weights = row_weights(mask, batch, "fisher")
        weights = np.ones(size, np.float32) if weights is None else weights
        if weights.shape != (size,):
            raise MergeError(
                f"fisher: mask(batch) has shape {weights.shape}, expected one weight for each of "
                f"the {size} examples"
            )
        targets = _targets(labels, batch, weights, start, shape[1])
        yield batch, weights, targets, np.int32(start)
        start += size


def _targets(labels: Any, batch: Any, weights: np.ndarray, start: int, classes: int) -> np.ndarray:
    if labels is None:
        return np.zeros(weights.shape, np.int32)
    targets = np.asarray(labels(batch))
    if targets.shape != weights.shape or not np.issubdtype(targets.dtype, np.integer):
        raise MergeError(
            f"fisher: labels(batch) gave {targets.dtype} {targets.shape}, expected one integer for "
            f"each of the {weights.size} examples"
        )
    wrong = np.flatnonzero(((targets < 0) | (targets >= classes)) & (weights > 0))
    if wrong.size:
        raise MergeError(
            f"fisher: label {targets[wrong[0]]} of example {start + wrong[0]} is not one of the "
            f"{classes} classes 0 to {classes - 1} ({wrong.size} such in this batch); give the "
            "labels of this model's head"
        )
    return targets.astype(np.int32)


def _statistic(function, estimator, microbatch):
    return lambda params, item: _batch_sum(function, estimator, microbatch, params, *item)


def _batch_sum(function, estimator, microbatch, params, batch, weights, targets, start, key):
    """(Σ_n w_n F_n like params, Σ_n w_n): microbatches in a scan, so few gradients live at once."""
    size = weights.shape[0]
    width = min(microbatch, size)
    padding = -size % width
    index = start + jnp.arange(size, dtype=jnp.int32)

    def split(x, mode):
        padded = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), mode=mode)
        return padded.reshape(-1, width, *x.shape[1:])

    def one(example, target, position):
        return _example(function, params, example, target, position, estimator, key)

    def add(sums, chunk):
        *examples, w = chunk
        squares = jax.vmap(one)(*examples)

        def weighted(leaf):
            each = w.reshape(-1, *[1] * (leaf.ndim - 1))
            return jnp.where(each > 0, each * leaf, 0).sum(0)

        return jax.tree.map(lambda total, leaf: total + weighted(leaf), sums, squares), None

    # Padding repeats the last example: a real input, whose gradient then has weight 0.
    examples = jax.tree.map(lambda x: split(jnp.asarray(x), "edge"), (batch, targets, index))
    zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params)
    sums, _ = jax.lax.scan(add, zeros, (*examples, split(weights, "constant")))
    return sums, weights.sum()


def _example(function, params, example, target, position, estimator, key):
    """F of one example: Σ over cotangents v of (vᵀ ∂logits/∂params)²."""
    single = jax.tree.map(lambda x: x[None], example)
    logits, pull = jax.vjp(lambda p: function(p, single)[0], params)
    cotangents = _cotangents(logits.astype(jnp.float32), target, position, estimator, key)

    def square(gradient, p):
        if gradient.dtype == jax.dtypes.float0:  # an integer leaf
            return jnp.zeros(jnp.shape(p), jnp.float32)
        return jnp.square(gradient.astype(jnp.float32))

    def add(sums, cotangent):
        squares = jax.tree.map(square, pull(cotangent)[0], params)
        return jax.tree.map(jnp.add, sums, squares), None

    zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params)
    rows = cotangents.astype(logits.dtype)
    return jax.lax.scan(add, zeros, rows, unroll=rows.shape[0] == 1)[0]


def _cotangents(logits, target, position, estimator, key):
    """Rows v [rows, classes]: ∂ log p_c / ∂ logits = e_c − p, times √p_c in the exact form."""
    p = jax.nn.softmax(logits)
    scores = jnp.eye(p.size, dtype=p.dtype) - p[None, :]
    if estimator == "exact":
        return jnp.sqrt(p)[:, None] * scores
    if estimator == "sampled":
        target = jax.random.categorical(jax.random.fold_in(key, position), logits)
    return scores[target][None, :]
