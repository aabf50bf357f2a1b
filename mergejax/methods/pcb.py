"""PCB-Merging: let the parameters of all experts compete, and merge the winners."""

from typing import Literal

import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import Parts, method, reduce
from mergejax.hyper import Density, Fraction, Weights
from mergejax.methods.elect import per_expert
from mergejax.summaries import (
    bounded_rank,
    kept_count,
    magnitude_key,
    magnitude_of,
    rank_rounds,
    value_key,
    value_of,
)

Between = Literal["normalized", "raw", "pairs"]


def _clamped(ds, limits):
    """Deltas with magnitudes clamped to their limits, and those magnitudes scaled to [0, 1]."""
    clamped, scaled = [], []
    for d, (high, low) in zip(ds, limits, strict=True):
        high, low = magnitude_of(high), magnitude_of(low)
        magnitude = jnp.clip(jnp.abs(d), low, high)
        span = jnp.where(high > low, high - low, 1.0)
        clamped.append(jnp.sign(d) * magnitude)
        scaled.append((magnitude - low) / span)
    return clamped, scaled


def _scores(ds, scaled, between):
    """How well each expert's element does: by its own magnitude, and by what the others want."""
    signed = [jnp.sign(d) * s for d, s in zip(ds, scaled, strict=True)]
    if between == "pairs":
        agreement = [sum(jnp.tanh(one * other) for other in signed) for one in signed]
    else:
        whole = sum(signed if between == "normalized" else ds)
        agreement = [jnp.tanh(d * whole) for d in ds]
    return [jnp.exp(len(ds) * s**2) * a for s, a in zip(scaled, agreement, strict=True)]


@reduce
def compete(
    density: Density = 0.05,
    weights: Weights = 1.2,
    between: Between = "normalized",
    clip: Fraction = 0.01,
) -> Parts:
    r"""Averages, element by element, the experts weighted by how their change competes.

    With magnitudes clamped to their quantiles and scaled to [0, 1], :math:`a_i`, each element of
    each of N experts has the score

    .. math:: S_i = e^{N a_i^2}\,\tanh\Big(\tau_i\sum_j sign(\tau_j)a_j\Big)

    Scores below the threshold :math:`t_i` of the best `density` of the whole model weigh nothing:

    .. math:: W_i=\frac{\max(S_i-t_i,0)}{\max S_i-t_i},\qquad
        \tau_m=\frac{\sum_i w_i\tilde\tau_iW_i}{\sum_iW_i}

    with :math:`\tilde\tau_i` the clamped delta.

    Args:
        density: fraction of each expert's elements that may win, in (0, 1].
        weights: w, a number or one per expert, the authors' lambda.
        between: what an expert's delta is compared with: the sum of all experts' 'normalized'
            deltas, of the 'raw' ones, or each other one in 'pairs'.
        clip: fraction of elements beyond either quantile that is clamped.

    Returns:
        A reduction.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(4)}
        >>> experts = [{'w': jnp.asarray([4.0, 1.0, 2.0, 0.5])},
        ...            {'w': jnp.asarray([4.0, -1.0, 0.1, 0.5])}]
        >>> print(mj.merge(mj.compete(0.75, 1.0, clip=0.0), base, experts)['w'])
        [ 4. -1.  2.  0.]
    """

    def limits(size):
        # Ascending places floor(n c) and floor(n (1 - c)) - 1, counted from the largest.
        low = bounded_rank(size - kept_count(size, clip), size)
        high = bounded_rank(size - kept_count(size, 1 - clip) + 1, size)
        return [high, low]

    def scores(ds, leaf, seen):
        return _scores(ds, _clamped(ds, seen[1])[1], between)

    def winners(size):
        return [1, bounded_rank(size - kept_count(size, 1 - density), size)]

    def apply(ds, leaf, seen):
        clamped, scaled = _clamped(ds, seen[1])
        above = below = jnp.zeros_like(ds[0])
        several = per_expert(weights, len(ds))
        for d, score, key, weight in zip(
            clamped, _scores(ds, scaled, between), seen[3], several, strict=True
        ):
            best, threshold = value_of(key[0]), value_of(key[1])
            span = jnp.where(best > threshold, best - threshold, 1.0)
            # The element that is the threshold weighs nothing; computed again it may differ from
            # what was measured in the last places, and any weight at all would be a full one.
            above_threshold = score - threshold > 1e-6 * jnp.abs(threshold)
            win = jnp.where(above_threshold, score - threshold, 0.0) / span
            above, below = above + weight * d * win, below + win
        return above / jnp.maximum(below, 1e-12)

    clamps = rank_rounds(lambda ds, leaf, seen: [magnitude_key(d) for d in ds], limits)
    wins = rank_rounds(
        lambda ds, leaf, seen: [value_key(s) for s in scores(ds, leaf, seen)],
        winners,
        first=2,
    )
    return Parts(apply=apply, rounds=(*clamps, *wins), elementwise=True)


@method
def pcb(
    density: Density = 0.05,
    weights: Weights = 1.2,
    between: Between = "normalized",
    clip: Fraction = 0.01,
):
    r"""Averages the experts where their changes compete best, in magnitude and with the others.

    .. math:: \theta=\theta_0+\frac{\sum_i w_i\tilde\tau_iW_i}{\sum_iW_i},\qquad
        W_i\propto\max\Big(e^{N a_i^2}\tanh\big(\tau_i\textstyle\sum_j sign(\tau_j)a_j\big)
        -t_i,\,0\Big)

    with clamped deltas, their scaled magnitudes :math:`a_i` and thresholds :math:`t_i` as in
    `compete`, all over the whole model.

    Args:
        density: fraction of each expert's elements that may win, in (0, 1]; 0.05 for vision
            transformers, 0.1 to 0.2 for language models.
        weights: w, a number or one per expert; the evolutionary form searches one per expert in
            [0.8, 1.3] on validation.
        between: 'normalized' (the authors' vision script), 'raw' (their README, with clip=0.0001)
            or 'pairs' (their evolutionary script).
        clip: fraction of elements beyond either quantile that is clamped.

    Returns:
        A method.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(4)}
        >>> experts = [{'w': jnp.asarray([4.0, 1.0, 2.0, 0.5])},
        ...            {'w': jnp.asarray([4.0, -1.0, 0.1, 0.5])}]
        >>> print(mj.merge(mj.pcb(0.75, 1.0, clip=0.0), base, experts)['w'])
        [ 4. -1.  2.  0.]

    PCB-Merging (Du et al., 2024, arXiv:2410.02396).
    """
    return chain(compete(density, weights, between, clip))
