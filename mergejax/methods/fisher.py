"""Fisher-weighted averaging: each parameter from the experts that are sure of it."""

from typing import Any, Literal

import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import Parts, Round, method, reduce
from mergejax.hyper import NonNegative, NonNegatives
from mergejax.methods.elect import per_expert

Floor = Literal["relative", "maximum", "first", "added"]


@reduce(space="weights", elementwise=True, needs=("fisher",))
def fisher_mean(
    weights: NonNegatives = 1.0,
    floor: NonNegative = 1e-3,
    floor_rule: Floor = "relative",
    normalize: bool = True,
) -> Parts:
    r"""The mean of the experts, each element weighted by its Fisher information.

    See `fisher` for the formula and the arguments.

    Returns:
        A reduction that reads the statistic 'fisher' (float32 of the leaf's shape, not negative).

    Example:
        >>> import mergejax as mj
        >>> mj.fisher_mean(floor=1e-4)
        fisher_mean(floor=0.0001)
    """

    def measure(ds, leaf, seen):
        several = leaf.stats["fisher"]
        return [jnp.sum(f * f) for f in several], [jnp.sum(f) for f in several]

    def solve(totals: Any, size: Any, memory: Any) -> Any:
        squared, sums = totals[0]
        return [x**0.5 for x in squared], [x / size for x in sums]

    def floored(information, mean, index):
        if floor_rule == "relative":
            return jnp.maximum(information, floor * mean)
        if floor_rule == "added":
            return information + floor
        if floor_rule == "first" and index > 0:
            return information
        return jnp.maximum(information, floor)

    def factor(norm):
        if not normalize:
            return jnp.float32(1)
        if floor_rule == "added":
            return 1 / (norm + floor)
        return jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1.0), 0.0)

    def apply(ds, leaf, seen):
        several = zip(per_expert(weights, len(ds)), leaf.stats["fisher"], *seen[0], strict=True)
        importance = [
            weight * factor(norm) * floored(information, mean, i)
            for i, (weight, information, norm, mean) in enumerate(several)
        ]
        mass = sum(importance)
        known = mass > 0
        shares = [
            jnp.where(known, f / jnp.where(known, mass, 1.0), 1 / len(ds)) for f in importance
        ]
        return ds[0] + sum(share * (d - ds[0]) for share, d in zip(shares, ds, strict=True))

    return Parts(apply=apply, rounds=(Round(measure, solve),))


@method
def fisher(
    weights: NonNegatives = 1.0,
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
        weights: w, a number or one per expert; `mj.simplex_points` lists what the authors choose
            from on validation data.
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
