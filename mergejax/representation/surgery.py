"""Representation Surgery: an adapter per task behind a merged model, trained without labels."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mergejax.core import Array
from mergejax.errors import MergeError


class Adapter(NamedTuple):
    """What is taken off a representation: z ↦ z − relu(z D) U.

    Attributes:
        down: D [features, rank].
        up: U [rank, features].
    """

    down: Array
    up: Array


def operate(adapter: Adapter, z: Array) -> Array:
    """Applies an adapter to representations [n, features].

    Example:
        >>> operate(Adapter(jnp.ones((2, 1)), jnp.ones((1, 2))), jnp.ones((1, 2))).tolist()
        [[-1.0, -1.0]]
    """
    return z - jax.nn.relu(z @ adapter.down) @ adapter.up


def adapt(
    merged: Any,
    expert: Any,
    *,
    rank: int = 16,
    steps: int = 1000,
    batch: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> tuple[Adapter, np.ndarray]:
    r"""Trains a task's adapter to give its expert's representations.

    .. math:: \min_{D,U}\ mean\,|z-relu(zD)U-y|

    by Adam, from a random D and U = 0, so that nothing changes at first.

    Args:
        merged: z [n, features], the merged model's final representations of unlabelled inputs.
        expert: y [n, features], the expert's, of the same inputs.
        rank: of the adapter.
        steps: of Adam.
        batch: examples a step, drawn with replacement; all of them where there are fewer.
        learning_rate: of Adam.
        seed: of D and of the batches.

    Returns:
        The adapter, and the loss of each step, float32 [steps].

    Raises:
        MergeError: no examples, shapes that do not fit, values out of range or not finite.

    Example:
        >>> z = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)), jnp.float32)
        >>> adapter, losses = adapt(z, 0.5 * z, steps=300, learning_rate=1e-2)
        >>> bool(losses[-1] < losses[0] / 2)
        True

    Representation surgery for multi-task model merging (Yang et al., 2024, arXiv:2402.02705). The
    authors train on the test stream; here the inputs are whatever is passed.
    """
    z, y = np.asarray(merged, np.float32), np.asarray(expert, np.float32)
    if z.ndim != 2 or z.shape != y.shape or not len(z):
        raise MergeError(
            f"surgery: representations have shapes {z.shape} and {y.shape}, expected [examples, "
            "features] for both, with at least one example"
        )
    if not np.isfinite(z).all() or not np.isfinite(y).all():
        raise MergeError("surgery: representations are not finite; check the inputs")
    if rank < 1 or steps < 0 or batch < 1 or not learning_rate > 0:
        raise MergeError(
            f"surgery: rank={rank}, steps={steps}, batch={batch}, learning_rate={learning_rate}; "
            "expected a rank and a batch of at least 1, no negative steps and a positive rate"
        )
    features = z.shape[1]
    draw, order = jax.random.split(jax.random.key(seed))
    bound = features**-0.5  # what Kaiming's uniform initialisation with a = sqrt 5 comes to
    down = jax.random.uniform(draw, (features, rank), minval=-bound, maxval=bound)
    start = Adapter(down, jnp.zeros((rank, features)))
    rows = jax.random.randint(order, (steps, min(batch, len(z))), 0, len(z))
    adapter, losses = _train(start, jnp.asarray(z), jnp.asarray(y), rows, learning_rate)
    return adapter, np.asarray(losses)


@functools.partial(jax.jit, static_argnames="learning_rate")
def _train(
    adapter: Adapter, z: Array, y: Array, rows: Array, learning_rate: float
) -> tuple[Adapter, Array]:
    optimizer = optax.adam(learning_rate)

    def loss(adapter: Adapter, chosen: Array) -> Array:
        return jnp.abs(operate(adapter, z[chosen]) - y[chosen]).mean()

    def step(carry: Any, chosen: Array) -> tuple[Any, Array]:
        adapter, state = carry
        value, slope = jax.value_and_grad(loss)(adapter, chosen)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            update, state = optimizer.update(slope, state, adapter)
        return (optax.apply_updates(adapter, update), state), value

    (adapter, _), losses = jax.lax.scan(step, (adapter, optimizer.init(adapter)), rows)
    return adapter, losses
