"""Localize-and-Stitch: keep each expert's largest changes and stitch the regions together."""

import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import Parts, method, reduce
from mergejax.hyper import Density
from mergejax.summaries import bounded_rank, kept_count, magnitude_key, rank_rounds


@reduce
def stitch(density: Density = 0.05) -> Parts:
    r"""Averages, element by element, the experts among whose largest changes it is.

    .. math:: \tau_m=\frac{\sum_i m_i\tau_i}{\max(1,\sum_i m_i)},\qquad
        m_i=1[|\tau_i|\ge|\tau_i|_{(k)}],\quad k=\lfloor density\cdot n\rfloor

    with the k-th largest magnitude of the whole model of n elements.

    Args:
        density: fraction of the model that each expert localises, in (0, 1].

    Returns:
        A reduction.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(4)}
        >>> experts = [{'w': jnp.asarray([4.0, 3.0, 0.1, 0.0])},
        ...            {'w': jnp.asarray([2.0, 0.0, -5.0, 0.3])}]
        >>> print(mj.merge(mj.stitch(density=0.5), base, experts)['w'])
        [ 3.  3. -5.  0.]
    """

    def apply(ds, leaf, seen):
        masks = [magnitude_key(d) >= key[0] for d, key in zip(ds, seen[1], strict=True)]
        overlap = sum(m.astype(jnp.float32) for m in masks)
        kept = sum(jnp.where(m, d, 0.0) for m, d in zip(masks, ds, strict=True))
        return kept / jnp.maximum(overlap, 1.0)

    rounds = rank_rounds(
        lambda ds, leaf, seen: [magnitude_key(d) for d in ds],
        lambda size: [bounded_rank(kept_count(size, density), size)],
    )
    return Parts(apply=apply, rounds=rounds, elementwise=True)


@method
def localize_and_stitch(density: Density = 0.05):
    r"""Keeps the largest changes of each expert and averages them where they overlap.

    .. math:: \theta=\theta_0+\frac{\sum_i m_i\odot\tau_i}{\max(1,\sum_i m_i)}

    with :math:`m_i` the mask of the largest `density` of the whole delta.

    Args:
        density: fraction of the model that each expert localises, in (0, 1]; 0.05 for language
            models, 0.1 for vision.

    Returns:
        A method.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(4)}
        >>> experts = [{'w': jnp.asarray([4.0, 3.0, 0.1, 0.0])},
        ...            {'w': jnp.asarray([2.0, 0.0, -5.0, 0.3])}]
        >>> print(mj.merge(mj.localize_and_stitch(density=0.5), base, experts)['w'])
        [ 3.  3. -5.  0.]

    Localize-and-Stitch, the form without data (He et al., 2025, arXiv:2408.13656). The authors'
    code keeps what is strictly above the k-th magnitude, one element less.
    """
    return chain(stitch(density))


@reduce(elementwise=True, needs=("mask",))
def stitch_given():
    r"""Averages, element by element, the experts whose given mask has it.

    .. math:: \tau_m=\frac{\sum_i m_i\tau_i}{\max(1,\sum_i m_i)}

    Returns:
        A reduction that reads the statistic 'mask' (0 or 1, of the leaf's shape).

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(3)}
        >>> experts = [{'w': jnp.full(3, x)} for x in (2.0, 4.0)]
        >>> masks = [{'w': jnp.asarray(m)} for m in ([1, 1, 0], [0, 1, 0])]
        >>> print(mj.merge(mj.stitch_given(), base, experts, stats={'mask': masks})['w'])
        [2. 3. 0.]
    """

    def apply(ds, leaf, seen):
        masks = [m.astype(ds[0].dtype) for m in leaf.stats["mask"]]
        kept = sum(m * d for m, d in zip(masks, ds, strict=True))
        return kept / jnp.maximum(sum(masks), 1)

    return apply


@method
def localize_and_stitch_trained():
    r"""Stitches the regions that were learned for each expert, averaged where they overlap.

    .. math:: \theta=\theta_0+\frac{\sum_i m_i\odot\tau_i}{\max(1,\sum_i m_i)}

    Returns:
        A method that reads the statistic 'mask' (see `mj.collect.localize`).

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(3)}
        >>> experts = [{'w': jnp.full(3, x)} for x in (2.0, 4.0)]
        >>> masks = [{'w': jnp.asarray(m)} for m in ([1, 1, 0], [0, 1, 0])]
        >>> method = mj.localize_and_stitch_trained()
        >>> print(mj.merge(method, base, experts, stats={'mask': masks})['w'])
        [2. 3. 0.]

    Localize-and-Stitch with learned masks (He et al., 2025, arXiv:2408.13656).
    """
    return chain(stitch_given())
