"""Task arithmetic: the base plus scaled deltas."""

from mergejax.chains import chain
from mergejax.core import method, reduce
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


@reduce(elementwise=True, experts=2)
def first_and_residual(scaling: Scaling = 1.0):
    r"""The first delta and the scaled second, :math:`\tau_1+\lambda\tau_2`.

    Args:
        scaling: :math:`\lambda`.

    Returns:
        A reduction of exactly two experts.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, a, b = ({'w': jnp.asarray([x])} for x in (0.0, 1.0, 4.0))
        >>> print(mj.merge(mj.first_and_residual(scaling=0.5), base, [a, b])['w'])
        [3.]
    """
    return lambda ds, leaf, seen: ds[0] + scaling * ds[1]


@method
def chat_vector(scaling: Scaling = 1.0):
    r"""Gives a continually pre-trained model what a chat model learnt from the same base.

    .. math:: \theta=\theta_1+\lambda(\theta_2-\theta_0)

    Args:
        scaling: :math:`\lambda`.

    Returns:
        A method of exactly two experts: the continually pre-trained one, then the chat or
        instruction model; the base is what both started from.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, pretrained, chat = ({'w': jnp.asarray([x])} for x in (1.0, 5.0, 2.0))
        >>> print(mj.merge(mj.chat_vector(), base, [pretrained, chat])['w'])
        [6.]

    Chat Vector (Huang et al., 2024, arXiv:2310.04799).
    """
    return chain(first_and_residual(scaling))


@reduce(elementwise=True, experts=3)
def difference_added(scaling: Scaling = 1.0):
    r"""The third delta and what leads from the first to the second,
    :math:`\tau_3+\lambda(\tau_2-\tau_1)`.

    Args:
        scaling: :math:`\lambda`.

    Returns:
        A reduction of exactly three experts.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, a, b, c = ({'w': jnp.asarray([x])} for x in (0.0, 1.0, 4.0, 5.0))
        >>> print(mj.merge(mj.difference_added(), base, [a, b, c])['w'])
        [8.]
    """
    return lambda ds, leaf, seen: ds[2] + scaling * (ds[1] - ds[0])


@method
def analogy(scaling: Scaling = 1.0):
    r"""A is to B as C is to the result.

    .. math:: \theta=\theta_0+\tau_C+\lambda(\tau_B-\tau_A)

    Args:
        scaling: :math:`\lambda`.

    Returns:
        A method of exactly three experts, A, B and C.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, a, b, c = ({'w': jnp.asarray([x])} for x in (0.0, 1.0, 4.0, 5.0))
        >>> print(mj.merge(mj.analogy(), base, [a, b, c])['w'])
        [8.]

    Task analogies (Ilharco et al., 2023, arXiv:2212.04089).
    """
    return chain(difference_added(scaling))
