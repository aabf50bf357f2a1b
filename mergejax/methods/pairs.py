"""Methods of one expert beside its base: Nearswap, Arcee Fusion, passthrough."""

import jax
import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import each, method, reduce
from mergejax.hyper import NonNegative, Scaling
from mergejax.leaves import as_rows
from mergejax.methods.combine import total
from mergejax.summaries import kth_key, value_key


@reduce(experts=1)
def near(t: NonNegative = 0.01):
    r"""Takes small changes in full and of large ones no more than t.

    .. math:: \tau_m = \min\Big(1, \frac{t}{\max(|\tau|, 10^{-6})}\Big)\,\tau

    Args:
        t: the largest change.

    Returns:
        A reduction of exactly one expert.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(2)}, {'w': jnp.asarray([0.5, -3.0])}
        >>> print(mj.merge(mj.near(t=1.0), base, [expert])['w'])
        [ 0.5 -1. ]
    """

    def apply(ds, leaf, seen):
        share = jnp.clip(t / jnp.maximum(jnp.abs(ds[0]), 1e-6), 0.0, 1.0)
        return share * ds[0]

    return apply


@method
def nearswap(t: NonNegative = 0.01):
    r"""Adopts another model where it is near the base, and moves by t where it is not.

    .. math:: \theta = \theta_0 + \min\Big(1, \frac{t}{\max(|\tau|, 10^{-6})}\Big)\,\tau

    Args:
        t: the largest change of an element.

    Returns:
        A method of exactly one expert.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(2)}, {'w': jnp.asarray([0.5, -3.0])}
        >>> print(mj.merge(mj.nearswap(t=1.0), base, [expert])['w'])
        [ 0.5 -1. ]

    Nearswap of mergekit 0.1.5.
    """
    return chain(near(t))


@each(unrolled=True)
def important():
    r"""Keeps the changes whose importance is an outlier of their leaf, and drops the others.

    .. math:: I=|\tau|\cdot KL\big(softmax(\theta)\,\|\,softmax(\theta_0)\big),\qquad
        \hat\tau=\tau\,1[I\ge Q_2+1.5\,(Q_3-Q_1)]

    with the softmax over the inputs of each output and the quartiles :math:`Q` of the leaf.

    Returns:
        A stage for one expert's delta.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(5)}
        >>> expert = {'w': jnp.asarray([0.1, 0.2, 0.1, 3.0, 0.1])}
        >>> print(mj.merge(mj.chain(mj.important(), mj.total()), base, [expert])['w'])
        [0. 0. 0. 3. 0.]
    """

    def apply(d, leaf, seen):
        rows, restore = as_rows(d, leaf.layout)
        base, _ = as_rows(leaf.base, leaf.layout)
        importance = jnp.abs(rows) * _divergence(base, rows)
        keys = value_key(importance)
        quartiles = [_quantile(importance, keys, share) for share in (0.25, 0.5, 0.75)]
        threshold = quartiles[1] + 1.5 * (quartiles[2] - quartiles[0])
        return restore(jnp.where(importance >= threshold, rows, 0.0))

    return apply


def _divergence(base, delta, tiny=1e-8):
    """KL(softmax(base + delta) || softmax(base)) of each row, with `tiny` added to both.

    The sum of p log(p / q) loses three digits where the rows are close. With r = p / q - 1 it is
    the sum of q ((1 + r) log(1 + r) - r), whose terms are not negative, and r comes from the delta.
    """
    q = jax.nn.softmax(base, axis=-1)
    shift = jnp.log1p(jnp.sum(q * jnp.expm1(delta), axis=-1, keepdims=True))
    r = q / (q + tiny) * jnp.expm1(delta - shift)
    series = r**2 * (1 / 2 - r * (1 / 6 - r * (1 / 12 - r * (1 / 20 - r * (1 / 30 - r / 42)))))
    far = jnp.abs(r) > 0.05
    large = jnp.where(far, r, 0.0)
    excess = jnp.where(far, (1 + large) * jnp.log1p(large) - large, series)
    return jnp.sum((q + tiny) * excess, axis=-1, keepdims=True)


def _quantile(x, keys, share):
    """The element at the place floor(share * (n - 1)) of the ascending order."""
    rank = x.size - int(share * (x.size - 1))
    return jnp.max(jnp.where(keys == kth_key(keys, rank), x, -jnp.inf))


@method
def arcee_fusion():
    r"""Takes over from another model what differs most in size and in meaning.

    .. math:: \theta=\theta_0+\tau\,1[I\ge Q_2+1.5\,(Q_3-Q_1)],\qquad
        I=|\tau|\cdot KL\big(softmax(\theta)\,\|\,softmax(\theta_0)\big)

    with the softmax over the inputs of each output and the quartiles of each leaf.

    Returns:
        A method; of several experts the changes are added.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(5)}
        >>> expert = {'w': jnp.asarray([0.1, 0.2, 0.1, 3.0, 0.1])}
        >>> print(mj.merge(mj.arcee_fusion(), base, [expert])['w'])
        [0. 0. 0. 3. 0.]

    Arcee Fusion of mergekit 0.1.5, which takes one expert; quartiles are exact here, also for
    leaves of more than a million elements, where mergekit draws a sample.
    """
    return chain(important(), total())


@reduce(elementwise=True, space="weights", experts=1)
def copy(scale: Scaling = 1.0):
    """Copies the one expert's weights, multiplied by a number.

    Args:
        scale: the factor; with `by_name` 0 for the projections that end an inserted block makes
            it do nothing.

    Returns:
        A reduction of exactly one expert; it needs no base.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> print(mj.merge(mj.copy(scale=0.5), None, [{'w': jnp.asarray([2.0])}])['w'])
        [1.]
    """
    return lambda ds, leaf, seen: scale * ds[0]


@method
def passthrough(scale: Scaling = 1.0):
    r"""The weights of one model, scaled.

    .. math:: \theta = s\,\theta_1

    Args:
        scale: s; usually `by_name({...})`.

    Returns:
        A method of exactly one expert; it needs no base. `mj.stack_layers` makes a model of the
        layers of several.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> expert = {'a': {'out': jnp.ones(1)}, 'b': {'in': jnp.ones(1)}}
        >>> scale = mj.by_name({'out': 0.0, '.*': 1.0})
        >>> merged = mj.merge(mj.passthrough(scale), None, [expert])
        >>> float(merged['a']['out'][0]), float(merged['b']['in'][0])
        (0.0, 1.0)

    passthrough of mergekit 0.1.5.
    """
    return chain(copy(scale))
