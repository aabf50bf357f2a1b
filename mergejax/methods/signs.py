"""Pieces that keep of a delta its signs and one magnitude; `mj.compress` packs what they leave."""

from typing import Any, Literal

import jax.numpy as jnp

from mergejax.core import Array, Parts, Round, each
from mergejax.hyper import Density, Positive
from mergejax.summaries import bounded_rank, kept_count, magnitude_key, rank_rounds, ratio, squares


def _largest_rounds(density: Any, first: int = 0) -> tuple[Round, Round]:
    """Finds the key that the share `density` of a model's magnitudes reaches; at least one does."""
    return rank_rounds(
        lambda d, leaf, seen: [magnitude_key(d)],
        lambda size: [bounded_rank(kept_count(size, density), size)],
        first,
    )


def _signs(d: Array, key: Array, magnitude: Array) -> Array:
    return jnp.where(magnitude_key(d) >= key, magnitude * jnp.sign(d), 0.0)


@each(elementwise=True)
def compeft(density: Density = 0.2, alpha: Positive = 1.0) -> Parts:
    r"""Keeps the signs of the largest elements, all of one magnitude.

    .. math:: \hat\tau_j = \alpha\,std(\tau)\;sign(\tau_j)\,1[|\tau_j|\ge|\tau|_{(k)}]

    with the threshold and the standard deviation (n - 1 in its denominator) of the whole model's
    delta; a delta whose elements are all equal keeps that magnitude.

    Args:
        density: fraction that is kept, in (0, 1]; at least one element is, and all that equal the
            smallest of them. Searched in 0.05 to 0.5 by the authors.
        alpha: :math:`\alpha`; searched in 0.5 to 10 by the authors, smaller for larger models.

    Returns:
        A stage for one expert's delta.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(4)}, {'w': jnp.asarray([1.0, -3.0, 1.0, 1.0])}
        >>> print(mj.merge('compeft(density=0.25)', base, [expert])['w'])
        [ 0. -2.  0.  0.]

    ComPEFT (Yadav et al., 2023, arXiv:2311.13171).
    """

    def moments(d, leaf, seen):
        return jnp.sum(d), squares(d)

    def deviation(totals, size, memory):
        whole, square = totals[0]
        count = jnp.maximum(1.0 * size, 1.0)
        variance = (square - whole * whole / count) / jnp.maximum(count - 1, 1.0)
        # Less than this is rounding: all elements are equal.
        varied = variance > 1e-6 * square / count
        return jnp.sqrt(jnp.where(varied, variance, square / count))

    return Parts(
        apply=lambda d, leaf, seen: _signs(d, seen[-1][0][0], alpha * seen[0]),
        rounds=(Round(moments, deviation), *_largest_rounds(density, first=1)),
    )


@each(elementwise=True)
def t_switch(density: Density = 0.1, norm: Literal["whole", "kept"] = "whole") -> Parts:
    r"""Keeps the signs of the largest elements, of the magnitude that keeps the norm.

    .. math:: \hat\tau = \frac{\|\tau\|_2}{\|m\|_2}\;m\odot sign(\tau),\qquad
        m_j = 1[|\tau_j|\ge|\tau|_{(k)},\ \tau_j\ne 0]

    with the threshold and the norms of the whole model's delta: m is the activation switch, the
    sign the polarity switch, the factor the knob.

    Args:
        density: fraction that is kept, in (0, 1]; at least one element is, and all that equal the
            smallest of them. The authors drop 90 to 97 percent.
        norm: the norm that is kept, of the 'whole' delta or of its 'kept' elements.

    Returns:
        A stage for one expert's delta.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(3)}, {'w': jnp.asarray([2.0, -6.0, 3.0])}
        >>> print(mj.merge('t_switch(density=0.4)', base, [expert])['w'])
        [ 0. -7.  0.]

    Less is more: efficient model merging with binary task switch (Qi et al., 2025,
    arXiv:2412.00054). No code of the authors' was at hand; reports of the method differ in `norm`.
    """

    def sizes(d, leaf, seen):
        kept = (magnitude_key(d) >= seen[1][0][0]) & (d != 0)
        return squares(d if norm == "whole" else jnp.where(kept, d, 0.0)), kept.sum(dtype=jnp.int32)

    def knob(totals, size, memory):
        return ratio(*totals[2]) ** 0.5

    return Parts(
        apply=lambda d, leaf, seen: _signs(d, seen[1][0][0], seen[2]),
        rounds=(*_largest_rounds(density), Round(sizes, knob)),
    )


@each
def bit_delta():
    r"""Keeps of each kernel's delta its signs and the mean magnitude; other leaves stay.

    .. math:: \hat\Delta = \Big(\tfrac1n\textstyle\sum_j|\Delta_j|\Big)\;sgn(\Delta),\qquad sgn(0)=1

    The factor is the best in the least-squares sense for these signs.

    Returns:
        A stage for one expert's delta. Where a delta is sparse it becomes dense noise, so
        `compeft` or `t_switch` are better there.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'kernel': jnp.zeros((1, 2))}, {'kernel': jnp.asarray([[1.0, -3.0]])}
        >>> print(mj.merge('bit_delta()', base, [expert])['kernel'])
        [[ 2. -2.]]

    BitDelta (Liu et al., 2024, arXiv:2402.10193), without its optional calibration of the factors.
    """

    def apply(d, leaf, seen):
        if leaf.role != "kernel":
            return d
        return jnp.where(d >= 0, 1.0, -1.0) * jnp.abs(d).mean()

    return apply
