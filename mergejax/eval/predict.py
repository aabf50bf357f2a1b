"""Predictions of one body on several tasks at once: one batch of examples, one wide head.

The heads of all tasks are laid side by side; an example sees the classes of its own task only. So a
body is run once over the examples of all tasks, and one compiled program serves every model.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import train
from mergejax.data.task import Split

Tree = Any
CHUNK = 512  # examples that go through a body at once, at most


class Bundle(NamedTuple):
    """The labelled examples of several tasks, one task behind the other.

    Attributes:
        inputs: float32 [n, height, width, channels], or int32 [n, length].
        labels: int32 [n], index of the class among the classes of all tasks.
        tasks: int32 [n], index of the task.
        owners: int32 [classes], index of the task that a class belongs to.
    """

    inputs: np.ndarray
    labels: np.ndarray
    tasks: np.ndarray
    owners: np.ndarray


def bundle(splits: Sequence[Split], classes: Sequence[int], skipped: int = 0) -> Bundle:
    """Joins the examples of several tasks.

    Args:
        splits: one per task; inputs of one shape.
        classes: number of classes of each task, also of tasks before and behind these.
        skipped: number of tasks before these.

    Returns:
        A `Bundle` in the order of the tasks.

    Example:
        >>> split = Split(np.zeros([2, 8, 8, 1], np.float32), np.array([0, 1], np.int32))
        >>> joined = bundle([split, split], [3, 2])
        >>> joined.labels.tolist(), joined.tasks.tolist(), joined.owners.tolist()
        ([0, 1, 3, 4], [0, 0, 1, 1], [0, 0, 0, 1, 1])
    """
    first = np.cumsum([0, *classes])
    starts = first[skipped : skipped + len(splits)]
    labels = [split.labels + start for split, start in zip(splits, starts, strict=True)]
    own = np.arange(skipped, skipped + len(splits))
    return Bundle(
        inputs=np.concatenate([split.inputs for split in splits]),
        labels=np.concatenate(labels).astype(np.int32),
        tasks=np.repeat(own, [len(split) for split in splits]).astype(np.int32),
        owners=np.repeat(np.arange(len(classes)), classes).astype(np.int32),
    )


def join_heads(heads: Mapping[str, Tree], names: Sequence[str]) -> Tree:
    """Lays the heads of several tasks side by side.

    Args:
        heads: by task, kernel [width, classes] and bias [classes].
        names: the tasks, in the order of the classes.

    Returns:
        kernel [width, all classes] and bias [all classes].
    """
    return {
        "kernel": jnp.concatenate([heads[name]["kernel"] for name in names], axis=1),
        "bias": jnp.concatenate([heads[name]["bias"] for name in names]),
    }


def scores(model: nn.Module, body: Tree, head: Tree, examples: Bundle) -> jax.Array:
    """Scores the classes of every example's own task; works under `jax.jit` and `jax.lax.map`.

    Args:
        model: the body's module.
        body: its parameters.
        head: what `join_heads` returned.
        examples: what `bundle` returned.

    Returns:
        float32 [n, all classes], minus infinity for the classes of other tasks.
    """
    n = examples.inputs.shape[0]
    size = -(-n // max(1, -(-n // CHUNK)))  # chunks of one size, as few and as small as can be
    padded = jnp.pad(examples.inputs, [(0, -n % size)] + [(0, 0)] * (examples.inputs.ndim - 1))
    chunks = padded.reshape(-1, size, *padded.shape[1:])
    logits = jax.lax.map(lambda chunk: train.logits(model, body, head, chunk), chunks)
    own = examples.tasks[:, None] == examples.owners[None, :]
    return jnp.where(own, logits.reshape(-1, logits.shape[-1])[:n], -jnp.inf)


def is_right(model: nn.Module, body: Tree, head: Tree, examples: Bundle) -> jax.Array:
    """Tells which examples a body classifies as their label says; works under `jax.jit`.

    Args:
        model: the body's module.
        body: its parameters.
        head: what `join_heads` returned.
        examples: what `bundle` returned.

    Returns:
        bool [n].
    """
    return scores(model, body, head, examples).argmax(axis=1) == examples.labels


@functools.partial(jax.jit, static_argnames="model")
def right(model: nn.Module, body: Tree, head: Tree, examples: Bundle) -> jax.Array:
    """`is_right`, compiled once for all bodies of one model."""
    return is_right(model, body, head, examples)


@functools.partial(jax.jit, static_argnames="model")
def _probabilities(model: nn.Module, body: Tree, head: Tree, examples: Bundle) -> jax.Array:
    return jax.nn.softmax(scores(model, body, head, examples), axis=1)


def ensemble_right(
    model: nn.Module, bodies: Sequence[Tree], head: Tree, examples: Bundle
) -> jax.Array:
    """As `right`, by the mean of the class probabilities that several bodies give.

    Args:
        model: the bodies' module.
        bodies: their parameters.
        head: what `join_heads` returned; all bodies are run under it.
        examples: what `bundle` returned.

    Returns:
        bool [n].
    """
    total = sum(_probabilities(model, body, head, examples) for body in bodies)
    return jnp.argmax(total, axis=1) == examples.labels


def own_right(model: nn.Module, bodies: Sequence[Tree], head: Tree, examples: Bundle) -> np.ndarray:
    """As `right`, each example by the body of its own task.

    Args:
        model: the bodies' module.
        bodies: their parameters, in the order of the tasks.
        head: what `join_heads` returned.
        examples: what `bundle` returned, of these tasks only.

    Returns:
        bool [n].
    """
    found = np.zeros(len(examples.labels), bool)
    most = np.bincount(examples.tasks).max()
    for task, body in enumerate(bodies):
        rows = np.flatnonzero(examples.tasks == task)
        # As many for every task, so that one compiled program serves all.
        some = np.resize(rows, most)
        own = examples._replace(
            inputs=examples.inputs[some], labels=examples.labels[some], tasks=examples.tasks[some]
        )
        found[rows] = np.asarray(right(model, body, head, own))[: len(rows)]
    return found


def by_task(right: np.ndarray, examples: Bundle, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Cuts one value per example, [n], into those of each task, by name; some may have none."""
    counts = np.bincount(examples.tasks, minlength=len(names))
    parts = np.split(np.asarray(right), np.cumsum(counts)[:-1])
    return dict(zip(names, parts, strict=True))
