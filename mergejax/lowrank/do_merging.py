"""DO-Merging: magnitudes and directions apart, the directions made orthogonal."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mergejax.core import Array
from mergejax.hyper import NonNegative, Positive, Scaling
from mergejax.lowrank.factors import Adapter, Factors, folded
from mergejax.lowrank.methods import adapter_method, numbers_at


@functools.partial(jax.jit, static_argnames="steps")
def mixture(gram: Array, penalty: Array, step_size: Array, steps: int) -> Array:
    """The mixture of directions, [N, N], that makes them orthogonal and stays near the identity.

    Args:
        gram: inner products of the directions, [N, N].
        penalty: of the distance from the identity.
        step_size: of Adam.
        steps: of Adam.
    """
    count = len(gram)
    identity = jnp.eye(count, dtype=gram.dtype)
    above = jnp.triu(jnp.ones_like(gram), 1)

    def loss(moved: Array) -> Array:
        mixed = identity + moved
        overlaps = above * (mixed @ gram @ mixed.T)
        return jnp.sum(overlaps**2) + penalty * jnp.sum((moved @ gram) * moved)

    import optax  # here, for it takes a third of the time that JAX does

    optimiser = optax.adam(step_size)

    def step(state: tuple, _: None) -> tuple[tuple, None]:
        moved, inner = state
        gradient = jax.grad(loss)(moved)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, inner = optimiser.update(gradient, inner)
        return (optax.apply_updates(moved, updates), inner), None

    start = jnp.zeros_like(gram)
    (moved, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), length=steps)
    return identity + moved


def _row_norms(down: Array, up: Array) -> Array:
    """The norms of the rows of a product, without the product."""
    return jnp.sqrt(jnp.maximum(jnp.sum((down @ (up @ up.T)) * down, 1), 0))


def _inverse(x: Array) -> Array:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1.0), 0.0)


@adapter_method
def do_merging(
    adapters: Sequence[Adapter],
    penalty: NonNegative = 1.0,
    scaling: Scaling = 1.0,
    steps: int = 200,
    step_size: Positive = 0.01,
) -> dict[str, Factors]:
    r"""Averages magnitudes, makes directions orthogonal and adds them up.

    .. math:: \mu_i[j]=\|\Delta_i[j]\|,\quad D_i=\Delta_i/\mu_i,\qquad
        \min_E\sum_{i<j}\langle D_i+E_i,\,D_j+E_j\rangle^2+\gamma\sum_i\|E_i\|^2,\qquad
        \Delta=\lambda\,diag(\bar\mu)\,normalize\Big(\sum_i (D_i+E_i)\Big)

    with j an input of the layer, inner products divided by the number of inputs, and every row of
    the sum normalised. E is sought among the mixtures of the directions, where gradient descent
    from zero stays, so everything is exact on the factors.

    Args:
        adapters: one per expert.
        penalty: :math:`\gamma`; the larger, the nearer to the sum of the directions.
        scaling: :math:`\lambda`.
        steps: of Adam.
        step_size: of Adam.

    Returns:
        An adapter, of the sum of the ranks; one adapter comes back as it is.

    Example:
        >>> adapters = [{'q': Factors(jnp.full((1, 1), x), jnp.ones((1, 1)))} for x in (1.0, 3.0)]
        >>> merged = do_merging(adapters)['q']
        >>> print((merged.down @ merged.up).round(4))
        [[2.]]

    DO-Merging (2025). A proposal after its abstract: the authors' formulas and code were not at
    hand, and the penalty, steps and step size are of this library.
    """
    return {
        name: _merged(
            [adapter[name] for adapter in adapters],
            numbers_at(penalty, name, 1)[0],
            numbers_at(step_size, name, 1)[0],
            numbers_at(scaling, name, 1)[0],
            steps,
        )
        for name in adapters[0]
    }


@functools.partial(jax.jit, static_argnames="steps")
def _merged(
    several: Sequence[Factors], penalty: Array, step_size: Array, scaling: Array, steps: int
) -> Factors:
    pairs = [folded(factors) for factors in several]
    sizes = [_row_norms(down, up) for down, up in pairs]
    directions = [
        (_inverse(size)[:, None] * down, up) for size, (down, up) in zip(sizes, pairs, strict=True)
    ]
    rows = [[jnp.sum((a.T @ c) * (b @ d.T)) for c, d in directions] for a, b in directions]
    gram = jnp.stack([jnp.stack(row) for row in rows]) / len(sizes[0])
    weights = mixture(gram, penalty, step_size, steps).sum(0)
    down = jnp.concatenate([w * a for w, (a, _) in zip(weights, directions, strict=True)], 1)
    up = jnp.concatenate([b for _, b in directions])
    length = scaling * jnp.stack(sizes).mean(0)
    return Factors((length * _inverse(_row_norms(down, up)))[:, None] * down, up, jnp.float32(1))
