"""Labels of examples, and the scores ∂ log p / ∂ logits that every estimator starts from."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.collect.streaming import Mask, row_weights
from mergejax.errors import MergeError, did_you_mean, raise_all

ESTIMATORS = ("exact", "sampled", "empirical")


def check(caller: str, estimator: str, key: Any, labels: Any, microbatch: int = 1) -> None:
    """Refuses options that cannot give the scores of an estimator."""
    problems = []
    if estimator not in ESTIMATORS:
        problems.append(
            f"{caller}: estimator '{estimator}' is unknown, {did_you_mean(estimator, ESTIMATORS)}"
        )
    if estimator == "sampled" and key is None:
        problems.append(f"{caller}: estimator 'sampled' draws labels; pass key=jax.random.key(0)")
    if estimator == "empirical" and labels is None:
        problems.append(
            f"{caller}: estimator 'empirical' needs the labels of the data; pass "
            "labels=lambda batch: batch['label'], or take 'exact'"
        )
    if microbatch < 1:
        problems.append(f"{caller}: microbatch is {microbatch}, expected at least 1")
    raise_all(problems)


def labelled(
    caller: str,
    function: Callable,
    params: Any,
    batches: Iterable[Any],
    labels: Any,
    mask: Mask | None,
    axes: int = 1,
) -> Iterator[tuple[Any, np.ndarray, np.ndarray, np.int32]]:
    """(batch, weights, targets, index of its first example) for each batch, checked.

    Weights have up to so many axes, the first one of examples.
    """
    start = 0
    for batch in batches:
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
        if len(sizes) != 1 or sizes == {()}:
            raise MergeError(
                f"{caller}: the arrays of a batch have first axes {sorted(sizes)}, expected the "
                "same number of examples in all of them"
            )
        size = sizes.pop()[0]
        shape = jax.eval_shape(function, params, batch)
        shape = getattr(shape, "shape", type(shape).__name__)
        if len(shape) != 2 or shape[0] != size or shape[1] < 2:
            raise MergeError(
                f"{caller}: the model gives {shape} for {size} examples, expected logits "
                "[examples, classes] with at least two classes"
            )
        weights = row_weights(mask, batch, caller)
        weights = np.ones(size, np.float32) if weights is None else weights
        if weights.shape[:1] != (size,) or weights.ndim > axes:
            raise MergeError(
                f"{caller}: mask(batch) has shape {weights.shape}, expected one weight for each of "
                f"the {size} examples"
            )
        targets = _targets(caller, labels, batch, weights.reshape(size, -1).max(1), start, shape[1])
        yield batch, weights, targets, np.int32(start)
        start += size


def _targets(
    caller: str, labels: Any, batch: Any, weights: np.ndarray, start: int, classes: int
) -> np.ndarray:
    if labels is None:
        return np.zeros(weights.shape, np.int32)
    targets = np.asarray(labels(batch))
    if targets.shape != weights.shape or not np.issubdtype(targets.dtype, np.integer):
        raise MergeError(
            f"{caller}: labels(batch) gave {targets.dtype} {targets.shape}, expected one integer "
            f"for each of the {weights.size} examples"
        )
    wrong = np.flatnonzero(((targets < 0) | (targets >= classes)) & (weights > 0))
    if wrong.size:
        raise MergeError(
            f"{caller}: label {targets[wrong[0]]} of example {start + wrong[0]} is not one of the "
            f"{classes} classes 0 to {classes - 1} ({wrong.size} such in this batch); give the "
            "labels of this model's head"
        )
    return targets.astype(np.int32)


def cotangents(logits, target, position, estimator, key):
    """Rows v [rows, classes]: ∂ log p_c / ∂ logits = e_c − p, times √p_c in the exact form."""
    p = jax.nn.softmax(logits)
    scores = jnp.eye(p.size, dtype=p.dtype) - p[None, :]
    if estimator == "exact":
        return jnp.sqrt(p)[:, None] * scores
    if estimator == "sampled":
        target = jax.random.categorical(jax.random.fold_in(key, position), logits)
    return scores[target][None, :]
