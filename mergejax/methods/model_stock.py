"""Model Stock: how far to go from the base towards the average, from the angles between deltas."""

import itertools
import math
from typing import Literal

import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import method, reduce
from mergejax.leaves import as_rows

Scope = Literal["tensor", "row"]
Angle = Literal["cosine", "degrees"]


def _mean_cosine(ds, total):
    """The mean over pairs of experts of the cosine between their vectors.

    Each expert's direction is compared with the sum of those before it, so that the pairs take one
    sum. `total` sums over what is one vector.
    """
    directions = [_over(d, jnp.sqrt(total(d * d))) for d in ds]
    before, agreement = directions[0], jnp.zeros_like(ds[0])
    for direction in directions[1:]:
        agreement, before = agreement + direction * before, before + direction
    return jnp.clip(total(agreement) / math.comb(len(ds), 2), -1.0, 1.0)


def _cosine_of_mean_angle(ds, total):
    """The cosine of the mean over pairs of experts of the angle between their vectors."""
    lengths = [jnp.sqrt(total(d * d)) for d in ds]
    angles = []
    for (a, long), (b, other) in itertools.combinations(zip(ds, lengths, strict=True), 2):
        angles.append(jnp.arccos(jnp.clip(_over(total(a * b), long * other), -1.0, 1.0)))
    return jnp.cos(sum(angles) / len(angles))


def _over(x, length):
    """x / length, and 0 where the length is 0."""
    return jnp.where(length > 0, x / jnp.where(length > 0, length, 1.0), 0.0)


@reduce(at_least=2)
def toward_mean(scope: Scope = "tensor", angle: Angle = "cosine", clip: bool = False):
    r"""Scales the mean delta by how well the experts agree.

    .. math:: \tau_m=\frac{Nc}{1+(N-1)c}\,\frac1N\sum_i\tau_i,\qquad
        c=\frac{2}{N(N-1)}\sum_{i<j}\cos(\tau_i,\tau_j)

    Args:
        scope: one c for a 'tensor' or for each 'row' (all inputs of one output).
        angle: whether 'cosine's are averaged, or angles ('degrees') and c is the cosine of that.
        clip: whether the factor is kept within [0, 1].

    Returns:
        A reduction of two experts or more; where the factor has no value (:math:`c=-1/(N-1)`) or
        deltas are zero, it is 0.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([1.0, 0.0])}, {'w': jnp.asarray([0.6, 0.8])}]
        >>> print(mj.merge(mj.toward_mean(), base, experts)['w'])
        [0.6 0.3]
    """

    def apply(ds, leaf, seen):
        views = [as_rows(d, leaf.layout) for d in ds]
        rows, restore = [rows for rows, _ in views], views[0][1]
        of_row = lambda x: x.sum(-1, keepdims=True)
        total = of_row if scope == "row" else lambda x: of_row(x).sum(0, keepdims=True)
        cosine = (_mean_cosine if angle == "cosine" else _cosine_of_mean_angle)(rows, total)
        below = 1 + (len(ds) - 1) * cosine
        usable = jnp.abs(below) >= 1e-6
        factor = jnp.where(usable, len(ds) * cosine / jnp.where(usable, below, 1.0), 0.0)
        factor = jnp.clip(factor, 0.0, 1.0) if clip else factor
        return restore(factor * (sum(rows) / len(rows)))

    return apply


@method
def model_stock(scope: Scope = "tensor", angle: Angle = "cosine", clip: bool = False):
    r"""Moves from the base towards the average as far as the angles between deltas say.

    .. math:: \theta=t\,\frac1N\sum_i\theta_i+(1-t)\,\theta_0,\qquad t=\frac{Nc}{1+(N-1)c}

    with c the mean cosine between the experts' deltas.

    Args:
        scope: one t for a 'tensor' or for each 'row' (all inputs of one output), the paper's
            filter-wise form.
        angle: 'cosine' (mergekit) or 'degrees' (FusionBench, which averages angles).
        clip: whether t is kept within [0, 1]; a negative mean cosine moves away from the experts
            otherwise.

    Returns:
        A method of two experts or more.

    Raises:
        MergeError: when merging: fewer than two experts.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([1.0, 0.0])}, {'w': jnp.asarray([0.6, 0.8])}]
        >>> print(mj.merge(mj.model_stock(), base, experts)['w'])
        [0.6 0.3]

    Model Stock (Jang et al., 2024, arXiv:2403.19522). Cosines of zero deltas count as 0.
    """
    return chain(toward_mean(scope, angle, clip))
