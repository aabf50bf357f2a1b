"""Model Breadcrumbs: drop the largest and the smallest changes, keep those in between."""

from typing import Any, Literal

import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import Parts, each, method
from mergejax.hyper import Density, Fraction, Scaling, Weights
from mergejax.leaves import LeafInfo, as_rows, row_length
from mergejax.methods.combine import scale, total
from mergejax.summaries import first_largest, kept_count, magnitude_key

Scope = Literal["row", "tensor"]


@each(unrolled=True)
def trim_band(density: Density = 0.2, top: Fraction = 0.1, scope: Scope = "row") -> Parts:
    r"""Sets the largest magnitudes to zero, and the smallest; a band in between is kept.

    With the magnitudes of a row of n in descending order, those ranked
    :math:`\lfloor n\,top\rfloor + 1` to :math:`\lfloor n\,top\rfloor + \lfloor n\,density\rfloor`
    are kept, of equal ones the first.

    Args:
        density: fraction that is kept, in (0, 1].
        top: fraction of the largest that is dropped, in [0, 1].
        scope: 'row' (all inputs of one output; a vector is one row), as published, or 'tensor':
            then `top` gives way where the two exceed the whole, and density=1 keeps everything,
            as in mergekit.

    Returns:
        A stage for one expert's delta.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(4)}, {'w': jnp.asarray([1.0, -4.0, 2.0, 3.0])}
        >>> print(mj.merge(mj.chain(mj.trim_band(0.5, 0.25), mj.total()), base, [expert])['w'])
        [0. 0. 2. 3.]

    Model Breadcrumbs (Davari and Belilovsky, 2024, arXiv:2312.06795), as in the authors' code.
    """

    def ranks(info: LeafInfo) -> tuple[Any, Any]:
        if scope == "row":
            n = row_length(info)
            dropped = kept_count(n, top)
            return dropped, dropped + kept_count(n, density)
        kept = kept_count(info.size, density)
        dropped = jnp.minimum(kept_count(info.size, top), info.size - kept)
        return dropped, dropped + kept

    def apply(d, leaf, seen):
        dropped, last = seen[-1]
        rows, restore = as_rows(d, leaf.layout)
        if scope == "tensor":
            rows, restore = d.reshape(1, -1), lambda rows: rows.reshape(d.shape)
        keys = magnitude_key(rows)
        kept = first_largest(keys, last) & ~first_largest(keys, dropped)
        return restore(jnp.where(kept, rows, 0.0))

    return Parts(apply=apply, local=ranks)


@method
def breadcrumbs(
    density: Density = 0.2,
    top: Fraction = 0.1,
    scaling: Scaling = 0.4,
    weights: Weights = 1.0,
    scope: Scope = "row",
):
    r"""Adds up deltas from which the largest and the smallest elements are dropped.

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i\, band(\tau_i)

    Args:
        density: fraction that is kept, in (0, 1].
        top: fraction of the largest magnitudes that is dropped, in [0, 1].
        scaling: :math:`\lambda`.
        weights: w, a number or one per expert.
        scope: see `trim_band`.

    Returns:
        A method.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(4)}, {'w': jnp.asarray([1.0, -4.0, 2.0, 3.0])}
        >>> print(mj.merge(mj.breadcrumbs(0.25, 0.25, scaling=1.0), base, [expert])['w'])
        [0. 0. 0. 3.]

    Model Breadcrumbs (Davari and Belilovsky, 2024, arXiv:2312.06795); with a sign election write
    `trim_band()|ties(density=1.0)`. mergekit's form is scope='tensor' with top=0.01.
    """
    return chain(trim_band(density, top, scope), total(weights), scale(scaling))
