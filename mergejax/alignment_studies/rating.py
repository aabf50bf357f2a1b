"""How merged networks are rated: accuracy by their own head or by probes, multiplications."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mergejax.alignment_studies import networks
from mergejax.data.task import Task

Tree = Any
PROBE_STEPS = 300


def accuracy_of(both: Sequence[Task], shared: bool) -> Callable[..., float]:
    """How a list of networks, whose outputs are averaged, is rated on both tasks.

    With shared labels by its own head. With different ones, as the authors do, by a linear probe
    for each task, trained on the features before the head.
    """

    def by_head(several: Sequence[tuple[nn.Module, Tree]]) -> float:
        found = []
        for task in both:
            logits = sum(networks.logits(*one, task.test.inputs) for one in several)
            found.append(np.mean(np.argmax(logits, 1) == task.test.labels))
        return float(np.mean(found))

    def by_probe(several: Sequence[tuple[nn.Module, Tree]]) -> float:
        found = []
        for task in both:
            train, test = (
                np.concatenate([features(*one, split.inputs) for one in several], axis=1)
                for split in (task.train, task.test)
            )
            found.append(probe(train, task.train.labels, test, task.test.labels))
        return float(np.mean(found))

    return by_head if shared else by_probe


def features(model: nn.Module, variables: Tree, images: np.ndarray) -> np.ndarray:
    """What reaches the head, [n, width]."""
    starts = range(0, len(images), networks.BATCH)
    read = _features(model)
    parts = [read(variables, images[i : i + networks.BATCH]) for i in starts]
    return np.concatenate(parts)


@functools.lru_cache(maxsize=16)
def _features(model: nn.Module) -> Any:
    def call(variables: Tree, images: jax.Array) -> jax.Array:
        taken = []

        def read(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.module.name == "head":
                taken.append(args[0])
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(read):
            model.apply(variables, images)
        return taken[0]

    return jax.jit(call)


def probe(x: np.ndarray, labels: np.ndarray, test: np.ndarray, wanted: np.ndarray) -> float:
    """Test accuracy of a linear classifier on standardised features, trained by Adam."""
    mean, spread = x.mean(0), x.std(0) + 1e-6
    x, test = ((y - mean) / spread for y in (x, test))
    weights = _probe(jnp.asarray(x), jnp.asarray(labels), int(labels.max()) + 1)
    return float(np.mean(np.argmax(test @ weights[:-1] + weights[-1], 1) == wanted))


@functools.partial(jax.jit, static_argnames="classes")
def _probe(x: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    optimizer = optax.adam(0.02)

    def loss(weights: jax.Array) -> jax.Array:
        logits = x @ weights[:-1] + weights[-1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry: tuple[jax.Array, Any], _: None) -> tuple[Any, None]:
        weights, state = carry
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, state = optimizer.update(jax.grad(loss)(weights), state)
        return (weights + updates, state), None  # type: ignore[operator]

    start = jnp.zeros((x.shape[1] + 1, classes), x.dtype)
    (weights, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=PROBE_STEPS)
    return weights


def multiplications(model: nn.Module, variables: Tree, images: np.ndarray) -> float:
    """Weights of all layers that are not zero, each as often as it is applied (pixels, tokens)."""
    times, params = uses(model, variables, images), variables["params"]
    return sum(
        often * float(np.count_nonzero(params[name.split("/")[1]]["kernel"]))
        for name, often in times.items()
    )


def uses(model: nn.Module, variables: Tree, images: np.ndarray) -> dict[str, float]:
    """By kernel, to how many places of one image it is applied."""

    def traced(variables: Tree) -> Tree:
        return model.apply(variables, images, capture_intermediates=True)[1]["intermediates"]

    outputs, params = jax.eval_shape(traced, variables), variables["params"]
    return {
        f"params/{name}/kernel": float(np.prod(outputs[name]["__call__"][0].shape[1:-1]))
        for name, layer in params.items()
        if isinstance(layer, Mapping) and "kernel" in layer
    }
