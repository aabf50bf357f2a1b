"""Networks that are trained from different seeds, and whose widths a merge may change."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mergejax import alignment, fit
from mergejax.alignment_studies.transformers import Transformer
from mergejax.checkpoints import orbax
from mergejax.data.task import Split
from mergejax.progress import Reporter

Tree = Any
BATCH = 250  # images at once where nothing is trained


class Perceptron(nn.Module):
    """Dense layers with ReLU between.

    Attributes:
        widths: of the hidden layers.
        classes: number of logits.
    """

    widths: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [n, height, width, channels] to logits [n, classes]."""
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class Residual(nn.Module):
    """Residual network of basic blocks with BatchNorm, every width free.

    Attributes:
        streams: channels of the residual stream, one number per stage; each but the first halves
            the sides.
        inner: channels inside each block, as many blocks for every stage.
        classes: number of logits.

    Source: He et al. 2016, arXiv:1512.03385, the networks for CIFAR, with projections.
    """

    streams: Sequence[int]
    inner: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [n, height, width, channels] to logits [n, classes]."""

        def conv(x: jax.Array, width: int, name: str, size: int = 3, stride: int = 1) -> jax.Array:
            x = nn.Conv(width, (size, size), stride, use_bias=False, name=name)(x)
            return nn.BatchNorm(not train, momentum=0.9, name=f"{name}_norm")(x)

        x = nn.relu(conv(2 * x - 1, self.streams[0], "stem"))
        each = len(self.inner) // len(self.streams)
        for i, inner in enumerate(self.inner):
            stage, place = divmod(i, each)
            stride = 2 if stage and not place else 1
            y = nn.relu(conv(x, inner, f"block_{i}_in", stride=stride))
            y = conv(y, self.streams[stage], f"block_{i}_out")
            if stride > 1:
                x = conv(x, self.streams[stage], f"block_{i}_shortcut", 1, 2)
            x = nn.relu(x + y)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def rebuilt(model: Residual, variables: Tree) -> Residual:
    """The module of a merged network, whose widths are those of its leaves.

    Example:
        >>> wide = Residual((6, 8), (7, 9), 3)
        >>> variables = wide.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        >>> rebuilt(Residual((4, 4), (4, 4), 3), variables) == wide
        True
    """

    def width(layer: str) -> int:
        return int(variables["params"][layer]["kernel"].shape[-1])

    each = len(model.inner) // len(model.streams)
    inner = tuple(width(f"block_{i}_in") for i in range(len(model.inner)))
    streams = tuple(width(f"block_{i}_out") for i in range(0, len(inner), each))
    return model.clone(streams=streams, inner=inner)


@functools.partial(jax.jit, static_argnames="model", donate_argnums=(0, 1))
def _step(
    variables: Tree,
    state: Tree,
    batch: fit.Batch,
    rate: jax.Array,
    decay: jax.Array,
    model: nn.Module,
) -> tuple[Tree, Tree]:
    """Takes one step; returns variables and optimiser state.

    Not a scan over steps as in `fit`: on the CPU a convolution inside a loop is ten times slower.
    """

    def loss(params: Tree) -> tuple[jax.Array, Tree]:
        logits, moved = model.apply(
            {**variables, "params": params},
            batch.inputs,
            train=True,
            mutable=["batch_stats", "losses"],
        )
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        kept = dict(moved)
        return sum(jax.tree.leaves(kept.pop("losses", {})), each.mean()), kept

    params = variables["params"]
    gradient, moved = jax.grad(loss, has_aux=True)(params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, state = fit.direction(decay).update(gradient, state, params)
    params = jax.tree.map(lambda x, update: x - rate * update, params, updates)
    return {"params": params, **moved}, state


def train(
    model: nn.Module,
    variables: Tree,
    split: Split,
    settings: fit.Settings,
    seed: Sequence[int],
    advance: Callable[[int], object] = lambda n: None,
) -> Tree:
    """Trains a network with AdamW by its mean cross entropy, as `fit.fit` does.

    What layers sow as 'losses' is added.

    Args:
        model: a module that is called on images and `train`.
        variables: at the start, running statistics included.
        split: what it learns from.
        settings: steps, batch size, learning rate.
        seed: of the order of the examples.
        advance: told the number of steps after each chunk.

    Returns:
        The variables at the end.
    """
    state = fit.direction(settings.weight_decay).init(variables["params"])
    variables = jax.tree.map(jnp.array, variables)  # a copy, which steps may overwrite
    rates, decay = fit.learning_rates(settings), jnp.float32(settings.weight_decay)
    generator = np.random.default_rng(list(seed))
    for start in range(0, settings.steps, fit.CHUNK):
        steps = min(fit.CHUNK, settings.steps - start)
        batches = fit.draw([split], steps, settings.batch, generator, settings.shift)
        for i in range(steps):
            batch = jax.tree.map(lambda x, i=i: x[i], batches)  # type: ignore[misc]
            rate = rates[start + i]
            variables, state = _step(variables, state, batch, rate, decay, model)
        advance(steps)
    return variables


def trained(
    model: nn.Module,
    split: Split,
    settings: fit.Settings,
    seed: Sequence[int],
    path: pathlib.Path,
    book: Reporter,
) -> Tree:
    """A network drawn and trained from a seed, or as it was kept in `path`."""
    if not orbax.is_saved(path):
        key = jax.random.key(np.random.default_rng(list(seed)).integers(2**31))
        variables = jax.jit(model.init)(key, split.inputs[:1])
        with book.progress(f"train {path.name}", settings.steps) as advance:
            variables = train(model, variables, split, settings, seed, advance)
        orbax.save(path, variables)
    return jax.tree.map(np.asarray, orbax.restore(path))


def batches_of(images: np.ndarray) -> list[np.ndarray]:
    """Images in batches of `BATCH`; the rest is left out."""
    return [images[i : i + BATCH] for i in range(0, len(images) - BATCH + 1, BATCH)]


def logits(model: nn.Module, variables: Tree, images: np.ndarray) -> np.ndarray:
    """What a network says of many images, [n, classes]."""
    starts = range(0, len(images), BATCH)
    return np.concatenate([function(model)(variables, images[i : i + BATCH]) for i in starts])


def reestimated(model: nn.Module, variables: Tree, batches: Sequence[np.ndarray]) -> Tree:
    """A network whose running statistics of BatchNorm were measured anew."""
    found = alignment.reestimate(
        lambda stats, images: _moved({**variables, "batch_stats": stats}, images, model),
        variables["batch_stats"],
        batches,
    )
    return {**variables, "batch_stats": jax.tree.map(np.asarray, found)}


@functools.partial(jax.jit, static_argnames="model")
def _moved(variables: Tree, images: jax.Array, model: nn.Module) -> Tree:
    moved = model.apply(variables, images, train=True, mutable=["batch_stats"])[1]
    return moved["batch_stats"]


def interpolate(a: Tree, b: Tree, share: float) -> Tree:
    """(1 - share) a + share b."""
    return jax.tree.map(lambda x, y: ((1 - share) * x + share * y).astype(x.dtype), a, b)


@functools.lru_cache(maxsize=16)
def function(model: nn.Module) -> Any:
    """(variables, images) -> logits, compiled once for all networks of one module."""
    return jax.jit(lambda variables, images: model.apply(variables, images))


KINDS: Mapping[str, Callable[..., nn.Module]] = {
    "perceptron": Perceptron,
    "residual": Residual,
    "transformer": Transformer,
}


def build(settings: Mapping[str, Any], classes: int) -> nn.Module:
    """The module of a network that a config describes by `kind` and its widths."""
    widths = {
        n: x if isinstance(x, int) else tuple(x)
        for n, x in settings.items()
        if n not in ("kind", "task")
    }
    return KINDS[settings["kind"]](**widths, classes=classes)
