"""RAM: average where experts overlap, keep what only one of them changed."""

from typing import Literal

import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import Parts, Round, each, method, reduce
from mergejax.hyper import NonNegative
from mergejax.methods.elect import disjoint_mean

Scope = Literal["model", "tensor"]


def _active(ds, epsilon):
    """Which experts changed an element, and how many of them."""
    active = [jnp.abs(d) > epsilon for d in ds]
    return active, sum(a.astype(jnp.int32) for a in active)


def _counts(active, overlap):
    """For each expert: how many elements it shares with others, how many are its own."""
    shared = [(a & (overlap >= 2)).sum(dtype=jnp.int32) for a in active]
    unique = [(a & (overlap == 1)).sum(dtype=jnp.int32) for a in active]
    return jnp.stack(shared), jnp.stack(unique)


@each(elementwise=True)
def drop_small(epsilon: NonNegative = 1e-5):
    r"""Sets changes up to a magnitude to zero.

    .. math:: \hat\tau_j=\tau_j\,1[|\tau_j|>\epsilon]

    Args:
        epsilon: changes up to this magnitude count as none.

    Returns:
        A stage for one expert's delta.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(2)}, {'w': jnp.asarray([0.1, -2.0])}
        >>> print(mj.merge(mj.chain(mj.drop_small(0.5), mj.total()), base, [expert])['w'])
        [ 0. -2.]
    """
    return lambda d, leaf, seen: jnp.where(jnp.abs(d) > epsilon, d, 0.0)


@reduce
def overlap_mean(
    epsilon: NonNegative = 1e-5,
    gain: NonNegative = 0.1,
    limit: NonNegative = 0.2,
    scope: Scope = "model",
) -> Parts:
    r"""Averages what several experts changed and amplifies what only one of them changed.

    With :math:`c` the number of experts whose delta exceeds :math:`\epsilon` at an element,

    .. math:: \tau_m = \frac1c\sum_{i:\,|\tau_i|>\epsilon}\tau_i \;(c\ge2),\qquad
        \tau_m = \big(1+gain\cdot\min(\rho_i, limit)\big)\,\tau_i \;(c=1),\qquad
        \rho_i=\frac{\#shared_i}{\#unique_i}

    and 0 where no expert changed anything; :math:`\rho_i = limit` for an expert without elements
    of its own.

    Args:
        epsilon: changes up to this magnitude count as none.
        gain: how much more the elements count that one expert alone changed.
        limit: of :math:`\rho`.
        scope: elements are counted over the whole 'model' or per 'tensor'.

    Returns:
        A reduction.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([3.0, 1.0])}, {'w': jnp.asarray([0.0, 2.0])}]
        >>> print(mj.merge(mj.overlap_mean(gain=1.0, limit=0.5), base, experts)['w'])
        [4.5 1.5]
    """

    def apply(ds, leaf, seen):
        active, overlap = _active(ds, epsilon)
        shared, unique = seen[0] if scope == "model" else _counts(active, overlap)
        share = shared.astype(jnp.float32) / jnp.maximum(unique, 1).astype(jnp.float32)
        factor = 1 + gain * jnp.where(unique > 0, jnp.minimum(share, limit), limit)
        kept = [jnp.where(a, d, 0.0) for a, d in zip(active, ds, strict=True)]
        alone = sum(factor[i] * d for i, d in enumerate(kept))
        together = sum(kept) / jnp.maximum(overlap, 1).astype(jnp.float32)
        return jnp.where(overlap == 1, alone, together)

    if scope == "tensor":
        return Parts(apply=apply)
    measured = Round(lambda ds, leaf, seen: _counts(*_active(ds, epsilon)))
    return Parts(apply=apply, rounds=(measured,), elementwise=True)


@method
def ram(epsilon: NonNegative = 1e-5):
    r"""Averages where the experts overlap and keeps in full what only one of them changed.

    .. math:: \theta = \theta_0 + \frac1c\sum_{i:\,|\tau_i|>\epsilon}\tau_i

    with :math:`c` the number of experts whose change of an element exceeds :math:`\epsilon`. For
    experts whose deltas are sparse, as after reinforcement learning.

    Args:
        epsilon: changes up to this magnitude count as none.

    Returns:
        A method.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([3.0, 1.0])}, {'w': jnp.asarray([0.0, 2.0])}]
        >>> print(mj.merge(mj.ram(), base, experts)['w'])
        [3.  1.5]

    Behavior Knowledge Merge in Reinforced Agentic Models (2026), without rescaling.
    """
    return chain(drop_small(epsilon), disjoint_mean())


@method
def ram_plus(
    epsilon: NonNegative = 1e-5,
    gain: NonNegative = 0.1,
    limit: NonNegative = 0.2,
    scope: Scope = "model",
):
    r"""RAM that amplifies what only one expert changed, the more the others overlap with it.

    .. math:: \theta = \theta_0 + \frac1c\sum_{i:\,|\tau_i|>\epsilon}
        \begin{cases}\tau_i & c\ge2\\(1+gain\cdot\min(\rho_i,limit))\,\tau_i & c=1\end{cases}

    with :math:`\rho_i` the number of elements that expert i shares over those of its own.

    Args:
        epsilon: changes up to this magnitude count as none.
        gain: how much more the elements count that one expert alone changed.
        limit: of :math:`\rho`.
        scope: elements are counted over the whole 'model', as published, or per 'tensor', as
            mergekit does.

    Returns:
        A method.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([3.0, 1.0])}, {'w': jnp.asarray([0.0, 2.0])}]
        >>> print(mj.merge(mj.ram_plus(gain=1.0, limit=0.5), base, experts)['w'])
        [4.5 1.5]

    RAM+ (Behavior Knowledge Merge in Reinforced Agentic Models, 2026) in the paper's form; the
    authors' later code is gain=R-1 with limit=1.
    """
    return chain(overlap_mean(epsilon, gain, limit, scope))
