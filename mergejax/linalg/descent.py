"""Gradient descent on one layer for a fixed number of steps: early stopping is part of a method."""

from collections.abc import Callable
from typing import Any

import jax

from mergejax.core import Array


def descend(
    gradient: Callable[[Array], Any],
    start: Array,
    optimizer: Any,
    steps: int,
) -> Array:
    """Takes so many steps of an optimiser.

    Args:
        gradient: (x) -> what the optimiser takes for its update, as a rule the gradient at x.
        start: x before the first step.
        optimizer: an `optax.GradientTransformation`.
        steps: static.

    Returns:
        x after the last step.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> descend(lambda x: x, jnp.ones(2), optax.sgd(0.5), 3).tolist()
        [0.125, 0.125]
    """

    def step(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], None]:
        x, state = carry
        slope = gradient(x)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            update, state = optimizer.update(slope, state, x)
        return (x + update, state), None  # type: ignore[operator]

    (x, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
    return x
