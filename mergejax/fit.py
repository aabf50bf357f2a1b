"""The training loop: AdamW over chunks of steps, each chunk one compiled scan.

One loop serves pre-training, fine-tuning and multi-task training. It trains a body under several
heads at once; their kernels are padded to one number of classes and stacked, so that problems with
other labels and other numbers of images share a compilation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from mergejax.data.task import Split

Tree = Any
CHUNK = 25  # steps in one compiled scan, and between two movements of the progress bar
NEVER = -1e9  # logit of a class that the problem does not have


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how fast to train.

    Attributes:
        steps: number of updates.
        learning_rate: at its peak.
        batch: examples per step, drawn with replacement, each problem equally often.
        warmup: share of the steps over which the learning rate rises; then it falls as a cosine.
        weight_decay: decoupled, as a multiple of the learning rate (AdamW).
        shift: each image is moved by up to so many pixels either way, at random, edges repeated.
        rank: of adapters, where these are trained.
    """

    steps: int
    learning_rate: float
    batch: int
    warmup: float = 0.1
    weight_decay: float = 0.01
    shift: int = 0
    rank: int = 0


class Batch(NamedTuple):
    """Inputs [batch, ...] as in `Split`, index of the problem and label, both int32 [batch]."""

    inputs: np.ndarray
    problems: np.ndarray
    labels: np.ndarray


def stack_heads(heads: Sequence[Tree], classes: int) -> Tree:
    """Stacks heads along a new first axis, padded with classes that are never predicted.

    Args:
        heads: trees of a kernel [width, n] and a bias [n], any n up to `classes`.
        classes: number of classes after padding.

    Returns:
        A kernel [heads, width, classes] and a bias [heads, classes].

    Example:
        >>> head = {"kernel": np.ones([4, 2], np.float32), "bias": np.zeros([2], np.float32)}
        >>> stack_heads([head], 3)["bias"].tolist()
        [[0.0, 0.0, -1000000000.0]]
    """

    def padded(leaf: jax.Array, value: float) -> jax.Array:
        missing = classes - leaf.shape[-1]
        widths = [(0, 0)] * (leaf.ndim - 1) + [(0, missing)]
        return jnp.pad(jnp.asarray(leaf), widths, constant_values=value)

    return {
        "kernel": jnp.stack([padded(head["kernel"], 0.0) for head in heads]),
        "bias": jnp.stack([padded(head["bias"], NEVER) for head in heads]),
    }


def _unstack(stacked: Tree, heads: Sequence[Tree]) -> list[Tree]:
    counts = [head["bias"].shape[0] for head in heads]
    return [
        jax.tree.map(lambda leaf, i=i, n=n: leaf[i, ..., :n], stacked)  # type: ignore[misc]
        for i, n in enumerate(counts)
    ]


def learning_rates(settings: Settings) -> np.ndarray:
    """Lists the learning rate of every step: a linear rise, then a cosine down to 1 % of the peak.

    Example:
        >>> learning_rates(Settings(steps=4, learning_rate=1.0, batch=1, warmup=0.5)).round(2)
        array([0. , 0.5, 1. , 0.5], dtype=float32)
    """
    warmup = int(settings.warmup * settings.steps)
    peak = settings.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, settings.steps, 0.01 * peak)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
        return np.asarray(jax.vmap(schedule)(np.arange(settings.steps)), np.float32)


def direction(weight_decay: float | jax.Array) -> optax.GradientTransformation:
    """AdamW up to the learning rate, which is data, so that one compilation serves all."""
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), decay)


