"""Straight-through matching: permutations that make the midpoint of two networks good."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mergejax.alignment.permutations import moved
from mergejax.alignment.structure import Symmetries
from mergejax.alignment.weights import Matching, weight_matching
from mergejax.collect.streaming import running
from mergejax.door import Tree
from mergejax.errors import MergeError


def straight_through(
    symmetries: Symmetries,
    reference: Tree,
    params: Tree,
    loss: Callable[[Tree, Any], jax.Array],
    batches: Iterable[Any],
    *,
    optimizer: optax.GradientTransformation | None = None,
    seed: int = 0,
) -> Matching:
    r"""Aligns a model to a reference by the loss half-way between them.

    A trainable copy :math:`\hat\theta` of the reference is matched by weights at every step,
    :math:`\pi = WM(\hat\theta, B)`, warm-started from the step before. The loss at the midpoint
    :math:`\tfrac12(A + \pi(B))` is differentiated as if :math:`\pi(B)` were :math:`\hat\theta`. The
    permutations with the smallest loss are kept.

    Args:
        symmetries: of both models.
        reference: the model A that stays, floating-point leaves only.
        params: the model B that is moved.
        loss: (params, batch) -> number.
        batches: one step each; as many epochs as it yields.
        optimizer: of the copy; by default SGD with rate 0.01 and momentum 0.9.
        seed: of the order of groups.

    Returns:
        A `Matching`.

    Raises:
        MergeError: as `weight_matching`; no batch; a loss that is not finite from the start.

    Example:
        >>> from mergejax import alignment
        >>> mlp = alignment.Symmetries({'h': alignment.Group(2)}, {'w': (None, 'h')})
        >>> a, b = {'w': jnp.array([[1.0, 2.0]])}, {'w': jnp.array([[2.0, 1.0]])}
        >>> loss = lambda p, x: ((p['w'] - x) ** 2).sum()
        >>> straight_through(mlp, a, b, loss, [a['w']] * 2).permutations['h'].tolist()
        [1, 0]

    Git Re-Basin (Ainsworth et al., 2023, arXiv:2209.04836), section 3.3.
    """
    optimizer = optax.sgd(1e-2, momentum=0.9) if optimizer is None else optimizer
    copy = jax.tree.map(jnp.asarray, reference)
    state = optimizer.init(copy)

    def middle(copy: Tree, aligned: Tree, batch: Any) -> jax.Array:
        def half(a: Any, b: Any, c: Any) -> Any:
            return (a + jax.lax.stop_gradient(b - c) + c) / 2

        return loss(jax.tree.map(half, reference, aligned, copy), batch)

    @jax.jit
    def step(copy: Tree, state: Any, aligned: Tree, batch: Any) -> tuple[Any, Any, Any]:
        value, gradient = jax.value_and_grad(middle)(copy, aligned, batch)
        updates, state = optimizer.update(gradient, state, copy)
        return optax.apply_updates(copy, updates), state, value

    best, least, start = None, np.inf, None
    for number, batch in enumerate(batches, start=1):
        found = weight_matching(symmetries, copy, params, seed=seed, start=start)
        aligned = jax.tree.map(jnp.asarray, moved(symmetries, found.permutations, params))
        with running("straight_through", f"batch {number}", batch):
            copy, state, value = step(copy, state, aligned, batch)
        start = found.permutations
        if float(value) < least:
            best, least = found, float(value)
    if best is None:
        raise MergeError(
            "straight_through: no batch gave a loss that is a finite number; pass at least one "
            "batch, and check the loss at the midpoint"
        )
    return best
