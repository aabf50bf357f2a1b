"""WUDI-Merging and OptMerge: merged kernels that interfere little with what each expert reads.

The gradients are those of the change from the start, with the experts' Gram matrices added up
once: a step is one product of matrices, and a start that is stationary stays to the bit.
"""

from typing import Literal

import jax.numpy as jnp

from mergejax.chains import by_role, chain
from mergejax.core import Array, method, reduce
from mergejax.errors import MergeError
from mergejax.hyper import Fraction, Positive, Scaling, refuse_lists
from mergejax.linalg.descent import descend
from mergejax.linalg.spectral import on_matrices, truncate, unit
from mergejax.linalg.subspaces import equal_ranks, present
from mergejax.methods.combine import mean, scale, total


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


def _refuse_steps(label: str, steps: int) -> None:
    if steps < 0:
        raise MergeError(
            f"{label}(steps={steps}) takes a negative number of steps; choose 0 or more"
        )


@reduce
def least_interference(steps: int = 300, learning_rate: Positive = 1e-5):
    r"""Moves the sum of the deltas away from interference, by Adam.

    See `wudi` for the formula and the arguments.

    Returns:
        A reduction of kernels.

    Example:
        >>> import mergejax as mj
        >>> mj.least_interference(steps=100)
        least_interference(steps=100)
    """
    refuse_lists("least_interference", learning_rate=learning_rate)
    _refuse_steps("least_interference", steps)

    def merge(*ds):
        import optax  # here, for it takes a third of the time that JAX does

        grams = [input_gram(d) for d in ds]
        return _settled(sum(ds), ds, grams, optax.adam(learning_rate), steps)

    return lambda ds, leaf, seen: on_matrices(merge, leaf.layout, *ds)


@method
def wudi(
    steps: int = 300, learning_rate: Positive = 1e-5, others: Literal["mean", "base"] = "mean"
):
    r"""Minimises the interference between each kernel's merged delta and its experts' inputs.

    .. math:: \theta=\theta_0+X,\qquad
        \min_X\sum_i\frac{1}{\|\tau_i\|^2}\big\|(X-\tau_i)\,\tau_i^\top\big\|^2

    for kernels [out, in], by so many steps of Adam from :math:`X_0=\sum_i\tau_i`. Stopping early
    is what regularises: the minimum itself is worse.

    Args:
        steps: 300 in the authors' code, 400 in FusionBench. Static.
        learning_rate: each value moves by about this much a step, at most.
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

    Whoever started the interference should end it (Cheng et al., 2025, arXiv:2503.08099), with the
    squared norm of the paper (the authors' code for vision divides by the norm). An expert whose
    delta of a leaf is zero has no part in the sum.
    """
    otherwise = mean() if others == "mean" else total(weights=0.0)
    return chain(by_role(kernel=least_interference(steps, learning_rate), otherwise=otherwise))


@reduce
def low_rank_interference(
    steps: int = 300, learning_rate: Positive = 1e-4, momentum: Fraction = 0.9
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
    refuse_lists("low_rank_interference", learning_rate=learning_rate, momentum=momentum)
    _refuse_steps("low_rank_interference", steps)

    def merge(*ds):
        import optax

        targets, grams = [], []
        for d, rank in zip(ds, equal_ranks(ds), strict=True):
            direction, norm = unit(d)
            nearest = truncate(direction, rank)
            targets.append(norm * nearest)
            grams.append(nearest.T @ nearest)
        optimizer = optax.sgd(learning_rate, momentum)
        return _settled(mean_of_present(ds), targets, grams, optimizer, steps)

    return lambda ds, leaf, seen: on_matrices(merge, leaf.layout, *ds)


@method
def opt_merge(
    scaling: Scaling = 1.0,
    steps: int = 300,
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
    models. Experts whose delta of a leaf is zero are not counted in N there; with more experts
    than min(in, out) nothing is optimised and the mean stays.
    """
    kernels = low_rank_interference(steps, learning_rate, momentum)
    return chain(by_role(kernel=kernels, otherwise=mean()), scale(scaling))
