"""DELLA: drop at random, small magnitudes more often than large ones."""

import jax.numpy as jnp
import numpy as np

from mergejax import hyper, varying
from mergejax.chains import chain
from mergejax.core import Parts, each, method
from mergejax.errors import MergeError
from mergejax.hyper import Density, Fraction, Scaling, Weights
from mergejax.leaves import as_rows
from mergejax.methods.combine import scale
from mergejax.methods.elect import disjoint_mean, elect_sign, weigh
from mergejax.methods.sparsify import Rescale, rescaled
from mergejax.randomness import keep_mask
from mergejax.summaries import magnitude_key, ranks_by_row


def _keep_probability(rows, density, spread):
    """Linear in the rank of the magnitude within its row; equal ones are ranked by their place."""
    n = rows.shape[-1]
    if n == 1:
        return jnp.broadcast_to(density, rows.shape)
    share = ranks_by_row(magnitude_key(rows)).astype(jnp.float32) / (n - 1)
    return density - spread + 2 * spread * share


@each(unrolled=True)
def drop_by_rank(
    density: Density = 0.7, spread: Fraction = 0.07, rescale: Rescale = "inverse"
) -> Parts:
    r"""Drops elements at random, with a probability that falls with the rank of their magnitude.

    .. math:: \hat\tau_j = m_j\tau_j/p_j,\quad m_j\sim Bernoulli(p_j),\quad
        p_j = density - spread + 2\,spread\,\frac{r_j-1}{n-1}

    with :math:`r_j` the rank within the row (all inputs of one output), 1 for the smallest.

    Args:
        density: mean probability of keeping, in (0, 1]; a number or one per expert.
        spread: how far the probability of the first and the last rank lies from it; the smallest
            must stay above 0 and the largest at most 1.
        rescale: 'inverse' (1 / p, as published), 'norm' (the leaf's L1 norm before over the one
            after, as mergekit does) or 'none'.

    Returns:
        A stage for one expert's delta.

    Raises:
        MergeError: a value out of range, or probabilities that leave (0, 1].

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(1000)}, {'w': jnp.ones(1000)}
        >>> method = mj.chain(mj.drop_by_rank(0.5, 0.0), mj.total())
        >>> sorted(set(mj.merge(method, base, [expert])['w'].tolist()))
        [0.0, 2.0]

    MagPrune of DELLA-Merging (Deep et al., 2024, arXiv:2406.11617), ranks within rows.
    """
    _check(density, spread)

    def apply(d, leaf, seen):
        rows, restore = as_rows(d, leaf.layout)
        probability = restore(_keep_probability(rows, density, spread))
        kept = jnp.where(keep_mask(leaf, d.shape, probability), d, 0.0)
        return rescaled(kept, d, probability, rescale)

    return Parts(apply=apply)


def _check(density, spread):
    values = (density, spread)
    if hyper.is_traced(values) or any(isinstance(value, varying.Rule) for value in values):
        return
    mean, half = np.asarray(density, np.float64), np.asarray(spread, np.float64)
    if np.any(mean - half <= 0) or np.any(mean + half > 1 + 1e-6):
        raise MergeError(
            f"drop_by_rank(density={density}, spread={spread}) keeps with probabilities that leave "
            "(0, 1]; choose a spread below the density and below 1 - density"
        )


@method
def della(
    density: Density = 0.7,
    spread: Fraction = 0.07,
    scaling: Scaling = 1.1,
    weights: Weights = 1.0,
    rescale: Rescale = "inverse",
):
    r"""Drops small changes at random, elects signs, averages the experts that agree.

    .. math:: \theta=\theta_0+\lambda\,\frac{\sum_{i:\,sign(\hat\tau_i)=s}w_i\hat\tau_i}
        {\sum_{i:\,sign(\hat\tau_i)=s}w_i},\quad s=sign\textstyle\sum_i w_i\hat\tau_i

    with :math:`\hat\tau_i` from `drop_by_rank`; a drawn vote counts as plus.

    Args:
        density: mean probability of keeping, in (0, 1]; a number or one per expert.
        spread: see `drop_by_rank`; half the window of the authors' command line.
        scaling: :math:`\lambda`.
        weights: w, a number or one per expert; they vote, too.
        rescale: see `drop_by_rank`.

    Returns:
        A method.

    Raises:
        MergeError: a value out of range, probabilities that leave (0, 1], or weights that cancel.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(2)}, {'w': jnp.asarray([1.0, -2.0])}
        >>> print(mj.merge(mj.della(1.0, 0.0, scaling=1.0), base, [expert, expert])['w'])
        [ 1. -2.]

    DELLA-Merging (Deep et al., 2024, arXiv:2406.11617). Without the election write
    `drop_by_rank()|task_arithmetic()`; mergekit's form is rescale='norm' with spread=0.15.
    """
    hyper.check_sum("della", weights, "change the weights")
    return chain(
        drop_by_rank(density, spread, rescale),
        weigh(weights),
        elect_sign(zero="plus"),
        disjoint_mean(weights),
        scale(scaling),
    )
