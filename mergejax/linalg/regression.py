"""Least squares on the outputs of one layer, of several experts together."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mergejax.core import Array
from mergejax.leaves import as_matrix
from mergejax.linalg.solve import safe_solve
from mergejax.linalg.spectral import highest


def on_layers(function, layout: str, *kernels: Array) -> Array:
    """Applies a function of matrices [in, out] to kernels in any layout, and takes it back.

    Example:
        >>> on_layers(lambda a, b: a + b, 'oi', jnp.ones((3, 2)), jnp.ones((3, 2))).shape
        (3, 2)
    """
    views = [as_matrix(kernel, layout) for kernel in kernels]
    return views[0][1](function(*(matrix for matrix, _ in views)))


def on_groups(function, layout: str, kernels: Sequence[Array], grams: Sequence[Array]) -> Any:
    """Applies a function of matrices [in, out] and their Gram matrices to kernels in any layout.

    A grouped convolution has a Gram matrix for each group, [groups, in, in], and its outputs are
    those of the groups one after the other: to the function each group is a layer of its own.

    Args:
        function: (matrices, grams) -> a matrix [in, out], or a tree of them.
        layout: of the kernels.
        kernels: in that layout.
        grams: [in, in] or [groups, in, in].

    Returns:
        What the function gives, its matrices as kernels.

    Example:
        >>> kernel, grams = jnp.ones((1, 1, 1, 2)), [jnp.asarray([[[2.0]], [[3.0]]])]
        >>> on_groups(lambda ws, gs: gs[0] @ ws[0], 'hwio', [kernel], grams).ravel().tolist()
        [2.0, 3.0]
    """
    views = [as_matrix(kernel, layout) for kernel in kernels]
    found = by_groups(function, [matrix for matrix, _ in views], grams)
    return jax.tree.map(views[0][1], found)


def by_groups(function, matrices: Sequence[Array], grams: Sequence[Array]) -> Any:
    """`on_groups` for matrices [in, out] in place of kernels.

    Example:
        >>> ws, gs = [jnp.ones((1, 4))], [jnp.asarray([[[2.0]], [[3.0]]])]
        >>> by_groups(lambda ws, gs: gs[0] @ ws[0], ws, gs).tolist()
        [[2.0, 2.0, 3.0, 3.0]]
    """
    if grams[0].ndim == 2:
        return function(list(matrices), list(grams))
    apart = [jnp.moveaxis(m.reshape(len(m), len(grams[0]), -1), 1, 0) for m in matrices]
    found = jax.vmap(function)(apart, list(grams))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1), found)


@highest()
def regress(
    targets: Sequence[Array], grams: Sequence[Array], reference: Array, ridge: Array | float = 0.0
) -> Array:
    r"""The layer that is nearest to its experts' outputs.

    .. math:: \arg\min_W\ \sum_i tr\big((W-W_i)^\top G_i(W-W_i)\big) + \lambda\|W-W_{ref}\|^2

    What the data leave open stays at the reference.

    Args:
        targets: W_i [in, out].
        grams: G_i [in, in], positive semi-definite.
        reference: W_ref [in, out].
        ridge: :math:`\lambda`, at least 0.

    Returns:
        W [in, out].

    Example:
        >>> grams = [jnp.diag(jnp.array([1.0, 0.0])), jnp.diag(jnp.array([3.0, 0.0]))]
        >>> targets = [jnp.zeros((2, 1)), jnp.ones((2, 1))]
        >>> print((100 * regress(targets, grams, jnp.full((2, 1), 0.25))).ravel().round())
        [75. 25.]
    """
    residual: Any = sum(gram @ (w - reference) for gram, w in zip(grams, targets, strict=True))
    whole: Any = sum(grams) + ridge * jnp.eye(reference.shape[0], dtype=reference.dtype)
    return reference + safe_solve(whole, residual)


def shrunk(gram: Array, alpha: Array | float) -> Array:
    r""":math:`\alpha G+(1-\alpha)\,diag(G)`.

    Example:
        >>> shrunk(jnp.ones((2, 2)), 0.5).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    diagonal = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    return alpha * gram + (1 - alpha) * gram * diagonal


def unit_gram(gram: Array) -> Array:
    """A Gram matrix divided by its Frobenius norm, so that a ridge means the same everywhere.

    Example:
        >>> print((10 * unit_gram(jnp.diag(jnp.array([3.0, 4.0])))).round())
        [[6. 0.]
         [0. 8.]]
    """
    # The norm of a scaled matrix: squares of small Gram matrices would vanish.
    largest = jnp.abs(gram).max()
    safe = jnp.where(largest > 0, largest, 1)
    scaled = gram / safe
    norm = jnp.sqrt(jnp.sum(jnp.square(scaled)))
    return scaled / jnp.where(norm > 0, norm, 1)


@highest()
def conjugate_gradients(
    operator, right: Array, start: Array, steps: int, tolerance: Array | float
) -> Array:
    """So many steps of conjugate gradients on operator(x) = right, from a start.

    The start's residual is solved for, so that a start that solves the system stays to the bit.

    Args:
        operator: linear, symmetric, positive semi-definite.
        right: the right-hand side, of the start's shape.
        start: x before the first step.
        steps: at most so many; static.
        tolerance: stops where the residual's norm is this share of the start's.

    Returns:
        x after the last step.

    Example:
        >>> conjugate_gradients(lambda x: 2 * x, jnp.ones(2), jnp.zeros(2), 5, 1e-6).tolist()
        [0.5, 0.5]
    """
    residual = right - operator(start)
    change, _ = jax.scipy.sparse.linalg.cg(operator, residual, tol=tolerance, maxiter=steps)
    return start + change
