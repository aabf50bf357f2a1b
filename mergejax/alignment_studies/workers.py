"""Workers of a decentralised study: their data, their training, their accuracy."""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from mergejax import fit
from mergejax.alignment import dimat
from mergejax.data.task import Split

Tree = Any
DECAY = 0.01
EVERYONE = PartitionSpec()


def grey(images: np.ndarray) -> np.ndarray:
    """The mean over channels, which stay as an axis of one."""
    return np.asarray(images).mean(-1, keepdims=True, dtype=np.float32)


def divided(split: Split, workers: int, runs: int, seed: int) -> list[Split]:
    """One part of the examples for each worker.

    Args:
        split: all examples.
        workers: number of parts.
        runs: of examples sorted by label that a worker gets, all equally long: few mean few
            classes. With 0 examples are dealt out one by one.
        seed: of the deal.

    Example:
        >>> split = Split(np.zeros((8, 1)), np.array([0, 1, 2, 3, 0, 1, 2, 3]))
        >>> [len(set(part.labels.tolist())) for part in divided(split, 2, runs=2, seed=0)]
        [2, 2]
    """
    generator = np.random.default_rng([seed, 1])
    order = generator.permutation(len(split))
    if runs:
        order = order[np.argsort(split.labels[order], kind="stable")]
        pieces = np.array_split(order, runs * workers)
        dealt = generator.permutation(runs * workers).reshape(workers, runs)
        several = [np.concatenate([pieces[i] for i in own]) for own in dealt]
    else:
        several = np.array_split(order, workers)
    several = [generator.permutation(own) for own in several]
    return [Split(split.inputs[own], split.labels[own]) for own in several]


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def train(workers: Tree, batches: fit.Batch, rate: jax.Array, model: nn.Module, mesh: Mesh) -> Tree:
    """Every worker takes its steps of AdamW, whose moments start anew."""

    def loss(variables: Tree, batch: fit.Batch) -> jax.Array:
        logits = model.apply(variables, batch.inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    def step(carry: tuple[Tree, Tree], batch: fit.Batch) -> tuple[tuple[Tree, Tree], None]:
        variables, state = carry
        gradient = jax.grad(loss)(variables, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = fit.direction(DECAY).update(gradient, state, variables)
        return (jax.tree.map(lambda x, u: x - rate * u, variables, updates), state), None

    def each(workers: Tree, batches: fit.Batch) -> Tree:
        own, mine = jax.tree.map(lambda x: x[0], (workers, batches))
        (own, _), _ = jax.lax.scan(step, (own, fit.direction(DECAY).init(own)), mine)
        return jax.tree.map(lambda x: x[None], own)

    specs = (dimat.PER_WORKER, dimat.PER_WORKER)
    # Constants that optax makes are the same for all workers, which the check cannot know.
    return jax.shard_map(
        each, mesh=mesh, in_specs=specs, out_specs=dimat.PER_WORKER, check_vma=False
    )(workers, batches)


def accuracy(workers: Tree, test: Split, model: nn.Module, mesh: Mesh) -> float:
    """Test accuracy of the mean worker."""
    return float(_right(workers, test.inputs, test.labels, model, mesh))


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def _right(workers: Tree, images: Any, labels: Any, model: nn.Module, mesh: Mesh) -> jax.Array:
    def each(workers: Tree, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits: Any = model.apply(jax.tree.map(lambda x: x[0], workers), images)
        return jax.lax.pmean((logits.argmax(1) == labels).mean(), dimat.WORKERS)

    specs = (dimat.PER_WORKER, EVERYONE, EVERYONE)
    return jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=EVERYONE)(
        workers, images, labels
    )
