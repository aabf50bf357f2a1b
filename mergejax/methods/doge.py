"""DOGE-TA: task arithmetic with a shared correction, found by projected gradient descent."""

import jax.numpy as jnp

from mergejax.chains import by_role, chain
from mergejax.core import Parts, method, reduce
from mergejax.hyper import Count, Density, Positive, Scaling, Whole
from mergejax.linalg.descent import descend
from mergejax.linalg.spectral import decompose, is_real, on_matrices, unit
from mergejax.linalg.subspaces import equal_ranks, leading
from mergejax.methods.combine import total
from mergejax.summaries import bounded_rank, kept_count, magnitude_key, rank_rounds


def _shared_basis(ds, subspace):
    """The leading directions of all experts' leading output directions, [out, rank]."""
    kept = leading(ds, list(equal_ranks(ds)))
    rank = min(ds[0].shape) // subspace
    joined = decompose(kept.left)
    real = is_real(joined.values[:rank], kept.left.shape, joined.values[0])
    return joined.left[:, :rank] * real.astype(joined.left.dtype)[None, :]


def _correction(ds, factors, subspace, steps, learning_rate):
    """The shared correction that keeps each expert's outputs on its own delta."""
    whole = sum(factor * d for factor, d in zip(factors, ds, strict=True))
    mass = sum(factors)
    basis = _shared_basis(ds, subspace)
    targets = [jnp.sum(d * (d - whole), axis=1, keepdims=True) for d in ds]

    def gradient(x):
        pairs = zip(ds, targets, strict=True)
        losses = [
            (target - mass * jnp.sum(d * x, axis=1, keepdims=True)) * d for d, target in pairs
        ]
        slope = -2 * mass * sum(losses)
        return slope - basis @ (basis.T @ slope)

    import optax  # here, for it takes a third of the time that JAX does

    return descend(gradient, jnp.zeros_like(ds[0]), optax.adam(learning_rate), steps)


@reduce
def corrected_total(
    scaling: Scaling = 0.07,
    density: Density = 0.3,
    subspace: Count = 6,
    steps: Whole = 400,
    learning_rate: Positive = 1e-4,
) -> Parts:
    r"""Adds up trimmed, normalised deltas, all moved by one shared correction.

    See `doge_ta` for the formula and the arguments.

    Returns:
        A reduction of kernels.

    Example:
        >>> import mergejax as mj
        >>> mj.corrected_total(steps=100)
        corrected_total(steps=100)
    """

    def merge(*arrays):
        ds, masks = arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]
        norms = [unit(d)[1] for d in ds]
        factors = [jnp.where(n > 0, scaling / jnp.where(n > 0, n, 1.0), 0.0) for n in norms]
        shared = _correction(ds, factors, subspace, steps, learning_rate)
        several = zip(factors, ds, masks, strict=True)
        return sum(factor * (d + shared) * mask for factor, d, mask in several)

    def apply(ds, leaf, seen):
        thresholds = [keys[0] for keys in seen[1]]
        kept = [magnitude_key(d) >= key for d, key in zip(ds, thresholds, strict=True)]
        masks = [mask.astype(d.dtype) for mask, d in zip(kept, ds, strict=True)]
        return on_matrices(merge, leaf.layout, *ds, *masks)

    rounds = rank_rounds(
        lambda ds, leaf, seen: [magnitude_key(d) for d in ds],
        lambda size: [bounded_rank(kept_count(size, density) + 1, size)],
    )
    return Parts(apply=apply, rounds=rounds)


@method
def doge_ta(
    scaling: Scaling = 0.07,
    density: Density = 0.3,
    subspace: Count = 6,
    steps: Whole = 400,
    learning_rate: Positive = 1e-4,
):
    r"""Task arithmetic with layer-wise factors and a correction that all experts share.

    .. math:: \theta=\theta_0+\sum_i\lambda_i(\tau_i+\delta)\odot m_i,\qquad
        \lambda_i=\frac{\eta}{\|\tau_i\|},\quad
        \min_\delta\sum_j\sum_{rows}\Big\langle\tau_j,\
        \tau_j-\textstyle\sum_i\lambda_i(\tau_i+\delta)\Big\rangle_{row}^2

    for kernels [out, in], by so many steps of Adam from zero on the gradient without its part in a
    shared subspace: the leading :math:`\lfloor k/subspace\rfloor` left singular vectors of all
    experts' leading :math:`\lfloor k/N\rfloor` ones side by side, k = min(in, out). The mask
    :math:`m_i` keeps the largest values of :math:`\tau_i` over all kernels. All other leaves stay
    at the base.

    Args:
        scaling: :math:`\eta`.
        density: the share of values that the masks keep, in (0, 1].
        subspace: what min(in, out) is divided by for the shared subspace. Static.
        steps: static.
        learning_rate: of Adam.

    Returns:
        A method; a single expert is not returned unchanged.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'kernel': jnp.zeros((2, 2))}, {'kernel': jnp.diag(jnp.array([3., 4.]))}
        >>> print(mj.merge(mj.doge_ta(scaling=5.0, density=1.0), base, [expert])['kernel'].round(4))
        [[3. 0.]
         [0. 4.]]

    Modeling multi-task model merging as adaptive projective gradient descent (Wei et al., 2025,
    arXiv:2501.01230), as FusionBench computes it: masks are those of the deltas without the
    correction. An expert whose delta of a leaf is zero has no part there.
    """
    kernels = corrected_total(scaling, density, subspace, steps, learning_rate)
    return chain(by_role(kernel=kernels, otherwise=total(weights=0.0)))
