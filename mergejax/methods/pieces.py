"""The pieces that methods share: trimming, dropping, electing signs, reducing, scaling."""

from typing import Any, Literal

import jax.numpy as jnp

from mergejax.core import Array, Parts, Round, coordinates, each, fold, joint, reduce
from mergejax.errors import MergeError
from mergejax.hyper import Density, Fraction, Scaling, Weights
from mergejax.leaves import as_matrix
from mergejax.randomness import keep_mask
from mergejax.summaries import (
    bounded_rank,
    kept_count,
    kth_magnitude,
    kth_magnitude_rounds,
    magnitude_bits,
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


def per_expert(weights: Array, ds: Array) -> Array:
    """Weights, one number or one per expert, shaped to multiply ds [N, ...]."""
    full = jnp.broadcast_to(weights, (ds.shape[0],))
    return full.reshape(-1, *[1] * (ds.ndim - 1))


@each
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

    def keep_from(bits: Array, d: Array) -> Array:
        return jnp.where(magnitude_bits(d) >= bits, d, 0.0)

    if scope == "model":
        if cut == "exact":
            raise MergeError(
                "trim: cut='exact' breaks ties by an element's place and needs scope='tensor'"
            )
        return Parts(
            apply=lambda d, leaf, seen: keep_from(seen[-1], d),
            rounds=kth_magnitude_rounds(rank),
            elementwise=True,
        )

    def keep_first(d: Array, k: Array) -> Array:
        bits, threshold = magnitude_bits(d), kth_magnitude(d, k)
        equal = (bits == threshold).ravel()
        above = (bits > threshold).sum(dtype=jnp.int32)
        first = jnp.cumsum(equal, dtype=jnp.int32) <= k - above
        return jnp.where((bits > threshold) | (equal & first).reshape(d.shape), d, 0.0)

    if cut == "exact":
        return Parts(apply=lambda d, leaf, seen: keep_first(d, seen[-1]), local=rank)
    return Parts(
        apply=lambda d, leaf, seen: keep_from(kth_magnitude(d, seen[-1]), d), local=rank
    )


Rescale = Literal["inverse", "norm", "none"]


def _rescaled(kept: Array, d: Array, rate: Array, rescale: str) -> Array:
    if rescale == "inverse":
        return kept / jnp.where(rate < 1, 1 - rate, 1.0)
    if rescale == "none":
        return kept
    before, after = jnp.abs(d).sum(), jnp.abs(kept).sum()
    usable = (before >= 1e-7) & (after >= 1e-7)
    return kept * jnp.where(usable, before / jnp.where(usable, after, 1.0), 1.0)


@each
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
        return _rescaled(kept, d, rate, rescale)

    return Parts(apply=apply, elementwise=rescale != "norm")


@each(needs=("mask",))
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
        return _rescaled(kept, d, rate, rescale)

    return Parts(apply=apply, elementwise=rescale != "norm")


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
        return jnp.sign(ds.sum(0) if by == "mass" else jnp.sign(ds).sum(0))

    def apply(ds, leaf, seen):
        draw = seen[0] if zero == "majority" else jnp.float32(1)
        sign = vote(ds)
        sign = jnp.where(sign == 0, draw.astype(sign.dtype), sign)[None]
        return jnp.where(jnp.where(sign > 0, ds > 0, ds < 0), ds, 0.0)

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
        share = jnp.where(ds != 0, per_expert(weights, ds), 0.0).sum(0)
        return ds.sum(0) / jnp.where(jnp.abs(share) < 1e-8, 1.0, share)

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
    return lambda ds, leaf, seen: jnp.where(ds.sum(0) > 0, ds.max(0), ds.min(0))


@fold(elementwise=True)
def total(weights: Weights = 1.0) -> Parts:
    r"""The weighted sum of the deltas, :math:`\sum_i w_i \tau_i`.

    Args:
        weights: a number or one per expert.

    Returns:
        A reduction, one expert at a time.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(1)}, {'w': jnp.ones(1)}
        >>> print(mj.merge(mj.total(weights=[0.5, 0.25]), base, [expert, expert])['w'])
        [0.75]
    """
    return Parts(
        apply=lambda state, d, leaf, seen: state + weights * d,
        init=lambda leaf, zeros: zeros,
    )


@fold(elementwise=True, space="either")
def mean(weights: Weights = 1.0) -> Parts:
    r"""The weighted mean, :math:`\sum_i w_i \tau_i / \sum_i w_i`, of deltas or of weights.

    It is computed as :math:`\tau_1 + \sum_i w_i(\tau_i-\tau_1)/\sum_i w_i`, which leaves equal
    experts as they are, to the bit.

    Args:
        weights: a number or one per expert; their sum must not be zero.

    Returns:
        A reduction, one expert at a time; as a chain's only stage it needs no base.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([1.0])}, {'w': jnp.asarray([4.0])}]
        >>> print(mj.merge(mj.mean(weights=[2, 1]), None, experts)['w'])
        [2.]
    """

    def apply(state, d, leaf, seen):
        first, moved, mass = state
        first = jnp.where(leaf.expert == 0, d, first)
        return first, moved + weights * (d - first), mass + weights

    def finish(state, leaf, seen):
        first, moved, mass = state
        return first + moved / mass

    return Parts(
        apply=apply, init=lambda leaf, zeros: (zeros, zeros, jnp.float32(0)), finish=finish
    )


@fold(elementwise=True, space="weights")
def weighted_sum(weights: Weights = 1.0) -> Parts:
    r"""The weighted sum of the experts' weights themselves, :math:`\sum_i w_i \theta_i`.

    Args:
        weights: a number or one per expert; not normalised.

    Returns:
        A reduction, one expert at a time; it needs no base.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([1.0])}, {'w': jnp.asarray([4.0])}]
        >>> print(mj.merge(mj.weighted_sum(weights=[2, 1]), None, experts)['w'])
        [6.]
    """
    return Parts(
        apply=lambda state, x, leaf, seen: state + weights * x,
        init=lambda leaf, zeros: zeros,
    )


@each(elementwise=True)
def scale(scaling: Scaling = 1.0):
    r"""Multiplies a delta by :math:`\lambda`.

    Args:
        scaling: :math:`\lambda`; behind the reduction one number, before it also one per expert.

    Returns:
        A stage for one delta.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(1)}, {'w': jnp.ones(1)}
        >>> print(mj.merge(mj.chain(mj.total(), mj.scale(0.5)), base, [expert])['w'])
        [0.5]
    """
    return lambda d, leaf, seen: scaling * d


@coordinates
def canonical_matrix():
    """Coordinates in which kernels are matrices [in, out], whatever layout they are stored in.

    Returns:
        Coordinates for `within`; use them under `by_role(kernel=...)`.

    Example:
        >>> import mergejax as mj
        >>> mj.by_role(kernel=mj.within(mj.canonical_matrix(), mj.mean()), otherwise=mj.mean())
        by_role(kernel=within(canonical_matrix(), mean()), otherwise=mean())
    """

    def there(ds, leaf):
        views = [as_matrix(d, leaf.layout) for d in ds]
        return jnp.stack([matrix for matrix, _ in views]), views[0][1]

    return there, lambda matrix, restore, leaf: restore(matrix)
