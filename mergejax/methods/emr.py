"""EMR-Merging: elect a unified delta; mask and rescale it for every task."""

from typing import Literal

import jax.numpy as jnp

from mergejax.core import Parts, Round, joint
from mergejax.methods.elect import largest
from mergejax.summaries import ratio


def _masked(ds):
    """The unified delta as every expert's mask leaves it."""
    sign = jnp.where(sum(ds) > 0, 1.0, -1.0)
    agrees = [jnp.sign(d) == sign for d in ds]
    agreeing = [jnp.where(agree, jnp.abs(d), 0.0) for d, agree in zip(ds, agrees, strict=True)]
    unified = sign * largest(agreeing)
    return [jnp.where(agree, unified, 0.0) for agree in agrees]


@joint
def emr(rescale: Literal["model", "tensor_mean", "none"] = "model") -> Parts:
    r"""One model for each task: an elected delta, masked and rescaled for the task.

    .. math:: s = sign\textstyle\sum_i\tau_i,\quad
        u = s\odot\max_{i:\,sign(\tau_i)=s}|\tau_i|,\quad
        m_t = 1[sign(\tau_t)=s],\quad r_t=\frac{\|\tau_t\|_1}{\|m_t\odot u\|_1},\quad
        \theta_t = \theta_0 + r_t\,m_t\odot u

    with norms over the whole model; a sum of exactly zero elects the sign minus.

    Args:
        rescale: 'model' (as the paper defines r), 'tensor_mean' (sums of each tensor's mean
            magnitude, so that every tensor weighs the same, as the authors' code and FusionBench
            compute it) or 'none' (r = 1).

    Returns:
        A method that gives one model per expert; a single expert comes back as it is.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([4.0, 2.0])}, {'w': jnp.asarray([2.0, -4.0])}]
        >>> for model in mj.merge(mj.emr(), base, experts):
        ...     print(model['w'])
        [6. 0.]
        [ 3. -3.]

    EMR-Merging (Huang et al., 2024, arXiv:2405.17461); `mj.compress` packs the masks.
    """

    def size(d):
        return d.size if rescale == "tensor_mean" else 1

    def measure(ds, leaf, seen):
        own = jnp.stack([jnp.abs(d).sum() / size(d) for d in ds])
        return own, jnp.stack([jnp.abs(d).sum() / size(d) for d in _masked(ds)])

    def solve(totals, count, memory):
        return ratio(*totals[0])

    def apply(ds, leaf, seen):
        return [r * d for r, d in zip(seen[0], _masked(ds), strict=True)]

    if rescale == "none":
        return Parts(apply=lambda ds, leaf, seen: _masked(ds), elementwise=True)
    rounds = (Round(measure, solve),)
    return Parts(apply=apply, rounds=rounds, elementwise=rescale == "model")
