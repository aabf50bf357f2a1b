"""Pieces that settle conflicts between experts: weighing, electing signs, disjoint reductions."""

import functools
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp

from mergejax.core import Array, Parts, Round, each, joint, reduce
from mergejax.hyper import Weights


def per_expert(weights: Array, count: int) -> list[Array]:
    """Weights, one number or one per expert, as a list with one number per expert."""
    return list(jnp.broadcast_to(weights, (count,)))


def largest(arrays: Sequence[Array]) -> Array:
    """The elementwise maximum of several arrays."""
    return functools.reduce(jnp.maximum, arrays)


@each(elementwise=True)
def weigh(weights: Weights = 1.0):
    """Multiplies each expert's delta by its weight.

    Args:
        weights: a number or one per expert.

    Returns:
        A stage for one expert's delta.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(1)}, {'w': jnp.ones(1)}
        >>> print(mj.merge('weigh(weights=[1, 2])|total()', base, [expert, expert])['w'])
        [3.]
    """
    return lambda d, leaf, seen: weights * d


@joint(elementwise=True)
def elect_sign(
    by: Literal["mass", "count"] = "mass", zero: Literal["majority", "plus"] = "majority"
) -> Parts:
    r"""Elects one sign per element and sets the experts that disagree with it to zero.

    .. math:: s = sign(\textstyle\sum_i \tau_i) \text{ or } sign(\textstyle\sum_i sign(\tau_i))

    Args:
        by: 'mass' (the sum's sign, as published) or 'count' (the majority of signs).
        zero: the sign where the vote is a draw: 'majority' (the sign that most elements of the
            whole model have, as published) or 'plus' (mergekit).

    Returns:
        A stage on all experts' deltas.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([3.0, 1.0])}, {'w': jnp.asarray([-1.0, 1.0])}]
        >>> print(mj.merge(mj.chain(mj.elect_sign(), mj.total()), base, experts)['w'])
        [3. 2.]

    TIES-Merging (Yadav et al., 2023, arXiv:2306.01708).
    """

    def vote(ds):
        return jnp.sign(sum(ds) if by == "mass" else sum(jnp.sign(d) for d in ds))

    def apply(ds, leaf, seen):
        draw = seen[0] if zero == "majority" else jnp.float32(1)
        sign = vote(ds)
        sign = jnp.where(sign == 0, draw.astype(sign.dtype), sign)
        return [jnp.where(jnp.where(sign > 0, d > 0, d < 0), d, 0.0) for d in ds]

    def solve(totals, size, memory):
        return (totals[0] > 0).astype(totals[0].dtype) - (totals[0] < 0).astype(totals[0].dtype)

    majority = Round(lambda ds, leaf, seen: vote(ds).astype(jnp.int32).sum(dtype=jnp.int32), solve)
    return Parts(apply=apply, rounds=(majority,) if zero == "majority" else ())


@reduce(elementwise=True)
def disjoint_mean(weights: Weights = 1.0):
    r"""Averages, element by element, the experts whose value is not zero.

    .. math:: \sum_i \tau_i \,/ \sum_i w_i 1[\tau_i \ne 0]

    Args:
        weights: w; with `weigh(weights)` before it, this is the weighted mean of those experts.

    Returns:
        A reduction.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([3.0, 1.0])}, {'w': jnp.asarray([0.0, 2.0])}]
        >>> print(mj.merge(mj.disjoint_mean(), base, experts)['w'])
        [3.  1.5]

    TIES-Merging (Yadav et al., 2023, arXiv:2306.01708).
    """

    def apply(ds, leaf, seen):
        several = zip(ds, per_expert(weights, len(ds)), strict=True)
        share = sum(jnp.where(d != 0, weight, 0.0) for d, weight in several)
        return sum(ds) / jnp.where(jnp.abs(share) < 1e-8, 1.0, share)

    return apply


@reduce(elementwise=True)
def disjoint_max():
    """Takes, element by element, the value of largest magnitude among experts of one sign.

    Returns:
        A reduction; the experts' signs must agree (see `elect_sign`).

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([3.0, -1.0])}, {'w': jnp.asarray([0.0, -2.0])}]
        >>> print(mj.merge(mj.disjoint_max(), base, experts)['w'])
        [ 3. -2.]

    TIES-Merging (Yadav et al., 2023, arXiv:2306.01708), the code's 'dis-max'.
    """
    return lambda ds, leaf, seen: jnp.where(sum(ds) > 0, largest(ds), -largest([-d for d in ds]))
