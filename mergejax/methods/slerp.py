"""SLERP: interpolate two models along the arc between them."""

import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import Parts, Round, method, reduce
from mergejax.hyper import Scaling


@reduce(space="weights", experts=2)
def arc(t: Scaling = 0.5):
    r"""Interpolates two experts' leaves along the great circle between their directions.

    .. math:: \frac{\sin((1-t)\varphi)\,a+\sin(t\varphi)\,b}{\sin\varphi},\quad
        \cos\varphi=\frac{\langle a,b\rangle}{\|a\|\|b\|}

    and :math:`(1-t)a+tb` where :math:`|\cos\varphi|>0.9995` or a leaf is zero.

    Args:
        t: 0 gives the first expert, 1 the second.

    Returns:
        A reduction of exactly two experts.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([1.0, 0.0])}, {'w': jnp.asarray([0.0, 1.0])}]
        >>> print(mj.merge(mj.arc(0.5), None, experts)['w'].round(4))
        [0.7071 0.7071]
    """

    def between(ds, norms, cosine):
        a, b = ds
        usable = (norms[0] > 1e-8) & (norms[1] > 1e-8)
        cosine = jnp.clip(cosine, -1.0, 1.0)
        straight = (jnp.abs(cosine) > 0.9995) | ~usable
        angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
        first = jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle))
        second = jnp.where(straight, t, jnp.sin(t * angle) / jnp.sin(angle))
        return first * a + second * b

    def apply(ds, leaf, seen):
        norms = [jnp.sqrt(jnp.sum(x * x)) for x in ds]
        units = [x / jnp.where(n > 1e-8, n, 1.0) for x, n in zip(ds, norms, strict=True)]
        return between(ds, norms, jnp.sum(units[0] * units[1]))

    def products(ds, leaf, seen):
        a, b = ds
        return jnp.sum(a * a), jnp.sum(b * b), jnp.sum(a * b)

    def apply_blocked(ds, leaf, seen):
        *norms, inner = seen[-1]
        norms = [jnp.sqrt(x) for x in norms]
        return between(ds, norms, inner / jnp.maximum(norms[0] * norms[1], 1e-16))

    blocked = Parts(apply_blocked, rounds=(Round(products),), elementwise=True)
    return Parts(apply, blocked=blocked)


@method
def slerp(t: Scaling = 0.5):
    r"""Spherical linear interpolation of two models, leaf by leaf.

    .. math:: \theta = \frac{\sin((1-t)\varphi)\,\theta_1+\sin(t\varphi)\,\theta_2}{\sin\varphi}

    with the angle :math:`\varphi` between the flattened leaves; linear where they are parallel.

    Args:
        t: 0 gives the first expert, 1 the second; may differ by name and by depth.

    Returns:
        A method of exactly two experts; it needs no base.

    Raises:
        MergeError: when merging: not exactly two experts.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([2.0, 0.0])}, {'w': jnp.asarray([0.0, 2.0])}]
        >>> print(mj.merge(mj.slerp(t=0.5), None, experts)['w'].round(4))
        [1.4142 1.4142]

    Shoemake, 1985, on the weights themselves, as in mergekit 0.1.5 and FusionBench.
    """
    return chain(arc(t))
