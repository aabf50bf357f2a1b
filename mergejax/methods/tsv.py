"""TSV-Merge: the leading singular vectors of all experts, made orthogonal to each other."""

from typing import Literal

import jax.numpy as jnp

from mergejax.chains import by_role, chain
from mergejax.core import each, method, reduce
from mergejax.hyper import NonNegative, Scaling
from mergejax.linalg.spectral import on_matrices
from mergejax.linalg.subspaces import equal_ranks, leading, ranks_by_density
from mergejax.linalg.triplets import polar
from mergejax.methods.combine import mean, scale

_RANKS = {"equal": equal_ranks, "density": ranks_by_density}


@reduce
def orthogonalized_total(ranks: Literal["equal", "density"] = "equal"):
    r"""Adds up low-rank deltas whose singular vectors are made orthogonal across experts.

    See `tsv_merge` for the formula.

    Args:
        ranks: 'equal', or in proportion to each expert's 'density', see `r_tsvm`.

    Returns:
        A reduction of kernels.

    Example:
        >>> import mergejax as mj
        >>> mj.orthogonalized_total(ranks='density')
        orthogonalized_total(ranks='density')
    """

    def merge(*ds):
        several = _RANKS[ranks](ds)
        kept = leading(ds, list(several))
        merged = (polar(kept.left) * kept.values[None, :]) @ polar(kept.right).T
        return jnp.where(several.sum() > 0, merged, sum(ds) / len(ds))

    return lambda ds, leaf, seen: on_matrices(merge, leaf.layout, *ds)


@each
def weigh_outliers(weight: NonNegative = 2.0):
    r"""Multiplies the values of a delta that are far larger than most of its leaf.

    .. math:: \tau_j \leftarrow w\,\tau_j \quad\text{where } |\tau_j| > mean|\tau|+3\,std|\tau|

    Args:
        weight: w, a number or one per expert.

    Returns:
        A stage for one delta.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base, expert = {'w': jnp.zeros(20)}, {'w': jnp.ones(20).at[3].set(9.0)}
        >>> merged = mj.merge(mj.chain(mj.weigh_outliers(2.0), mj.total()), base, [expert])
        >>> merged['w'][2:5].tolist()
        [1.0, 18.0, 1.0]
    """

    def apply(d, leaf, seen):
        size = jnp.abs(d)
        return jnp.where(size > size.mean() + 3 * size.std(), weight * d, d)

    return apply


@method
def tsv_merge(scaling: Scaling = 1.0):
    r"""Adds the experts' leading singular directions, made orthogonal to each other.

    .. math:: \theta=\theta_0+\lambda\,U_\perp\,diag(\sigma)\,V_\perp^\top,\qquad
        U_\perp=polar[U_1,\ldots,U_N],\quad V_\perp=polar[V_1,\ldots,V_N]

    with :math:`(U_i,\sigma_i,V_i)` the leading :math:`\lfloor\min(in,out)/N\rfloor` singular
    triplets of :math:`\tau_i`, for kernels; all other leaves are averaged and scaled alike.

    Args:
        scaling: :math:`\lambda`; the authors take 1 or search in (0, 3].

    Returns:
        A method.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((2, 2))}
        >>> experts = [{'kernel': jnp.diag(jnp.asarray(x))} for x in ([3.0, 1.0], [0.0, 2.0])]
        >>> print(mj.merge(mj.tsv_merge(), base, experts)['kernel'].round(4))
        [[3. 0.]
         [0. 2.]]

    Task singular vectors (Gargiulo et al., 2025, arXiv:2412.00081), TSV-Merge. Experts whose delta
    of a leaf is zero are not counted in N there and bring no directions, nor do singular values of
    zero; in the authors' code they bring arbitrary ones. A kernel with more experts than
    min(in, out) is averaged, where that code leaves it at the base.
    """
    return chain(by_role(kernel=orthogonalized_total(), otherwise=mean()), scale(scaling))


@method
def r_tsvm(scaling: Scaling = 1.0, outlier_weight: NonNegative = 2.0):
    r"""TSV-Merge with weighted outliers and ranks that follow each expert's density.

    .. math:: \hat\tau_{ij} = (w\text{ where }|\tau_{ij}|>mean+3\,std\text{, else }1)\,\tau_{ij},
        \qquad r_i=\Big\lfloor \min(in,out)\,\frac{\rho_i}{\sum_l\rho_l}\Big\rfloor

    with :math:`\rho_i` the share of values of :math:`\tau_i` that are not zero; then as
    `tsv_merge` with :math:`r_i` triplets of :math:`\hat\tau_i`.

    Args:
        scaling: :math:`\lambda`.
        outlier_weight: w, a number or one per expert; 1 leaves outliers as they are.

    Returns:
        A method.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import mergejax as mj
        >>> mj.chain(mj.drop(0.5), mj.r_tsvm(outlier_weight=1.5))
        drop(rate=0.5)|r_tsvm(outlier_weight=1.5)

    A proposal after the description of R-TSVM in Mix data or merge models (Yang et al., 2025,
    arXiv:2502.06876): its formulas are not published with code, and these are ours.
    """
    kernels = chain(weigh_outliers(outlier_weight), orthogonalized_total("density"))
    return chain(by_role(kernel=kernels, otherwise=mean()), scale(scaling))
