"""LiNeS: scale a delta by the depth of its layer."""

import jax.numpy as jnp

from mergejax.core import Parts, Round, each, refine
from mergejax.hyper import Fraction, Scaling
from mergejax.summaries import ratio


def _scaled(d, leaf, alpha, beta):
    return jnp.where(leaf.block >= 0, alpha + beta * leaf.depth, alpha) * d


@each(elementwise=True)
def lines(alpha: Fraction = 0.1, beta: Scaling = 0.9):
    r"""Scales a delta linearly with depth.

    .. math:: \tau_\ell \leftarrow \Big(\alpha + \beta\,\frac{\ell}{L-1}\Big)\,\tau_\ell

    for block :math:`\ell` of L; leaves outside the blocks are scaled by :math:`\alpha`.

    Args:
        alpha: the factor of the first block, in [0, 1].
        beta: what the last block gets on top; :math:`1-\alpha` for a single task, as published.

    Returns:
        A stage for one delta, before or behind the reduction.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {f'block_{i}': {'w': jnp.zeros(1)} for i in range(3)}
        >>> expert = {f'block_{i}': {'w': jnp.ones(1)} for i in range(3)}
        >>> merged = mj.merge(mj.chain(mj.total(), mj.lines(0.0, 1.0)), base, [expert])
        >>> [float(merged[f'block_{i}']['w'][0]) for i in range(3)]
        [0.0, 0.5, 1.0]

    LiNeS (Wang et al., 2025, arXiv:2410.17146), the form for one model.
    """
    return lambda d, leaf, seen: _scaled(d, leaf, alpha, beta)


@refine(elementwise=True)
def lines_multi_task(beta: Scaling = 0.5) -> Parts:
    r"""LiNeS behind a merging method, with its first factor from the norms.

    .. math:: \alpha = \frac{\|\sum_i\tau_i\|_1}{N\,\|\tau_m\|_1},\qquad
        \tau_\ell \leftarrow \Big(\alpha + \beta\,\frac{\ell}{L-1}\Big)\,\tau_\ell

    with the experts' raw deltas :math:`\tau_i` and the merged delta :math:`\tau_m`, both over the
    whole model; :math:`\alpha=0` where the merged delta is zero.

    Args:
        beta: what the last block gets on top; searched in (0, 1.5] by the authors.

    Returns:
        A stage behind the reduction.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {f'block_{i}': {'w': jnp.zeros(1)} for i in range(2)}
        >>> expert = {f'block_{i}': {'w': jnp.ones(1)} for i in range(2)}
        >>> method = mj.chain(mj.total(), mj.lines_multi_task(beta=1.0))
        >>> merged = mj.merge(method, base, [expert, expert])
        >>> [float(merged[f'block_{i}']['w'][0]) for i in range(2)]
        [1.0, 3.0]

    LiNeS (Wang et al., 2025, arXiv:2410.17146), the form for several tasks.
    """

    def measure(merged, ds, leaf, seen):
        return jnp.abs(sum(ds)).sum() / len(ds), jnp.abs(merged).sum()

    return Parts(
        apply=lambda merged, ds, leaf, seen: _scaled(merged, leaf, seen[0], beta),
        rounds=(Round(measure, lambda totals, size, memory: ratio(*totals[0])),),
    )
