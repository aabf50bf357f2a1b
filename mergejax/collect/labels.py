"""Labels of examples, and the scores ∂ log p / ∂ logits that every estimator starts from."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.collect.streaming import Mask, row_weights, running
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
    sequences: bool = False,
) -> Iterator[tuple[Any, np.ndarray, Any, np.int32]]:
    """(batch, weights, targets, index of its first example) for each batch, checked.

    Weights have up to so many axes, the first one of examples. If the model gives logits for each
    token of sequences, and may do so, targets are (labels, weights) of tokens.
    """
    start = 0
    for number, batch in enumerate(batches, start=1):
        sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
        if len(sizes) != 1 or sizes <= {(), (0,)}:
            raise MergeError(
                f"{caller}: the arrays of a batch have first axes {sorted(sizes)}, expected the "
                "same number of examples in all of them, at least one"
            )
        size = sizes.pop()[0]
        with running(caller, f"batch {number}", batch):
            shape = jax.eval_shape(function, params, batch)
        shape = getattr(shape, "shape", type(shape).__name__)
        if len(shape) not in (2, 2 + sequences) or shape[0] != size or shape[-1] < 2:
            wanted = " or [examples, tokens, classes]" if sequences else ""
            hint = "" if sequences else "; of sequences, fisher takes estimator='sampled'"
            raise MergeError(
                f"{caller}: the model gives {shape} for {size} examples, expected logits "
                f"[examples, classes]{wanted} with at least two classes{hint}"
            )
        of_tokens = len(shape) == 3
        weights = row_weights(mask, batch, caller)
        weights = np.ones(size, np.float32) if weights is None else weights
        fitting = shape[:2] if of_tokens and weights.ndim == 2 else (size, *weights.shape[1:])
        if weights.shape != fitting or weights.ndim > axes + of_tokens:
            raise MergeError(
                f"{caller}: mask(batch) has shape {weights.shape}, expected one weight for each of "
                f"the {size} examples{' or of their tokens' if of_tokens else ''}"
            )
        if of_tokens:
            tokens = np.broadcast_to(weights if weights.ndim == 2 else weights[:, None], shape[:2])
            targets = _targets(caller, labels, batch, tokens, start, shape[2])
            yield batch, tokens.max(1), (targets, tokens), np.int32(start)
        else:
            kept = weights.reshape(size, -1).max(1)
            yield (
                batch,
                weights,
                _targets(caller, labels, batch, kept, start, shape[1]),
                np.int32(start),
            )
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
            f"for each of the {weights.shape[0]} examples"
            + (f" and its {weights.shape[1]} tokens" if weights.ndim > 1 else "")
        )
    wrong = np.argwhere(((targets < 0) | (targets >= classes)) & (weights > 0))
    if len(wrong):
        place = tuple(wrong[0])
        raise MergeError(
            f"{caller}: label {targets[place]} of example {start + place[0]} is not one of the "
            f"{classes} classes 0 to {classes - 1} ({len(wrong)} such in this batch); give the "
            "labels of this model's head"
        )
    return targets.astype(np.int32)


def cotangents(logits, target, position, estimator, key):
    """Rows v of the shape of logits: ∂ log p_c / ∂ logits = e_c − p, times √p_c in the exact form.

    For logits [tokens, classes] there is one row: the log-likelihood of a sequence is the sum over
    its tokens by their weights, and so is its gradient.
    """
    p = jax.nn.softmax(logits)
    if estimator == "sampled":
        drawn = jax.random.categorical(jax.random.fold_in(key, position), logits)
        target = drawn if logits.ndim == 1 else (drawn, target[1])
    if logits.ndim == 2:
        labels, weights = target
        return (weights[:, None] * (jax.nn.one_hot(labels, p.shape[-1], dtype=p.dtype) - p))[None]
    scores = jnp.eye(p.size, dtype=p.dtype) - p[None, :]
    return jnp.sqrt(p)[:, None] * scores if estimator == "exact" else scores[target][None, :]
