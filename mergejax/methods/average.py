"""Weight averaging: the mean of the experts' weights, plain or weighted."""

from mergejax import hyper
from mergejax.chains import chain
from mergejax.core import method
from mergejax.hyper import Weights
from mergejax.methods.combine import mean, weighted_sum


@method
def average():
    r"""The plain mean of the experts' weights.

    .. math:: \theta = \frac1N\sum_i \theta_i

    Returns:
        A method; it needs no base.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([1.0, 2.0])}, {'w': jnp.asarray([3.0, 2.0])}]
        >>> print(mj.merge(mj.average(), None, experts)['w'])
        [2. 2.]

    Model soups, uniform (Wortsman et al., 2022, arXiv:2203.05482).
    """
    return chain(mean())


@method
def linear(weights: Weights = 1.0, normalize: bool = True):
    r"""The weighted mean of the experts' weights.

    .. math:: \theta = \sum_i w_i\theta_i \,/\, \sum_i w_i

    Args:
        weights: w, a number or one per expert.
        normalize: whether to divide by the sum of the weights.

    Returns:
        A method; it needs no base.

    Raises:
        MergeError: weights that sum to zero although they are to be normalised.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'w': jnp.asarray([1.0])}, {'w': jnp.asarray([5.0])}]
        >>> print(mj.merge(mj.linear(weights=[3, 1]), None, experts)['w'])
        [2.]

    Sums are taken in float32 whatever the storage type (mergekit 0.1.4 takes them in that type).
    """
    if not normalize:
        return chain(weighted_sum(weights))
    hyper.check_sum("linear", weights, "change the weights or pass normalize=False")
    return chain(mean(weights))
