"""CART: what each expert has beyond the average, at low rank."""

from mergejax.chains import by_role, chain
from mergejax.core import method, reduce
from mergejax.hyper import Density, Scaling
from mergejax.linalg.spectral import on_matrices
from mergejax.linalg.triplets import truncate
from mergejax.methods.combine import mean
from mergejax.summaries import kept_count


@reduce(space="either")
def low_rank_around_mean(density: Density = 0.16, scaling: Scaling = 2.3):
    r"""The mean plus the sum of each expert's low-rank distance from it.

    See `cart` for the formula and the arguments.

    Returns:
        A reduction of kernels.

    Example:
        >>> import mergejax as mj
        >>> mj.low_rank_around_mean(density=0.5)
        low_rank_around_mean(density=0.5)
    """

    def merge(*ds):
        center = ds[0] + sum(d - ds[0] for d in ds) / len(ds)
        rank = kept_count(min(ds[0].shape), density)
        return center + scaling * sum(truncate(d - center, rank) for d in ds)

    return lambda ds, leaf, seen: on_matrices(merge, leaf.layout, *ds)


@method
def cart(density: Density = 0.16, scaling: Scaling = 2.3):
    r"""Adds to the mean what each expert has beyond it, at low rank.

    .. math:: \theta=\bar\theta+\lambda\sum_i SVD_r(\theta_i-\bar\theta),\qquad
        r=\lfloor density\cdot\min(in,out)\rfloor

    for kernels; all other leaves are averaged.

    Args:
        density: the share of singular directions that is kept, in (0, 1].
        scaling: :math:`\lambda`. The authors take (density, scaling) = (0.16, 2.3) for ViT-B/32
            and 8 tasks, (0.32, 2.8) for 14, (0.32, 2.4) for 20, (0.16, 3.0) for ViT-L/14 and 8.

    Returns:
        A method; it needs no base.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> experts = [{'kernel': jnp.diag(jnp.asarray(x))} for x in ([3.0, 1.0], [1.0, 1.0])]
        >>> print(mj.merge(mj.cart(density=1.0), None, experts)['kernel'].round(4))
        [[2. 0.]
         [0. 1.]]

    Revisiting weight averaging for model merging (Choi et al., 2024, arXiv:2412.12153), CART; the
    first step of AdaRank, whose masks are learned from data.
    """
    return chain(by_role(kernel=low_rank_around_mean(density, scaling), otherwise=mean()))
