"""Leading singular triplets and polar factors through the smaller Gram matrix, under control.

An eigendecomposition of the smaller Gram matrix takes a fraction of the time of a singular value
decomposition, and squares the condition number. What that has cost is measured: with eigenvectors V
that are orthonormal to rounding, U = X V / S makes X = U S V^T whatever V is, so that all of the
error is in E = U^T U - I. Where it is too large, the singular value decomposition takes its place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from mergejax.core import Array
from mergejax.linalg.spectral import Triplets, decompose, highest, is_real, spectral_map, unit

TOLERANCE = 2e-5  # root mean square, over the vectors, of what they lack to being orthonormal
GAP_TOLERANCE = 1e-4  # what a truncation may move by, relative, between two close singular values


class _Gram(NamedTuple):
    triplets: Triplets
    squares: Array  # all eigenvalues, descending
    error: Array  # U^T U - I, zero where there is no singular value
    good: Array


def _by_gram(tall: Array, rank: Array | int, width: int) -> _Gram:
    """The first triplets of a matrix of unit norm [m, n], m >= n, zero behind the rank."""
    squares, vectors = jnp.linalg.eigh(tall.T @ tall)
    squares, right = squares[::-1], vectors[:, ::-1][:, :width]
    outer = tall @ right
    values = jnp.sqrt(jnp.sum(outer * outer, axis=0))
    kept = (jnp.arange(width) < rank) & is_real(values, tall.shape, values.max())
    left = outer * jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)[None, :]
    ones = kept.astype(tall.dtype)
    error = left.T @ left - jnp.diag(ones)
    good = jnp.sum(error * error) <= TOLERANCE**2 * ones.sum()
    triplets = Triplets(left, values * ones, right * ones[None, :])
    return _Gram(triplets, squares, error, good)


def _is_apart(gram: _Gram, rank: Array | int) -> Array:
    """Whether rounding of the Gram matrix exchanges little between the kept and the other values.

    The subspace turns by the rounding over the gap of the eigenvalues (Davis and Kahan, 1970), and
    that times the last value kept is what the truncated matrix moves by. Nothing is cut where the
    rank reaches to the zeros.
    """
    place = jnp.asarray(rank, jnp.int32)
    last = jnp.take(gram.triplets.values, jnp.maximum(place - 1, 0)) ** 2
    after = jnp.where(place < len(gram.squares), jnp.take(gram.squares, place, mode="clip"), 0.0)
    rounding = jnp.finfo(last.dtype).eps * gram.squares[0]
    mass = jnp.sqrt(jnp.sum(gram.triplets.values**2))
    return (last == 0) | (rounding * jnp.sqrt(last) <= GAP_TOLERANCE * (last - after) * mass)


def _checked(fast, accurate):
    """A fast function where it finds itself good, an accurate one elsewhere and for derivatives.

    Both take (matrix, rank); the fast one gives its result and whether it is good. A plain vmap
    would always run both.
    """

    @sequential_vmap
    def choose(tall: Array, rank: Array):
        def tried():
            result, good = fast(tall, rank)
            return jax.lax.cond(good, lambda: result, lambda: accurate(tall, rank))

        return jax.lax.cond(jnp.any(tall != 0), tried, lambda: accurate(tall, rank))

    chosen = jax.custom_jvp(choose)

    @chosen.defjvp
    def derivative(primals, tangents):
        tall, rank = primals
        return jax.jvp(lambda x: accurate(x, rank), (tall,), tangents[:1])

    return chosen


@highest()
def principal(x: Array, rank: Array | int, width: int) -> Triplets:
    """The leading singular triplets of a matrix [out, in].

    Args:
        x: [out, in].
        rank: how many, at most `width`; may be traced.
        width: number of columns, static.

    Returns:
        Triplets with `width` columns, zero behind the rank and where there is no singular value.

    Example:
        >>> principal(jnp.diag(jnp.asarray([1.0, 3.0])), 1, 2).values.tolist()
        [3.0, 0.0]
    """

    def fast(tall: Array, rank: Array) -> tuple[Triplets, Array]:
        direction, norm = unit(tall)
        gram = _by_gram(direction, rank, width)
        found = gram.triplets._replace(values=norm * gram.triplets.values)
        return found, gram.good & _is_apart(gram, rank)

    def accurate(tall: Array, rank: Array) -> Triplets:
        whole = decompose(tall)
        kept = is_real(whole.values, tall.shape) & (jnp.arange(len(whole.values)) < rank)
        ones = kept.astype(tall.dtype)[:width]
        left, values, right = (part[..., :width] for part in whole)
        return Triplets(left * ones[None, :], values * ones, right * ones[None, :])

    flip = x.shape[0] < x.shape[1]
    found = _checked(fast, accurate)(x.T if flip else x, jnp.asarray(rank, jnp.int32))
    return Triplets(found.right, found.values, found.left) if flip else found


def truncate(x: Array, rank: Array | int) -> Array:
    """The nearest matrix of a rank, which may be traced."""
    return principal(x, rank, min(x.shape)).compose()


@highest()
def polar(x: Array) -> Array:
    """The orthogonal factor U V^T of X = U S V^T, over the singular values that are not zero.

    Columns of zeros stay zero and equal columns share a direction, where a polar factor with
    orthonormal columns would fill in arbitrary ones. A step of Newton and Schulz removes what the
    Gram route lacks to being orthonormal; what it cannot see, a rotation, is never larger.

    Example:
        >>> polar(jnp.asarray([[2.0, 0.0], [0.0, 0.0]])).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    m, n = x.shape
    if m < n:
        return polar(x.T).T

    def fast(tall: Array, rank: Array) -> tuple[Array, Array]:
        (left, _, right), _, error, good = _by_gram(unit(tall)[0], rank, n)
        return left @ (right.T - 0.5 * error @ right.T), good

    def accurate(tall: Array, rank: Array) -> Array:
        return spectral_map(tall, jnp.ones_like)

    if m < 2 * n:  # nearly square: too often ill-conditioned, and little to win
        return accurate(x, jnp.int32(n))
    return _checked(fast, accurate)(x, jnp.int32(n))
