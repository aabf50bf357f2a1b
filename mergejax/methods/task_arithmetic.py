"""Task arithmetic: the base plus scaled deltas."""

from mergejax.chains import chain
from mergejax.core import method
from mergejax.hyper import Scaling, Weights
from mergejax.methods.combine import scale, total


@method
def task_arithmetic(scaling: Scaling = 0.3, weights: Weights = 1.0):
    r"""Adds the experts' scaled deltas to the base.

    .. math:: \theta = \theta_0 + \lambda\sum_i w_i(\theta_i-\theta_0)

    Args:
        scaling: :math:`\lambda`; 0.3 for many experts, 1 for one (a chat vector), negative to
            forget a task.
        weights: w, a number or one per expert.

    Returns:
        A method.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, a, b = ({'w': jnp.asarray([x])} for x in (1.0, 2.0, 4.0))
        >>> print(mj.merge(mj.task_arithmetic(scaling=0.5), base, [a, b])['w'])
        [3.]

    Editing models with task arithmetic (Ilharco et al., 2023, arXiv:2212.04089).
    """
    return chain(total(weights), scale(scaling))
