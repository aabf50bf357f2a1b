"""A linear solve for sums of Gram matrices that stays finite when they are singular."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.scipy.linalg import cho_solve

from mergejax.errors import MergeError

DEAD = 1e-12  # a feature whose diagonal entry is below this share of the largest is never active
HIGHEST = lax.Precision.HIGHEST


def safe_solve(matrix: jax.Array, right_hand_side: jax.Array) -> jax.Array:
    """Solves S Δ = R for a positive semi-definite S, singular ones included.

    With D = diag(S) the system is scaled to a unit diagonal, A = D^(-1/2) S D^(-1/2), and
    (A + ε I) Z = D^(-1/2) R is solved by Cholesky, ε = 1e-6 in float32 and 1e-10 in float64; then
    Δ = D^(-1/2) Z. Features with D_ii ≤ 1e-12 max D are dead: their rows of Δ are zero. Where the
    factorisation fails, an eigendecomposition takes its place, its eigenvalues below
    max(in, out) · eps · λ_max left out.

    Use it in residual form: R = Σ G_k (W_k − W_ref) and W = W_ref + Δ, so that what the data do not
    determine stays at the reference, which the caller adds.

    Works under `jax.jit`, `jax.grad` and `jax.vmap`; a batch pays for the eigendecomposition only
    if one of its members needs it.

    Args:
        matrix: S [in, in], float32 or float64, symmetric.
        right_hand_side: R [in, out], of the same type.

    Returns:
        Δ [in, out] of the same type.

    Raises:
        MergeError: shapes that do not fit, or a type that is neither float32 nor float64.

    Example:
        >>> gram = jnp.diag(jnp.array([4.0, 1.0, 0.0]))  # the third feature is dead
        >>> safe_solve(gram, jnp.ones((3, 1)))[:, 0].round(3).tolist()
        [0.25, 1.0, 0.0]
    """
    _check(matrix, right_hand_side)
    diagonal = jnp.diagonal(matrix)
    dead = diagonal <= DEAD * diagonal.max()
    scale = jnp.where(dead, 0, lax.rsqrt(jnp.where(dead, 1, diagonal)))
    epsilon = 1e-10 if matrix.dtype == jnp.float64 else 1e-6
    scaled = matrix * scale[:, None] * scale[None, :]
    scaled += jnp.diag(jnp.where(dead, 1, epsilon).astype(matrix.dtype))
    solution = lax.custom_linear_solve(
        lambda z: jnp.matmul(scaled, z, precision=HIGHEST),
        right_hand_side * scale[:, None],
        lambda _, right: _solve(scaled, right),
        symmetric=True,
    )
    return solution * scale[:, None]


def _check(matrix: jax.Array, right_hand_side: jax.Array) -> None:
    shape, right = jnp.shape(matrix), jnp.shape(right_hand_side)
    if len(shape) != 2 or len(right) != 2 or shape != (right[0], right[0]):
        raise MergeError(
            f"safe_solve: the matrix has shape {shape} and the right-hand side {right}, expected "
            "[in, in] and [in, out]; batches go through jax.vmap"
        )
    types = {jnp.result_type(matrix).name, jnp.result_type(right_hand_side).name}
    if len(types) > 1 or not types <= {"float32", "float64"}:
        raise MergeError(
            f"safe_solve: the arrays have type {' and '.join(sorted(types))}, expected float32 or "
            "float64 for both; cast them first"
        )


# Under a plain vmap the condition below would become a select that always runs both branches,
# and the eigendecomposition costs hundreds of factorisations; so the batch shares one condition.
@custom_vmap
def _solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    return _solve_batch(matrix[None], right[None])[0]


@_solve.def_vmap
def _solve_rule(size, batched, matrix, right):
    operands = [
        x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_batched in zip((matrix, right), batched, strict=True)
    ]
    return _solve_batch(*operands), True


def _solve_batch(matrices: jax.Array, rights: jax.Array) -> jax.Array:
    """Cholesky for all [batch, in, in]; the eigendecomposition for those where that gave NaN."""
    factors = jnp.linalg.cholesky(matrices, symmetrize_input=True)
    solved = jax.vmap(lambda factor, right: cho_solve((factor, True), right))(factors, rights)
    failed = jnp.isnan(solved).any(axis=(1, 2), keepdims=True)
    return lax.cond(
        failed.any(),
        lambda: jnp.where(failed, _pseudo_solve(matrices, rights), solved),
        lambda: solved,
    )


def _pseudo_solve(matrices: jax.Array, rights: jax.Array) -> jax.Array:
    values, vectors = jnp.linalg.eigh(matrices)
    cutoff = max(rights.shape[1:]) * jnp.finfo(matrices.dtype).eps * values[:, -1:]
    kept = values > jnp.maximum(cutoff, 0)
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)[..., None]
    coordinates = jnp.matmul(jnp.swapaxes(vectors, -1, -2), rights, precision=HIGHEST)
    return jnp.matmul(vectors, inverse * coordinates, precision=HIGHEST)