@functools.partial(jax.jit, static_argnames="model")
def _chunk(
    trained: Tree,
    state: Tree,
    frozen: Tree,
    batches: Batch,
    rates: jax.Array,
    weight_decay: jax.Array,
    model: nn.Module,
) -> tuple[Tree, Tree, jax.Array]:
    """Takes one step per batch; returns parameters, optimiser state and the losses [steps]."""

    def loss(trained: Tree, batch: Batch) -> jax.Array:
        params = {**frozen, **trained}
        body = adapted(params["body"], params["adapters"])
        features = model.apply({"params": body}, batch.inputs)
        every = jnp.einsum("nw,pwc->npc", features, params["heads"]["kernel"])
        every = every + params["heads"]["bias"][None]
        logits = jnp.take_along_axis(every, batch.problems[:, None, None], axis=1)[:, 0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    def step(carry: tuple[Tree, Tree], data: tuple[Batch, jax.Array]) -> tuple[Any, jax.Array]:
        (trained, state), (batch, rate) = carry, data
        value, gradient = jax.value_and_grad(loss)(trained, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, state = direction(weight_decay).update(gradient, state, trained)
        trained = jax.tree.map(lambda leaf, update: leaf - rate * update, trained, updates)
        return (trained, state), value

    (trained, state), losses = jax.lax.scan(step, (trained, state), (batches, rates))
    return trained, state, losses


def adapters(body: Tree, rank: int, key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Draws low-rank factors for every kernel of a body, whose product is zero at the start.

    Args:
        body: tree with kernels [..., out]; all axes but the last count as one.
        rank: of the factors; at most the smaller side of a kernel.
        key: of the draw.

    Returns:
        By the kernel's name `down` [in, rank] and `up` [rank, out].

    Example:
        >>> drawn = adapters({"dense": {"kernel": jnp.zeros([4, 3])}}, 2, jax.random.key(0))
        >>> {name: [x.shape for x in pair.values()] for name, pair in drawn.items()}
        {'dense/kernel': [(4, 2), (2, 3)]}

    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    found = {}
    for i, (name, leaf) in enumerate(traverse_util.flatten_dict(body, sep="/").items()):
        if name.rpartition("/")[2] == "kernel":
            rows, columns = math.prod(leaf.shape[:-1]), leaf.shape[-1]
            width = min(rank, rows, columns)
            down = jax.random.normal(jax.random.fold_in(key, i), (rows, width)) * rows**-0.5
            found[name] = {"down": down, "up": jnp.zeros((width, columns))}
    return found


def adapted(body: Tree, factors: Mapping[str, Mapping[str, jax.Array]]) -> Tree:
    """Adds the products of `adapters` to a body.

    Example:
        >>> body = {"dense": {"kernel": jnp.zeros([2, 2])}}
        >>> pair = {"down": jnp.ones([2, 1]), "up": jnp.ones([1, 2])}
        >>> adapted(body, {"dense/kernel": pair})["dense"]["kernel"].tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    leaves = traverse_util.flatten_dict(body, sep="/")
    for name, pair in factors.items():
        leaves[name] = leaves[name] + (pair["down"] @ pair["up"]).reshape(leaves[name].shape)
    return traverse_util.unflatten_dict(leaves, sep="/")


def moved(images: np.ndarray, shift: int, generator: np.random.Generator) -> np.ndarray:
    """Moves each image at random by up to `shift` pixels either way; the edges are repeated.

    Args:
        images: float32 [n, height, width, channels].
        shift: in pixels.
        generator: source of randomness.

    Returns:
        The moved images, same shape.

    Example:
        >>> moved(np.ones([2, 4, 4, 1], np.float32), 1, np.random.default_rng(0)).shape
        (2, 4, 4, 1)
    """
    n, height, width, _ = images.shape
    frame = [(0, 0), (shift, shift), (shift, shift), (0, 0)]
    padded = np.pad(images, frame, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    rows, columns = generator.integers(2 * shift + 1, size=[2, n])
    return windows[np.arange(n), rows, columns].transpose(0, 2, 3, 1)


def draw(
    splits: Sequence[Split],
    steps: int,
    batch: int,
    generator: np.random.Generator,
    shift: int = 0,
) -> Batch:
    """Draws the batches of a chunk on the host: a problem for each example, then an example of it.

    Args:
        splits: the problems' training examples, all of one shape.
        steps: number of batches.
        batch: examples in each.
        generator: source of randomness.
        shift: as in `Settings`.

    Returns:
        `Batch` with a first axis of `steps`.
    """
    problems = generator.integers(len(splits), size=[steps, batch], dtype=np.int32)
    places = generator.random([steps, batch])
    inputs = np.empty([steps, batch, *splits[0].inputs.shape[1:]], splits[0].inputs.dtype)
    labels = np.empty([steps, batch], np.int32)
    for index, split in enumerate(splits):
        mine = problems == index
        rows = (places[mine] * len(split)).astype(np.int64)
        chosen = split.inputs[rows]
        inputs[mine] = moved(chosen, shift, generator) if shift else chosen
        labels[mine] = split.labels[rows]
    return Batch(inputs, problems, labels)


def fit(
    model: nn.Module,
    body: Tree,
    heads: Mapping[str, Tree],
    splits: Mapping[str, Split],
    settings: Settings,
    *,
    seed: Sequence[int],
    classes: int,
    parts: Sequence[str] = ("body", "heads"),
    advance: Callable[[int], object] = lambda n: None,
) -> tuple[Tree, dict[str, Tree], np.ndarray]:
    """Trains a body, and its heads if asked, by the mean cross entropy over all problems.

    Args:
        model: the body's module, inputs [n, ...] to features [n, width].
        body: its parameters at the start.
        heads: one head per problem, by name.
        splits: the inputs and labels of each problem, by the same names.
        settings: steps, batch size, learning rate.
        seed: of the order of the examples.
        classes: number of classes that heads are padded to; equal numbers share a compilation.
        parts: what is trained, of 'body', 'heads' and 'adapters' (low-rank factors, which are
            added to the body in the end); the rest stays as it is.
        advance: told the number of steps after each chunk.

    Returns:
        The body's parameters, the heads by name, and the loss of each step, float32 [steps].
    """
    names = list(splits)
    stacked = stack_heads([heads[name] for name in names], classes)
    factors = {}
    if "adapters" in parts:
        key = jax.random.key(np.random.default_rng(list(seed)).integers(2**31))
        factors = adapters(body, settings.rank, key)
    params = {"body": body, "heads": stacked, "adapters": factors}
    trained = {part: params.pop(part) for part in parts}
    state = direction(settings.weight_decay).init(trained)
    rates, decay = learning_rates(settings), jnp.float32(settings.weight_decay)
    generator = np.random.default_rng(list(seed))
    losses, training = [], [splits[name] for name in names]
    for start in range(0, settings.steps, CHUNK):
        steps = min(CHUNK, settings.steps - start)
        batches = draw(training, steps, settings.batch, generator, settings.shift)
        now = rates[start : start + steps]
        trained, state, values = _chunk(trained, state, params, batches, now, decay, model)
        losses.append(np.asarray(values))
        advance(steps)
    params |= trained
    separate = _unstack(params["heads"], [heads[name] for name in names])
    body = adapted(params["body"], params["adapters"]) if factors else params["body"]
    return body, dict(zip(names, separate, strict=True)), np.concatenate(losses)
