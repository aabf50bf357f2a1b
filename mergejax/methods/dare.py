"""DARE: drop most of each delta at random and rescale the rest."""

from mergejax.chains import chain
from mergejax.core import method
from mergejax.hyper import Fraction, Scaling, Weights
from mergejax.methods.sparsify import Rescale, drop
from mergejax.methods.task_arithmetic import task_arithmetic


@method
def dare(
    rate: Fraction = 0.9,
    scaling: Scaling = 0.3,
    weights: Weights = 1.0,
    rescale: Rescale = "inverse",
):
    r"""Drops elements of each delta at random, rescales the others, adds them to the base.

    .. math:: \theta=\theta_0+\lambda\sum_i w_i\,\frac{m_i\odot\tau_i}{1-rate},\quad
        m_i\sim Bernoulli(1-rate)

    Before another method write `chain(drop(rate), ties(...))`.

    Args:
        rate: fraction that is dropped, in [0, 1]; a number or one per expert.
        scaling: :math:`\lambda` of the task arithmetic behind it.
        weights: w, a number or one per expert.
        rescale: see `drop`.

    Returns:
        A method.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(1000)}, {'w': jnp.ones(1000)}
        >>> merged = mj.merge(mj.dare(rate=0.5, scaling=1.0), base, [expert])
        >>> sorted(set(merged['w'].tolist()))
        [0.0, 2.0]

    DARE with task arithmetic (Yu et al., 2024, arXiv:2311.03099), with the exact factor
    1 / (1 - rate); mergekit matches norms instead (rescale='norm').
    """
    return chain(drop(rate, rescale), task_arithmetic(scaling, weights))
