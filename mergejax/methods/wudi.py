"""WUDI-Merging and OptMerge: merged kernels that interfere little with what each expert reads.

The gradients are those of the change from the start, with the experts' Gram matrices added up
once: a step is one product of matrices, and a start that is stationary stays to the bit.
"""

from typing import Literal

import jax.numpy as jnp

from mergejax.chains import by_role, chain
from mergejax.core import Array, method, reduce
from mergejax.hyper import Fraction, Positive, Scaling, Whole
from mergejax.linalg.descent import descend
from mergejax.linalg.spectral import on_matrices, unit
from mergejax.linalg.subspaces import equal_ranks, present
from mergejax.linalg.triplets import truncate
from mergejax.methods.combine import mean, scale, total

Norm = Literal["square", "plain"]


def interference(start: Array, ds, grams) -> tuple[Array, Array]:
    r"""Half the gradient of :math:`\sum_i\|(X-\tau_i)G_i^{1/2}\|^2` at the start, and its slope.

    Returns:
        :math:`\sum_i(X_0-\tau_i)G_i` [out, in] and :math:`\sum_iG_i` [in, in].
    """
    return sum((start - d) @ gram for d, gram in zip(ds, grams, strict=True)), sum(grams)


def input_gram(d: Array) -> Array:
    r""":math:`\tau^\top\tau/\|\tau\|^2`, [in, in]; zeros for zeros."""
    direction, _ = unit(d)
    return direction.T @ direction


def mean_of_present(ds) -> Array:
    """The mean of the deltas that are not zero."""
    return sum(ds) / jnp.maximum(present(ds).sum(dtype=jnp.int32), 1).astype(ds[0].dtype)


def _settled(start, ds, grams, optimizer, steps):
    residual, slope = interference(start, ds, grams)
    gradient = lambda change: 2 * (change @ slope + residual)
    return start + descend(gradient, jnp.zeros_like(start), optimizer, steps)


@reduce
def least_interference(steps: Whole = 300, learning_rate: Positive = 1e-5, norm: Norm = "square"):
    r"""Moves the sum of the deltas away from interference, by Adam.

    See `wudi` for the formula and the arguments.

    Returns:
        A reduction of kernels.

    Example:
        >>> import mergejax as mj
        >>> mj.least_interference(steps=100)
        least_interference(steps=100)
    """

    def merge(*ds):
        import optax  # here, for it takes a third of the time that JAX does

        grams = [input_gram(d) * (unit(d)[1] if norm == "plain" else 1) for d in ds]
        return _settled(sum(ds), ds, grams, optax.adam(learning_rate), steps)

    return lambda ds, leaf, seen: on_matrices(merge, leaf.layout, *ds)


@method
def wudi(
    steps: Whole = 300,
    learning_rate: Positive = 1e-5,
    norm: Norm = "square",
    others: Literal["mean", "base"] = "mean",
):
    r"""Minimises the interference between each kernel's merged delta and its experts' inputs.

    .. math:: \theta=\theta_0+X,\qquad
        \min_X\sum_i\frac{1}{\|\tau_i\|^2}\big\|(X-\tau_i)\,\tau_i^\top\big\|^2

    for kernels [out, in], by so many steps of Adam from :math:`X_0=\sum_i\tau_i`. Stopping early
    is what regularises: the minimum itself is worse.

    Args:
        steps: 300 in the authors' code, 400 in FusionBench. Static.
        learning_rate: each value moves by about this much a step, at most.
        norm: each expert's part is divided by the 'square' of its delta's norm (the paper and
            FusionBench) or by the 'plain' norm (the authors' code for vision), so that experts that
            moved far weigh more.
        others: what happens to all other leaves: their 'mean' (FusionBench) or the 'base' (the
            authors' code for vision).

    Returns:
        A method; a single expert comes back as it is.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((2, 2))}
        >>> experts = [{'kernel': jnp.diag(jnp.asarray(x))} for x in ([1.0, 0.0], [1.0, 0.0])]
        >>> method = mj.wudi(steps=300, learning_rate=0.01)  # from 2, the sum, down to what both do
        >>> print(mj.merge(method, base, experts)['kernel'].round(2))
        [[1. 0.]
         [0. 0.]]

    Whoever started the interference should end it (Cheng et al., 2025, arXiv:2503.08099). The
    authors' code for vision is norm='plain', others='base'. An expert whose delta of a leaf is zero
    has no part in the sum.
    """
    otherwise = mean() if others == "mean" else total(weights=0.0)
    return chain(
        by_role(kernel=least_interference(steps, learning_rate, norm), otherwise=otherwise)
    )


def _nearest(d: Array, rank: Array) -> Array:
    """The nearest matrix of a rank, of any scale."""
    direction, norm = unit(d)
    return norm * truncate(direction, rank)


