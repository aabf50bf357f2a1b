"""Pieces that make deltas sparse: trimming by magnitude, dropping at random or by a mask."""

from typing import Any, Literal

import jax.numpy as jnp

from mergejax.core import Array, Parts, each
from mergejax.errors import MergeError
from mergejax.hyper import Density, Fraction
from mergejax.randomness import keep_mask
from mergejax.summaries import (
    bounded_rank,
    first_largest,
    kept_count,
    kth_key,
    magnitude_key,
    rank_rounds,
)

Cut = Literal["published", "exact", "complement"]

# How many of n elements are kept at a density. The implementations differ by one: the authors of
# TIES cut at the (n - floor(n * density))-th smallest magnitude and keep it; mergekit keeps
# floor(n * density), at least one; MergeLM cuts at the floor(n * (1 - density))-th smallest.
_RANKS = {
    "published": lambda size, density: kept_count(size, density) + 1,
    "exact": lambda size, density: kept_count(size, density),
    "complement": lambda size, density: size - kept_count(size, 1 - density) + 1,
}


@each(unrolled=True)
def trim(
    density: Density = 0.2,
    scope: Literal["model", "tensor"] = "model",
    cut: Cut = "published",
) -> Parts:
    r"""Keeps the elements of largest magnitude and sets the others to zero.

    .. math:: \hat\tau_j = \tau_j \, 1[|\tau_j| \ge |\tau|_{(k)}]

    where :math:`|\tau|_{(k)}` is the k-th largest magnitude, of the whole model's delta or of one
    leaf's. It is found by counting, exactly.

    Args:
        density: fraction that is kept, in (0, 1]; a number or one per expert.
        scope: 'model' (one threshold for all leaves together) or 'tensor' (one a leaf).
        cut: 'published' keeps the :math:`\lfloor n\,density\rfloor + 1` largest and all that equal
            the last of them; 'complement' cuts at the :math:`\lfloor n(1-density)\rfloor`-th
            smallest, kept; 'exact' (scope 'tensor' only) keeps exactly
            :math:`\max(1,\lfloor n\,density\rfloor)`, of equal magnitudes the first in the leaf.

    Returns:
        A stage for one expert's delta.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(4)}, {'w': jnp.asarray([1.0, -4.0, 2.0, 3.0])}
        >>> print(mj.merge(mj.chain(mj.trim(0.25), mj.total()), base, [expert])['w'])
        [ 0. -4.  0.  3.]

    The trimming step of TIES-Merging (Yadav et al., 2023, arXiv:2306.01708), 'published' as in the
    authors' code.
    """

    def rank(size: Any) -> Any:
        return bounded_rank(_RANKS[cut](size, density), size)

    def keep_from(key: Array, d: Array) -> Array:
        return jnp.where(magnitude_key(d) >= key, d, 0.0)

    counted = Parts(
        apply=lambda d, leaf, seen: keep_from(seen[-1][0][0], d),
        rounds=rank_rounds(lambda d, leaf, seen: [magnitude_key(d)], lambda n: [rank(n)]),
        elementwise=True,
    )
    if scope == "model":
        if cut == "exact":
            raise MergeError(
                "trim: cut='exact' breaks ties by an element's place and needs scope='tensor'"
            )
        return counted

    def keep_first(d: Array, k: Array) -> Array:
        kept = first_largest(magnitude_key(d).reshape(1, -1), k).reshape(d.shape)
        return jnp.where(kept, d, 0.0)

    def keep_equal(d: Array, k: Array) -> Array:
        return keep_from(kth_key(magnitude_key(d), k), d)

    keep = keep_first if cut == "exact" else keep_equal
    return Parts(
        apply=lambda d, leaf, seen: keep(d, seen[-1]),
        local=lambda info: rank(info.size),
        blocked=None if cut == "exact" else counted,
    )


Rescale = Literal["inverse", "norm", "none"]


def rescaled(kept: Array, d: Array, probability: Array, rescale: str) -> Array:
    """Makes up for what was dropped.

    Args:
        kept: the delta with zeros where it was dropped.
        d: the delta before.
        probability: of keeping, a number or an array of the delta's shape.
        rescale: see `drop`.
    """
    if rescale == "inverse":
        return kept / jnp.where(probability > 0, probability, 1.0)
    if rescale == "none":
        return kept
    before, after = jnp.abs(d).sum(), jnp.abs(kept).sum()
    usable = (before >= 1e-7) & (after >= 1e-7)
    return kept * jnp.where(usable, before / jnp.where(usable, after, 1.0), 1.0)


@each(unrolled=True)
def drop(rate: Fraction = 0.9, rescale: Rescale = "inverse") -> Parts:
    r"""Drops elements at random and rescales the others so that the expectation stays.

    .. math:: \hat\tau_j = m_j \tau_j / (1 - rate), \quad m_j \sim Bernoulli(1 - rate)

    The mask is a function of the seed, the expert's name, the leaf's name and the element's index
    alone, so it does not depend on the order, the executor, the sharding or the blocks.

    Args:
        rate: fraction that is dropped, in [0, 1]; a number or one per expert. 1 drops everything.
        rescale: 'inverse' (1 / (1 - rate), as published), 'norm' (the leaf's L1 norm before over
            the one after, as mergekit does) or 'none'.

    Returns:
        A stage for one expert's delta.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(1000)}, {'w': jnp.ones(1000)}
        >>> merged = mj.merge(mj.chain(mj.drop(0.75), mj.total()), base, [expert])
        >>> sorted(set(merged['w'].tolist()))
        [0.0, 4.0]

    DARE (Yu et al., 2024, arXiv:2311.03099).
    """

    def apply(d, leaf, seen):
        kept = jnp.where(keep_mask(leaf, d.shape, 1 - rate), d, 0.0)
        return rescaled(kept, d, 1 - rate, rescale)

    return Parts(apply=apply, elementwise=rescale != "norm")


@each(needs=("mask",), unrolled=True)
def drop_given(rate: Fraction = 0.9, rescale: Rescale = "inverse") -> Parts:
    """Drops the elements that a given mask names, and rescales like `drop`.

    Args:
        rate: fraction that the mask drops, in [0, 1]; used by rescale='inverse' only.
        rescale: as in `drop`.

    Returns:
        A stage for one expert's delta; it reads the statistic 'mask' ([...] of the leaf's shape,
        non-zero where an element is kept).

    Raises:
        MergeError: a value out of range; no mask for a leaf.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(3)}, {'w': jnp.ones(3)}
        >>> method = mj.chain(mj.drop_given(0.5), mj.total())
        >>> masks = [{'w': jnp.asarray([1, 0, 1])}]
        >>> print(mj.merge(method, base, [expert], stats={'mask': masks})['w'])
        [2. 0. 2.]
    """

    def apply(d, leaf, seen):
        kept = jnp.where(leaf.stats["mask"] != 0, d, 0.0)
        return rescaled(kept, d, 1 - rate, rescale)

    return Parts(apply=apply, elementwise=rescale != "norm")
