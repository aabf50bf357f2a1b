"""Pieces that add up, average and scale, one expert at a time; kernels as matrices."""

import jax.numpy as jnp

from mergejax.core import Parts, coordinates, each, fold
from mergejax.hyper import Scaling, Weights
from mergejax.leaves import as_matrix


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


@each(elementwise=True)
def of_deltas():
    """Leads a chain on to the deltas: what follows works on what each expert adds to the base.

    Returns:
        A stage that changes no value.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.asarray([1.0])}, {'w': jnp.asarray([3.0])}
        >>> print(mj.merge('of_deltas()|sphere_mean([2.0, 2.0], normalize=False)', base,
        ...                [expert, expert])['w'])  # 1 + 2 * 2 + 2 * 2
        [9.]
    """
    return lambda d, leaf, seen: d


@each(elementwise=True, space="weights")
def of_weights():
    """Leads a chain on to the weights: what follows works on whole models and needs no base.

    Returns:
        A stage that changes no value.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.asarray([1.0])}, {'w': jnp.asarray([3.0])}
        >>> print(mj.merge('of_weights()|sphere_mean([2.0, 2.0], normalize=False)', base,
        ...                [expert, expert])['w'])  # 2 * 3 + 2 * 3
        [12.]
    """
    return lambda x, leaf, seen: x


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
        return [matrix for matrix, _ in views], views[0][1]

    return there, lambda matrix, restore, leaf: restore(matrix)
