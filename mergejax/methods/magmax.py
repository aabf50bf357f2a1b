"""MagMax: of all changes to an element, take the largest."""

import jax.numpy as jnp

from mergejax.chains import chain
from mergejax.core import Parts, fold, method
from mergejax.hyper import Scaling
from mergejax.methods.combine import scale


@fold(elementwise=True)
def largest_magnitude() -> Parts:
    r"""Takes, element by element, the delta of largest magnitude; of equal ones the later.

    .. math:: \tau_{i^*},\quad i^* = \arg\max_i |\tau_i|

    Returns:
        A reduction, one expert at a time.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([3.0, 1.0])}, {'w': jnp.asarray([-1.0, -2.0])}]
        >>> print(mj.merge(mj.largest_magnitude(), base, experts)['w'])
        [ 3. -2.]
    """
    return Parts(
        apply=lambda state, d, leaf, seen: jnp.where(jnp.abs(d) >= jnp.abs(state), d, state),
        init=lambda leaf, zeros: zeros,
    )


@method
def magmax(scaling: Scaling = 0.5):
    r"""Adds to the base, element by element, the scaled delta of largest magnitude.

    .. math:: \theta = \theta_0 + \lambda\,\tau_{i^*},\quad i^* = \arg\max_i |\tau_i|

    Args:
        scaling: :math:`\lambda`; 0.5 for experts that were fine-tuned one by one from the base.

    Returns:
        A method; with `mj.continual` it takes one expert at a time.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'w': jnp.zeros(2)}
        >>> experts = [{'w': jnp.asarray([3.0, 1.0])}, {'w': jnp.asarray([-1.0, -2.0])}]
        >>> print(mj.merge(mj.magmax(scaling=1.0), base, experts)['w'])
        [ 3. -2.]

    MagMax (Marczak et al., 2024, arXiv:2407.06322).
    """
    return chain(largest_magnitude(), scale(scaling))
