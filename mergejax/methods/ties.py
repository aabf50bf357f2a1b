"""TIES-Merging: trim, elect a sign, average what agrees with it."""

from typing import Literal

from mergejax import hyper
from mergejax.chains import chain
from mergejax.core import method
from mergejax.hyper import Density, Scaling, Weights
from mergejax.methods.combine import scale, total
from mergejax.methods.elect import disjoint_max, disjoint_mean, elect_sign, weigh
from mergejax.methods.sparsify import Cut, trim


@method
def ties(
    density: Density = 0.2,
    scaling: Scaling = 1.0,
    weights: Weights = 1.0,
    scope: Literal["model", "tensor"] = "model",
    cut: Cut = "published",
    sign: Literal["mass", "count"] = "mass",
    zero: Literal["majority", "plus"] = "majority",
    reduction: Literal["mean", "sum", "max"] = "mean",
):
    r"""Trims each delta, elects a sign for each element, averages the experts that agree with it.

    .. math::
        \hat\tau_i = top_{density}(\tau_i),\quad s=sign\textstyle\sum_i w_i\hat\tau_i,\quad
        \theta=\theta_0+\lambda\,\frac{\sum_{i:\,sign(\hat\tau_i)=s} w_i\hat\tau_i}
        {\sum_{i:\,sign(\hat\tau_i)=s} w_i}

    Args:
        density: fraction kept by the trim, in (0, 1].
        scaling: :math:`\lambda`.
        weights: w, a number or one per expert; they vote, too.
        scope: threshold over the whole 'model' (as published) or per 'tensor'.
        cut: how many elements a density means, see `trim`.
        sign: elected by 'mass' or by 'count'.
        zero: sign of a drawn vote, see `elect_sign`.
        reduction: 'mean', 'sum' or 'max' of the experts that agree. Where a vote is drawn and so
            is that of the whole model, all three take the negative values; the authors' 'max'
            gives 0 there.

    Returns:
        A method.

    Raises:
        MergeError: a value out of range; weights that sum to zero although a mean is taken.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(4)}
        >>> experts = [{'w': jnp.asarray([3.0, 2.0, 0.1, 0.0])},
        ...            {'w': jnp.asarray([1.0, -4.0, 0.0, 0.2])}]
        >>> print(mj.merge(mj.ties(density=0.5, scope='tensor', cut='exact'), base, experts)['w'])
        [ 2. -4.  0.  0.]

    TIES-Merging (Yadav et al., 2023, arXiv:2306.01708). The defaults are the authors' code;
    mergekit's form is scope='tensor', cut='exact', zero='plus'; FusionBench reduces by 'sum'.
    """
    if reduction == "mean":
        hyper.check_sum("ties", weights, "change the weights or pass reduction='sum'")
    reductions = {"mean": lambda: disjoint_mean(weights), "sum": total, "max": disjoint_max}
    return chain(
        trim(density, scope, cut),
        weigh(weights),
        elect_sign(sign, zero),
        reductions[reduction](),
        scale(scaling),
    )