def _grams(ds, ranks):
    """The Gram matrices of the experts' low-rank parts, by the squared norms of the whole."""
    nearest = [truncate(unit(d)[0], rank) for d, rank in zip(ds, ranks, strict=True)]
    return [x.T @ x for x in nearest]


@reduce
def low_rank_interference(
    steps: Whole = 300, learning_rate: Positive = 1e-4, momentum: Fraction = 0.9
):
    r"""Moves the mean of the deltas towards their low-rank parts, by gradient descent.

    See `opt_merge` for the formula and the arguments.

    Returns:
        A reduction of kernels.

    Example:
        >>> import mergejax as mj
        >>> mj.low_rank_interference(momentum=0.0)
        low_rank_interference(momentum=0.0)
    """

    def merge(*ds):
        import optax

        ranks = equal_ranks(ds)
        targets = [_nearest(d, rank) for d, rank in zip(ds, ranks, strict=True)]
        optimizer = optax.sgd(learning_rate, momentum)
        return _settled(mean_of_present(ds), targets, _grams(ds, ranks), optimizer, steps)

    return lambda ds, leaf, seen: on_matrices(merge, leaf.layout, *ds)


@reduce
def interference_around_mean(steps: Whole = 300, learning_rate: Positive = 1e-5):
    r"""Moves the sum of the deltas towards their mean with what each adds to it at low rank.

    .. math:: \min_X\sum_i\frac{1}{\|\tau_i\|^2}
        \big\|\big(X-\bar\tau-(\tau_i-\bar\tau)^{(r)}\big)\,V_i^{(r)}S_i^{(r)}\big\|^2

    for kernels [out, in], by so many steps of Adam from :math:`X_0=\sum_i\tau_i`, with r and
    :math:`V_i^{(r)}S_i^{(r)}` as in `opt_merge` and :math:`\bar\tau` the mean of the deltas.

    Args:
        steps: static.
        learning_rate: each value moves by about this much a step, at most.

    Returns:
        A reduction of kernels; a single expert comes back as it is.

    Example:
        >>> import mergejax as mj
        >>> kernels = mj.interference_around_mean()
        >>> mj.chain(mj.by_role(kernel=kernels, otherwise=mj.mean()), mj.scale(0.1))
        by_role(kernel=interference_around_mean(), otherwise=mean())|scale(scaling=0.1)

    OptMerge (Wei et al., 2025, arXiv:2505.19892) as in the authors' script for vision-language
    models, which scales by 0.1.
    """

    def merge(*ds):
        import optax

        ranks, middle = equal_ranks(ds), mean_of_present(ds)
        targets = [middle + _nearest(d - middle, rank) for d, rank in zip(ds, ranks, strict=True)]
        return _settled(sum(ds), targets, _grams(ds, ranks), optax.adam(learning_rate), steps)

    return lambda ds, leaf, seen: on_matrices(merge, leaf.layout, *ds)


@method
def opt_merge(
    scaling: Scaling = 1.0,
    steps: Whole = 300,
    learning_rate: Positive = 1e-4,
    momentum: Fraction = 0.9,
):
    r"""WUDI from the mean, towards each expert's low-rank part.

    .. math:: \theta=\theta_0+\lambda X,\qquad
        \min_X\sum_i\frac{1}{\|\tau_i\|^2}\big\|(X-\tau_i^{(r)})\,V_i^{(r)}S_i^{(r)}\big\|^2

    with :math:`\tau_i^{(r)}=U_i^{(r)}S_i^{(r)}V_i^{(r)\top}` the nearest matrix of rank
    :math:`r=\lfloor\min(in,out)/N\rfloor`, for kernels [out, in], by so many steps of gradient
    descent with momentum from the mean. All other leaves are averaged and scaled alike.

    Args:
        scaling: :math:`\lambda`; the authors take 1 and 0.1.
        steps: static.
        learning_rate: of the descent.
        momentum: of the descent, in [0, 1].

    Returns:
        A method.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'kernel': jnp.zeros((2, 2))}, {'kernel': jnp.eye(2)}
        >>> print(mj.merge(mj.opt_merge(), base, [expert])['kernel'].round(4))
        [[1. 0.]
         [0. 1.]]

    OptMerge, or WUDI v2 (Wei et al., 2025, arXiv:2505.19892), as in the authors' code for language
    models; `interference_around_mean` is that of the script for vision. Experts whose delta of a
    leaf is zero are not counted in N there; with more experts than min(in, out) nothing is
    optimised and the mean stays.
    """
    kernels = low_rank_interference(steps, learning_rate, momentum)
    return chain(by_role(kernel=kernels, otherwise=mean()), scale(scaling))
