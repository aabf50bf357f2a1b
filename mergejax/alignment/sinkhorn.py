"""Optimal transport between uniform distributions of units: entropic, or exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sparse
from scipy.optimize import linprog

from mergejax.alignment.assignment import assign
from mergejax.errors import MergeError


def coupling(distances: np.ndarray, epsilon: float, steps: int = 500) -> np.ndarray:
    r"""How mass goes from units to units at the least cost, every unit having the same.

    .. math:: \min_T \langle T, D\rangle + \epsilon\sum_{ij} T_{ij}(\log T_{ij} - 1),\quad
        T1 = \tfrac1n 1,\quad T^\top1 = \tfrac1m 1

    Args:
        distances: D, [..., n, m].
        epsilon: of the entropy, in the units of D; 0 for the exact solution: linear assignment, or
            the linear programme where n is not m.
        steps: of Sinkhorn's iteration in the logarithmic domain.

    Returns:
        T, float64 [..., n, m], with sum one.

    Raises:
        MergeError: a negative epsilon; distances that are not finite.

    Example:
        >>> coupling(np.array([[0.0, 1.0], [1.0, 0.0]]), 0.0).tolist()
        [[0.5, 0.0], [0.0, 0.5]]

    Cuturi, 2013, arXiv:1306.0895.
    """
    if epsilon < 0:
        raise MergeError(f"coupling: epsilon is {epsilon}, expected at least 0")
    if not np.isfinite(distances).all():
        raise MergeError("coupling: distances are not finite; check the models for NaN and Inf")
    if epsilon:
        return np.asarray(_sinkhorn(jnp.asarray(distances, jnp.float32), epsilon, steps), float)
    *outer, n, m = distances.shape
    solve = _assigned if n == m else _programmed
    found = [solve(one) for one in distances.reshape(-1, n, m)]
    return np.asarray(found).reshape(*outer, n, m)


def ott_coupling(distances: np.ndarray, epsilon: float) -> np.ndarray:
    """`coupling` by the solver of `ott-jax`, which stops by itself where the sums are met.

    Args:
        distances: D, [..., n, m].
        epsilon: of the entropy, above 0.

    Returns:
        T, float64 [..., n, m], with sum one.

    Raises:
        MergeError: no `ott-jax`; an epsilon of 0 or below.

    Cuturi et al., 2022, arXiv:2201.12324.
    """
    if epsilon <= 0:
        raise MergeError(
            f"ott_coupling: epsilon is {epsilon}, expected above 0; hard transport is `coupling`'s"
        )
    try:
        from ott.geometry.geometry import Geometry
        from ott.solvers import linear
    except ImportError:
        raise MergeError(
            "ott_coupling needs ott-jax; pip install 'mergejax[transport]', or leave `couple` out"
        ) from None
    solve = lambda one: linear.solve(Geometry(cost_matrix=one, epsilon=epsilon)).matrix
    *outer, n, m = distances.shape
    # As its code is written, whatever this process asks of its own.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        found = jax.vmap(solve)(jnp.asarray(distances, jnp.float32).reshape(-1, n, m))
    return np.asarray(found, np.float64).reshape(*outer, n, m)


@functools.partial(jax.jit, static_argnames="steps")
def _sinkhorn(distances: jax.Array, epsilon: float, steps: int) -> jax.Array:
    n, m = distances.shape[-2:]
    scaled = -distances / epsilon

    def step(_: int, potentials: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        f = -jax.nn.logsumexp(scaled + potentials[1], axis=-1, keepdims=True) - jnp.log(n)
        return f, -jax.nn.logsumexp(scaled + f, axis=-2, keepdims=True) - jnp.log(m)

    start = jnp.zeros_like(scaled[..., :1]), jnp.zeros_like(scaled[..., :1, :])
    f, g = jax.lax.fori_loop(0, steps, step, start)
    return jnp.exp(scaled + f + g)


def _assigned(distances: np.ndarray) -> np.ndarray:
    return np.eye(len(distances))[assign(-distances)] / len(distances)


def _programmed(distances: np.ndarray) -> np.ndarray:
    n, m = distances.shape
    rows = sparse.kron(sparse.eye(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye(m))
    mass = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    found = linprog(distances.ravel(), A_eq=sparse.vstack([rows, columns]), b_eq=mass)
    return found.x.reshape(n, m)
