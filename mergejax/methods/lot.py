"""LOT Merging: the deltas that move every expert's features least, layer by layer."""

import jax.numpy as jnp

from mergejax.chains import by_stats, chain
from mergejax.core import method, reduce
from mergejax.hyper import NonNegatives, Scaling
from mergejax.linalg.regression import on_groups, regress
from mergejax.methods.combine import mean, scale
from mergejax.methods.elect import per_expert


@reduce(needs=("gram",))
def least_drift(weights: NonNegatives = 1.0):
    r"""Solves for the delta of a kernel that moves the experts' features least.

    .. math:: \tau=\Big(\sum_iw_iG_i\Big)^\dagger\sum_iw_iG_i\tau_i

    with :math:`G_i` the mean Gram matrix of expert i's inputs to the layer. Directions that no
    expert's inputs have stay at the base.

    Args:
        weights: w, a number or one per expert; numbers of examples make sums of the means.

    Returns:
        A reduction of kernels that reads the statistic 'gram'.

    Example:
        >>> import mergejax as mj
        >>> mj.least_drift(weights=[64, 16])
        least_drift(weights=[64, 16])
    """

    def apply(ds, leaf, seen):
        several = zip(per_expert(weights, len(ds)), leaf.stats["gram"], strict=True)
        grams = [w * gram.astype(ds[0].dtype) for w, gram in several]
        solve = lambda taus, grams: regress(taus, grams, jnp.zeros_like(taus[0]))
        return on_groups(solve, leaf.layout, ds, grams)

    return apply


@reduce(elementwise=True, needs=("norm_square",))
def least_norm_drift(weights: NonNegatives = 1.0):
    r"""The delta of a norm's scale that moves the experts' features least.

    .. math:: \tau_d=\frac{\sum_iw_is_{id}\,\tau_{id}}{\sum_iw_is_{id}},\qquad
        s_{id}=mean\ \hat x_{id}^2

    with :math:`\hat x_i` the normalised inputs before scale and shift; 0 where all are 0.

    Args:
        weights: w, a number or one per expert.

    Returns:
        A reduction of scales that reads the statistic 'norm_square' (of the leaf's shape).

    Example:
        >>> import mergejax as mj
        >>> mj.least_norm_drift()
        least_norm_drift()
    """

    def apply(ds, leaf, seen):
        several = zip(per_expert(weights, len(ds)), leaf.stats["norm_square"], strict=True)
        energy = [w * s for w, s in several]
        mass = sum(energy)
        moved = sum(s * d for s, d in zip(energy, ds, strict=True))
        return jnp.where(mass > 0, moved / jnp.where(mass > 0, mass, 1), 0)

    return apply


@method
def lot(scaling: Scaling = 1.2, weights: NonNegatives = 1.0):
    r"""Merges each layer so that the experts' features drift least, and scales the result.

    .. math:: \theta=\theta_0+\lambda\tau,\qquad
        \tau=\arg\min_\tau\sum_iw_i\|X_i(\tau-\tau_i)\|^2

    in closed form: for kernels :math:`(\sum G_i)^\dagger\sum G_i\tau_i`, for the scales of norms
    the mean weighted by the squares of their normalised inputs, for biases and everything else
    the plain mean. Unlike `regmean`, what no expert's inputs determine stays at the base, norms are
    solved too, and the result is scaled.

    Args:
        scaling: :math:`\lambda`; 1.2 for ViT-B/32, 1.5 for ViT-L/14, usable from 1.0 to 1.5.
        weights: w, a number or one per expert; numbers of examples where they differ.

    Returns:
        A method that reads the statistics 'gram' and 'norm_square'; 16 to 64 examples per task are
        enough for the authors.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((2, 1))}
        >>> experts = [{'kernel': jnp.full((2, 1), x)} for x in (1.0, 2.0)]
        >>> grams = [{'kernel': jnp.diag(jnp.asarray(g))} for g in ([3.0, 0.0], [1.0, 0.0])]
        >>> stats = {'gram': grams, 'norm_square': [{}, {}]}  # there is no norm
        >>> print(mj.merge(mj.lot(scaling=1.0), base, experts, stats=stats)['kernel'].round(3))
        [[1.25]
         [0.  ]]

    Towards minimizing feature drift in model merging (Sun et al., 2025, arXiv:2505.23859).
    """
    solved = by_stats(
        gram=least_drift(weights), norm_square=least_norm_drift(weights), otherwise=mean()
    )
    return chain(solved, scale(scaling))
