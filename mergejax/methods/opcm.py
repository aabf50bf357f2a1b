"""OPCM: merge experts that arrive one by one, each projected off what is merged already."""

import jax.numpy as jnp

from mergejax.chains import by_role, chain
from mergejax.core import Parts, Recall, Round, each, fold, method
from mergejax.hyper import Fraction
from mergejax.linalg.spectral import decompose, is_real, on_matrices
from mergejax.methods.combine import total
from mergejax.summaries import ratio, squares


@fold
def orthogonal_total(alpha: Fraction = 0.5, zero_diagonal: bool = False) -> Parts:
    r"""Adds up deltas, each without its part in the leading subspace of the sum so far.

    .. math:: A \leftarrow A + \tau - U\,(M\odot U^\top\tau V)\,V^\top,\qquad A=U\Sigma V^\top

    with M one on the first r rows and columns, r the number of leading singular values before
    their cumulative share exceeds :math:`\alpha`.

    Args:
        alpha: share of the singular values' sum that is protected, in [0, 1]; 1 protects all.
        zero_diagonal: whether M is one on the whole diagonal, too.

    Returns:
        A reduction of kernels, one expert at a time.

    Example:
        >>> import mergejax as mj
        >>> mj.orthogonal_total(alpha=0.3)
        orthogonal_total(alpha=0.3)
    """

    def add(so_far, new):
        whole = decompose(so_far)
        mass = whole.values.sum()
        share = jnp.cumsum(whole.values) / jnp.where(mass > 0, mass, 1.0)
        # Directions without a singular value are arbitrary; projecting there would be noise.
        real = is_real(whole.values, so_far.shape)
        leading = real & ((share <= alpha) | (alpha >= 1))
        mask = leading[:, None] & leading[None, :]
        if zero_diagonal:
            mask = mask | jnp.diag(real)
        inner = jnp.where(mask, whole.left.T @ new @ whole.right, 0.0)
        return so_far + (new - whole.left @ inner @ whole.right.T)

    def apply(state, d, leaf, seen):
        return on_matrices(add, leaf.layout, state, d)

    return Parts(apply=apply, init=lambda leaf, zeros: zeros)


@each(elementwise=True)
def to_mean_norm() -> Parts:
    r"""Rescales the merged delta to the mean norm of the experts' deltas.

    .. math:: \tau_m \leftarrow \tau_m\,\frac{\frac1N\sum_i\|\tau_i\|_2}{\|\tau_m\|_2}

    with norms over the whole model and the raw deltas of the experts; a zero delta stays zero.

    Returns:
        A stage behind the reduction; it remembers the mean when experts arrive one by one.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(1)}, {'w': jnp.ones(1)}
        >>> print(mj.merge(mj.chain(mj.total(), mj.to_mean_norm()), base, [expert, expert])['w'])
        [1.]

    OPCM (Tang et al., 2025, arXiv:2501.09522).
    """
    recall = Recall(
        measure=lambda d, leaf: squares(d),
        start=(0.0, 0.0),
        extend=lambda memory, total: (memory[0] + total**0.5, memory[1] + 1.0),
    )

    def solve(totals, size, memory):
        return ratio(memory[0] / memory[1], totals[0] ** 0.5)

    measured = Round(lambda d, leaf, seen: squares(d), solve, recall)
    return Parts(apply=lambda d, leaf, seen: seen[0] * d, rounds=(measured,))


@method
def opcm(alpha: Fraction = 0.5, zero_diagonal: bool = False):
    r"""Merges experts one after the other, in constant memory.

    Kernels are projected off the leading subspace of what is merged already (see
    `orthogonal_total`), all other leaves are added; the sum is rescaled to the mean norm of the
    experts' deltas (see `to_mean_norm`). The result depends on the order of the experts.

    .. math:: \theta_t=\theta_0+A_t\,\frac{\frac1t\sum_{i\le t}\|\tau_i\|}{\|A_t\|},\qquad
        A_t=A_{t-1}+P_{A_{t-1}}(\tau_t)

    Args:
        alpha: share of the singular values' sum that is protected, in [0, 1].
        zero_diagonal: False is what the authors' repository computes (it clears the diagonal of a
            copy); True clears it in fact, as FusionBench does.

    Returns:
        A method; with `mj.continual` it takes one expert at a time.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'kernel': jnp.zeros((2, 2))}, {'kernel': jnp.eye(2)}
        >>> print(mj.merge(mj.opcm(), base, [expert])['kernel'])
        [[1. 0.]
         [0. 1.]]

    Merging models on the fly without retraining (Tang et al., 2025, arXiv:2501.09522), in the
    streaming form: A accumulates what the paper's :math:`\lambda_t` rescales in each step.
    """
    return chain(
        by_role(kernel=orthogonal_total(alpha, zero_diagonal), otherwise=total()), to_mean_norm()
    )
