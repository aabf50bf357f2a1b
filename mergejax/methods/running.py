"""Averages of checkpoints that arrive one by one, or that carry a metric."""

from typing import Literal

import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import Parts, fold, method, reduce
from mergejax.hyper import Count, Fraction, NonNegative, Positives
from mergejax.methods.elect import per_expert


@fold(elementwise=True, space="either")
def exponential_mean(decay: Fraction = 0.9) -> Parts:
    r"""The exponential moving average: :math:`m\leftarrow\beta m+(1-\beta)\tau_i`.

    Args:
        decay: :math:`\beta`; 0 keeps the last expert, 1 the first.

    Returns:
        A reduction, one expert at a time; it starts with the first.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([x])} for x in (1.0, 3.0)]
        >>> print(mj.merge(mj.exponential_mean(decay=0.5), None, experts)['w'])
        [2.]
    """

    def apply(state, d, leaf, seen):
        return jnp.where(leaf.expert == 0, d, state + (1 - decay) * (d - state))

    return Parts(apply=apply, init=lambda leaf, zeros: zeros)


@fold(elementwise=True, space="either")
def window_mean(length: Count = 5) -> Parts:
    """The mean of the last experts; memory for as many of them.

    Args:
        length: how many, 1 or more.

    Returns:
        A reduction, one expert at a time.

    Raises:
        MergeError: a length below 1.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([x])} for x in (9.0, 1.0, 3.0)]
        >>> print(mj.merge(mj.window_mean(length=2), None, experts)['w'])
        [2.]
    """

    def apply(state, d, leaf, seen):
        last, count = state
        return [d, *last[:-1]], count + 1.0

    def finish(state, leaf, seen):
        last, count = state
        # Around the newest, so that equal experts are returned to the bit.
        moved = sum(jnp.where(i < count, d - last[0], 0.0) for i, d in enumerate(last))
        return last[0] + moved / jnp.minimum(count, float(length))

    return Parts(
        apply=apply, init=lambda leaf, zeros: ([zeros] * length, jnp.float32(0)), finish=finish
    )


@method
def ema(decay: Fraction = 0.9):
    r"""The exponential moving average of checkpoints, in their order.

    .. math:: \theta\leftarrow\beta\theta+(1-\beta)\theta_i

    Args:
        decay: :math:`\beta`; 0 keeps the last checkpoint, 1 the first.

    Returns:
        A method; it needs no base. With `mj.continual` it takes one checkpoint at a time.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([x])} for x in (1.0, 3.0)]
        >>> print(mj.merge(mj.ema(decay=0.5), None, experts)['w'])
        [2.]

    Polyak and Juditsky, 1992, with exponential weights; started with the first checkpoint.
    """
    return chain(exponential_mean(decay))


@method
def window_average(length: Count = 5):
    """The mean of the last checkpoints.

    Args:
        length: how many, 1 or more.

    Returns:
        A method; it needs no base. With `mj.continual` it takes one checkpoint at a time.

    Raises:
        MergeError: a length below 1.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([x])} for x in (9.0, 1.0, 3.0)]
        >>> print(mj.merge(mj.window_average(length=2), None, experts)['w'])
        [2.]

    Latest weight averaging (Kaddour, 2022, arXiv:2209.14981).
    """
    return chain(window_mean(length))


@reduce(elementwise=True, space="either")
def metric_mean(
    metrics: Positives = 1.0, power: NonNegative = 1.0, by: Literal["loss", "score"] = "loss"
):
    r"""Averages with weights from a metric, :math:`w_i\propto\ell_i^{-p}` or :math:`s_i^p`.

    Args:
        metrics: one positive number per expert.
        power: p; 0 gives the plain mean, a large one the best expert.
        by: whether a small metric is good ('loss') or a large one ('score', or the step).

    Returns:
        A reduction, of deltas or of weights.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([x])} for x in (1.0, 4.0)]
        >>> print(mj.merge(mj.metric_mean(metrics=[0.5, 1.0]), None, experts)['w'])
        [2.]
    """

    def apply(ds, leaf, seen):
        values = jnp.stack(per_expert(metrics, len(ds)))
        best = values.min() if by == "loss" else values.max()
        relative = best / values if by == "loss" else values / best
        weights = relative**power
        moved = sum(w * (d - ds[0]) for w, d in zip(weights, ds, strict=True))
        return ds[0] + moved / weights.sum()

    return apply


@method
def metrics_weighted(
    metrics: Positives = 1.0, power: NonNegative = 1.0, by: Literal["loss", "score"] = "loss"
):
    r"""Averages checkpoints with weights from their metrics.

    .. math:: \theta=\frac{\sum_iw_i\theta_i}{\sum_iw_i},\qquad
        w_i=\ell_i^{-p}\ \text{or}\ s_i^{\,p}

    Args:
        metrics: one positive number per expert: its loss, score or step.
        power: p; 0 gives the plain mean, a large one the best checkpoint.
        by: whether a small metric is good ('loss') or a large one ('score', or the step).

    Returns:
        A method; it needs no base.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([x])} for x in (1.0, 4.0)]
        >>> print(mj.merge(mj.metrics_weighted(metrics=[0.5, 1.0]), None, experts)['w'])
        [2.]

    Metrics-Weighted Averaging (2025, arXiv:2504.18580); the abstract describes weights from a
    metric and one penalty factor, the power law is this library's proposal.
    """
    return chain(metric_mean(metrics, power, by))
