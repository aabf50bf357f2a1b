"""Singular value decompositions in the forms that merging needs, on matrices [out, in].

A singular value that is rounding noise has arbitrary singular vectors. Everything here leaves such
directions out, so results depend on the matrices alone: not on the decomposition's choice of
signs, of a basis for equal singular values, or of vectors for zero ones.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mergejax.core import Array
from mergejax.leaves import as_matrix

highest = functools.partial(jax.default_matmul_precision, "highest")


class Triplets(NamedTuple):
    """Singular triplets: left [out, k], values [k], right [in, k]; their matrix is `compose`."""

    left: Array
    values: Array
    right: Array

    @highest()
    def compose(self) -> Array:
        """left · diag(values) · right^T, [out, in]."""
        return (self.left * self.values[None, :]) @ self.right.T


def decompose(x: Array) -> Triplets:
    """The thin singular value decomposition, values descending; all zeros for zeros, at no cost.

    Example:
        >>> decompose(jnp.diag(jnp.asarray([1.0, 3.0]))).values.tolist()
        [3.0, 1.0]
    """

    def factor() -> Triplets:
        left, values, right = jnp.linalg.svd(x, full_matrices=False)
        return Triplets(left, values, right.T)

    def nothing() -> Triplets:
        size = min(x.shape)
        shapes = (x.shape[0], size), (size,), (x.shape[1], size)
        return Triplets(*(jnp.zeros(shape, x.dtype) for shape in shapes))

    return jax.lax.cond(jnp.any(x != 0), factor, nothing)


def is_real(values: Array, shape: tuple[int, ...], largest: Array | None = None) -> Array:
    """Which singular values are above the rounding noise of a matrix of the given shape.

    Args:
        values: [k], descending.
        shape: of the matrix.
        largest: what the noise is relative to; by default the largest value.

    Returns:
        bool [k].
    """
    largest = values[0] if largest is None else largest
    return values > 4 * math.sqrt(max(shape)) * jnp.finfo(values.dtype).eps * largest


def spectral_map(x: Array, function: Callable[[Array], Array]) -> Array:
    """The matrix with its singular values mapped: U f(S) V^T.

    Args:
        x: [out, in].
        function: (values [k], descending, noise set to zero) -> values.

    Returns:
        [out, in]; directions without a singular value stay without.

    Example:
        >>> spectral_map(jnp.diag(jnp.asarray([2.0, 0.0])), lambda values: values + 1).tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    triplets = decompose(x)
    real = is_real(triplets.values, x.shape)
    values = jnp.where(real, function(jnp.where(real, triplets.values, 0.0)), 0.0)
    return triplets._replace(values=values).compose()


@highest()
def gram_filter(x: Array, gram: Array, function: Callable[[Array], Array]) -> Array:
    """A matrix times a function of a symmetric positive semi-definite one: X Q f(L) Q^T.

    Args:
        x: [out, in].
        gram: [in, in], Q L Q^T.
        function: (eigenvalues [in], descending, noise set to zero) -> values; where the
            eigenvalue is zero, zero is taken.

    Returns:
        [out, in].
    """
    values, vectors = jnp.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    real = is_real(values, gram.shape)
    values = jnp.where(real, function(jnp.where(real, values, 0.0)), 0.0)
    return ((x @ vectors) * values[None, :]) @ vectors.T


def unit(x: Array) -> tuple[Array, Array]:
    """A matrix divided by its Frobenius norm, and the norm; zeros stay zeros."""
    largest = jnp.max(jnp.abs(x))
    scaled = x / jnp.where(largest > 0, largest, 1.0)  # so that no square under- or overflows
    norm = jnp.sqrt(jnp.sum(scaled * scaled))
    return scaled / jnp.where(norm > 0, norm, 1.0), largest * norm


def on_matrices(function: Callable[..., Array], layout: str, *kernels: Array) -> Array:
    """Applies a function of matrices [out, in] to kernels of any layout.

    Args:
        function: (one matrix for each kernel) -> matrix of the same shape, zeros for zeros; runs
            in the highest matmul precision, and not at all where all kernels are zero.
        layout: of the kernels, see `leaves.as_matrix`.
        *kernels: arrays of one shape.

    Returns:
        What the function returns, in the kernels' layout.

    Example:
        >>> on_matrices(lambda x: x.at[0].set(0), 'io', jnp.ones((2, 2))).tolist()
        [[0.0, 1.0], [0.0, 1.0]]
    """
    views = [as_matrix(kernel, layout) for kernel in kernels]
    matrices = [matrix.T for matrix, _ in views]
    changed = jnp.any(jnp.stack([jnp.any(matrix != 0) for matrix in matrices]))
    with highest():
        merged = jax.lax.cond(
            changed, lambda: function(*matrices), lambda: jnp.zeros_like(matrices[0])
        )
    return views[0][1](merged.T)
