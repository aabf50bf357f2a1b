"""TALL-masks: which elements of the merged delta a task needs; Consensus: those several need."""

import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import joint, method, refine, restore
from mergejax.hyper import NonNegatives, Scaling, Whole
from mergejax.methods.combine import scale, total
from mergejax.methods.elect import per_expert


def _needed(ds, merged, threshold):
    """For each expert, where its own delta outweighs that of the others."""
    several = zip(ds, per_expert(threshold, len(ds)), strict=True)
    return [jnp.abs(d) > limit * jnp.abs(merged - d) for d, limit in several]


def _masked(ds, merged, threshold):
    return [jnp.where(mask, merged, 0.0) for mask in _needed(ds, merged, threshold)]


@joint(elementwise=True)
def tall_masks(threshold: NonNegatives = 0.4):
    r"""One model for each task: the sum of the deltas where the task needs it, else the base.

    .. math:: \tau_m=\textstyle\sum_i\tau_i,\quad
        m_t = 1[\,|\tau_t| > \lambda_t\,|\tau_m-\tau_t|\,],\quad \theta_t=\theta_0+m_t\odot\tau_m

    Args:
        threshold: :math:`\lambda`, a number or one per expert; searched in 0.2 to 0.6 for each
            task by the authors. A larger one makes the mask smaller.

    Returns:
        A method that gives one model per expert; a single expert comes back as it is.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(3)}
        >>> experts = [{'w': jnp.asarray([4.0, 1.0, 0.0])}, {'w': jnp.asarray([1.0, 1.0, 2.0])}]
        >>> for model in mj.merge(mj.tall_masks(threshold=0.5), base, experts):
        ...     print(model['w'])
        [5. 2. 0.]
        [0. 2. 2.]

    Localizing task information for improved model merging and compression (Wang et al., 2024,
    arXiv:2405.07813), over the plain sum, as in the authors' code; `mj.compress` packs the masks.
    Over another method write `ties(reduction='sum')|task_masks()`.
    """

    return lambda ds, leaf, seen: _masked(ds, sum(ds), threshold)


@restore(elementwise=True)
def task_masks(threshold: NonNegatives = 0.4):
    r"""One model for each task: a merged delta where the task needs it, else the base.

    .. math:: \theta_t=\theta_0+m_t\odot\tau_m,\qquad
        m_t = 1[\,|\tau_t| > \lambda_t\,|\tau_m-\tau_t|\,]

    Args:
        threshold: :math:`\lambda`, a number or one per expert.

    Returns:
        A stage that ends a chain, behind the reduction, whatever method that is.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([4.0, 1.0])}, {'w': jnp.asarray([-1.0, 2.0])}]
        >>> method = "ties(density=1.0, reduction='sum')|task_masks(threshold=0.4)"
        >>> [model['w'].tolist() for model in mj.merge(method, base, experts)]
        [[4.0, 3.0], [0.0, 3.0]]

    TALL-masks (Wang et al., 2024, arXiv:2405.07813): behind `total()` these are `tall_masks`; the
    authors' other choice is ties(density=0.2, reduction='sum').
    """
    return lambda merged, ds, leaf, seen: _masked(ds, merged, threshold)


@refine(elementwise=True)
def consensus_mask(threshold: NonNegatives = 0.4, agreement: Whole = 2):
    r"""Keeps the elements of a merged delta that several experts need.

    .. math:: \tau_m \leftarrow \tau_m\odot 1\Big[\textstyle\sum_t m_t \ge k\Big],\qquad
        m_t = 1[\,|\tau_t| > \lambda_t\,|\tau_m-\tau_t|\,]

    Args:
        threshold: :math:`\lambda`, a number or one per expert.
        agreement: k, how many experts must need an element; 0 keeps all, 2 removes what only one
            expert needs (selfish) or none (catastrophic).

    Returns:
        A stage behind the reduction, whatever method that is.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([4.0, 1.0])}, {'w': jnp.asarray([0.0, 2.0])}]
        >>> print(mj.merge('total()|consensus_mask(threshold=0.2)', base, experts)['w'])
        [0. 3.]

    Consensus Merging (Wang et al., 2024, arXiv:2405.07813).
    """

    def apply(merged, ds, leaf, seen):
        masks = _needed(ds, merged, threshold)
        return jnp.where(sum(mask.astype(jnp.int32) for mask in masks) >= agreement, merged, 0.0)

    return apply


@method
def consensus(threshold: NonNegatives = 0.4, agreement: Whole = 2, scaling: Scaling = 0.3):
    r"""Task arithmetic on the elements that several experts need.

    .. math:: \theta=\theta_0+\lambda\,1\Big[\textstyle\sum_t m_t \ge k\Big]\odot\sum_i\tau_i

    with the masks of `tall_masks`.

    Args:
        threshold: of the masks, a number or one per expert; searched in 0.2 to 0.6.
        agreement: k, how many experts must need an element; 0 is task arithmetic, 1 removes what
            none needs, more than there are experts gives the base.
        scaling: :math:`\lambda`; searched in 0.1 to 1.

    Returns:
        A method.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([4.0, 1.0])}, {'w': jnp.asarray([0.0, 2.0])}]
        >>> print(mj.merge(mj.consensus(threshold=0.2, scaling=1.0), base, experts)['w'])
        [0. 3.]

    Consensus Merging (Wang et al., 2024, arXiv:2405.07813), the authors' Consensus TA; over
    another method it is that method with `consensus_mask` behind it.
    """
    return chain(total(), consensus_mask(threshold, agreement), scale(scaling))
