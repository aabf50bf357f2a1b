"""Task arithmetic in a trust region: only where experts hardly disturb each other."""

import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import Parts, joint, method
from mergejax.hyper import Fraction, Scaling
from mergejax.methods.combine import scale, total
from mergejax.summaries import bounded_rank, kept_count, magnitude_key, rank_rounds


def _conflict(ds):
    """For each element, how much the experts' magnitudes coincide."""
    sizes = [jnp.abs(d) for d in ds]
    together = sum(sizes)
    return sum(size * (together - size) for size in sizes)


@joint(elementwise=True)
def mask_conflicts(quantile: Fraction = 0.99) -> Parts:
    r"""Sets elements to zero where several experts have large deltas.

    See `trust_region` for the formula and the arguments.

    Returns:
        A stage on all experts' deltas.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(3)}
        >>> experts = [{'w': jnp.asarray([3.0, 2.0, 0.0])}, {'w': jnp.asarray([0.1, 2.0, 5.0])}]
        >>> print(mj.merge(mj.chain(mj.mask_conflicts(0.9), mj.total()), base, experts)['w'])
        [3.1 0.  5. ]
    """

    def apply(ds, leaf, seen):
        conflict = _conflict(ds)
        kept = (magnitude_key(conflict) < seen[1][0][0]) | (conflict == 0)
        return [jnp.where(kept, d, 0.0) for d in ds]

    rounds = rank_rounds(
        lambda ds, leaf, seen: [magnitude_key(_conflict(ds))],
        lambda size: [bounded_rank(size - kept_count(size, quantile), size)],
    )
    return Parts(apply=apply, rounds=rounds)


@method
def trust_region(scaling: Scaling = 0.3, quantile: Fraction = 0.99):
    r"""Task arithmetic without the elements where the experts disturb each other most.

    .. math:: \theta=\theta_0+\lambda\sum_i\tau_i\odot 1[\Omega<\Omega_{(q)}],\qquad
        \Omega=\sum_{i\ne j}|\tau_i|\,|\tau_j|

    with the quantile over all elements of the model; elements without any conflict
    (:math:`\Omega=0`) are kept.

    Args:
        scaling: :math:`\lambda`.
        quantile: q, in [0, 1]; the element at the place :math:`\lfloor nq\rfloor` of the sorted
            :math:`\Omega`, counted from 0, and all above it are dropped.

    Returns:
        A method.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([4.0, 2.0])}, {'w': jnp.asarray([0.0, 2.0])}]
        >>> print(mj.merge(mj.trust_region(scaling=0.5), base, experts)['w'])
        [2. 0.]

    Task arithmetic in the trust region (Sun et al., 2025, arXiv:2501.15065), in the form without
    data: the magnitude of an expert's delta stands for that of its task's gradient.
    """
    return chain(mask_conflicts(quantile), total(), scale(scaling))
