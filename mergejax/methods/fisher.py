"""Fisher-weighted averaging: each parameter from the experts that are sure of it."""

from typing import Any, Literal

import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import Parts, Round, method, reduce
from mergejax.hyper import NonNegative
from mergejax.methods.elect import per_expert

Floor = Literal["relative", "maximum", "first", "added"]


@reduce(space="weights", elementwise=True, needs=("fisher",))
def fisher_mean(
    weights: NonNegative = 1.0,
    floor: NonNegative = 1e-3,
    floor_rule: Floor = "relative",
    normalize: bool = True,
) -> Parts:
    r"""The mean of the experts, each element weighted by its Fisher information.

    See `fisher` for the formula and the arguments.

    Returns:
        A reduction that reads the statistic 'fisher' ([N, ...] float32, not negative).

    Example:
        >>> import mergejax as mj
        >>> mj.fisher_mean(floor=1e-4)
        fisher_mean(floor=0.0001)
    """

    def measure(ds, leaf, seen):
        information = leaf.stats["fisher"]
        axes = tuple(range(1, information.ndim))
        return jnp.sum(information**2, axis=axes), jnp.sum(information, axis=axes)

    def solve(totals: Any, size: Any, memory: Any) -> Any:
        squares, sums = totals[0]
        return squares**0.5, sums / size

    def apply(ds, leaf, seen):
        norms, means = seen[0]
        information = leaf.stats["fisher"]
        known = norms > 0
        factors = jnp.where(known, 1 / jnp.where(known, norms, 1.0), 0.0)
        if floor_rule == "added" and normalize:
            factors = 1 / (norms + floor)
        if not normalize:
            factors = jnp.ones_like(norms)
        importance = (
            per_expert(weights, ds)
            * per_expert(factors, ds)
            * _floored(information, per_expert(means, ds))
        )
        share = importance.sum(0, keepdims=True)
        share = jnp.where(share > 0, importance / jnp.where(share > 0, share, 1.0), 1 / ds.shape[0])
        return ds[0] + (share * (ds - ds[:1])).sum(0)

    def _floored(information, means):
        if floor_rule == "relative":
            return jnp.maximum(information, floor * means)
        if floor_rule == "added":
            return information + floor
        raised = jnp.maximum(information, floor)
        if floor_rule == "maximum":
            return raised
        return jnp.concatenate([raised[:1], information[1:]])

    return Parts(apply=apply, rounds=(Round(measure, solve),))


@method
def fisher(
    weights: NonNegative = 1.0,
    floor: NonNegative = 1e-3,
    floor_rule: Floor = "relative",
    normalize: bool = True,
):
    r"""Averages the experts, each element weighted by its diagonal Fisher information.

    .. math:: \theta_j = \frac{\sum_i w_i \tilde F_{ij}\,\theta_{ij}}{\sum_i w_i\tilde F_{ij}},
        \qquad \tilde F_i = \max(F_i,\ floor\cdot mean(F_i)) \,/\, \|F_i\|_2

    The mean and the norm are over all merged leaves of a model. Where every weight is zero the
    experts are averaged.

    Args:
        weights: w, a number or one per expert.
        floor: see `floor_rule`.
        floor_rule: 'relative' (floor times the model's mean information), 'maximum' (an absolute
            lower bound, authors' code without a target), 'first' (that bound for the first expert
            only: the authors' `favor_target_model`), 'added' (FusionBench: added to every value,
            and to the norm).
        normalize: whether to divide by the norm.

    Returns:
        A method that needs no base and reads the statistic 'fisher' (see `mj.collect.fisher`).

    Raises:
        MergeError: a value out of range; when merging: no Fisher information for a leaf.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([0.0])}, {'w': jnp.asarray([4.0])}]
        >>> information = [{'w': jnp.asarray([3.0])}, {'w': jnp.asarray([1.0])}]
        >>> merged = mj.merge(mj.fisher(normalize=False), None, experts,
        ...                   stats={'fisher': information})
        >>> print(merged['w'])
        [1.]

    Merging models with Fisher-weighted averaging (Matena and Raffel, 2022, arXiv:2111.09832). The
    relative floor is ours: Fisher values are often far below the authors' absolute 1e-6, which
    then turns the method into plain averaging.
    """
    return chain(fisher_mean(weights, floor, floor_rule, normalize))
