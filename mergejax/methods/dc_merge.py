"""DC-Merge: experts agree on a few entries in a basis that covers all their directions."""

import jax.numpy as jnp

from mergejax.chains import by_role, chain
from mergejax.core import Array, method, reduce
from mergejax.hyper import Density, Scaling
from mergejax.linalg.spectral import on_matrices
from mergejax.linalg.subspaces import equal_ranks, leading, present
from mergejax.linalg.triplets import polar
from mergejax.methods.combine import mean, scale
from mergejax.summaries import bounded_rank, kept_count, kth_key, magnitude_key


def _agreed(cores: list[Array]) -> Array:
    """The mean of the entries whose sign is that of the entries' sum."""
    sign = jnp.sign(sum(cores))
    agree = [(core != 0) & (jnp.sign(core) == sign) for core in cores]
    count = sum(same.astype(sign.dtype) for same in agree)
    chosen = sum(jnp.where(same, core, 0.0) for same, core in zip(agree, cores, strict=True))
    return chosen / jnp.maximum(count, 1)


def _largest(core: Array, density: Array) -> Array:
    """A core with the largest entries only, at least one."""
    keys = magnitude_key(core)
    rank = bounded_rank(kept_count(core.size, density), jnp.int32(core.size))
    return jnp.where(keys >= kth_key(keys, rank), core, 0.0)


@reduce
def core_consensus(density: Density = 0.001):
    r"""Adds up what the experts agree on in a basis that covers their leading directions.

    See `dc_merge` for the formula and the arguments.

    Returns:
        A reduction of kernels.

    Example:
        >>> import mergejax as mj
        >>> mj.core_consensus(density=0.1)
        core_consensus(density=0.1)
    """

    def merge(*ds):
        ranks = equal_ranks(ds)
        width = jnp.maximum(ranks.max(), 1)
        kept = leading(ds, list(ranks))
        left, right = polar(kept.left), polar(kept.right)
        outer, inner = left.T @ kept.left * kept.values[None, :], kept.right.T @ right
        place = jnp.arange(len(kept.values))
        there = place < ranks.sum()
        block = place // width
        order = jnp.cumsum(present(ds), dtype=jnp.int32) - 1
        cores = []
        for number, rank in zip(order, ranks, strict=True):
            own = ((block == number) & (rank > 0)).astype(outer.dtype)
            cores.append(_largest(outer * own[None, :] @ inner, density))
        same = (block[:, None] == block[None, :]) & there[:, None] & there[None, :]
        merged = left @ jnp.where(same, _agreed(cores), 0.0) @ right.T
        return jnp.where(ranks.sum() > 0, merged, sum(ds) / len(ds))

    return lambda ds, leaf, seen: on_matrices(merge, leaf.layout, *ds)


@method
def dc_merge(scaling: Scaling = 1.0, density: Density = 0.001):
    r"""Merges the experts' leading directions by consensus in a basis that covers them all.

    .. math:: \theta=\theta_0+\lambda\,U_\perp\,(M\odot B)\,V_\perp^\top,\qquad
        M=consensus_i\ top_{density}\big(U_\perp^\top\tau_i^{(r)}V_\perp\big)

    for kernels: :math:`\tau_i^{(r)}` is the nearest matrix of rank
    :math:`r=\lfloor\min(in,out)/N\rfloor`, :math:`U_\perp,V_\perp` are the polar factors of all
    experts' leading singular vectors side by side, as in `tsv_merge`; the consensus is the mean of
    the entries that have the sign of their sum, and B is one on N diagonal blocks of width r. All
    other leaves are averaged and scaled alike.

    Args:
        scaling: :math:`\lambda`, searched in (0, 3] by the authors.
        density: the share of each expert's entries in that basis that is kept, in (0, 1], at
            least one entry.

    Returns:
        A method.

    Raises:
        MergeError: a value out of range.

    Example:
        >>> import jax.numpy as jnp, mergejax as mj
        >>> base = {'kernel': jnp.zeros((2, 2))}
        >>> experts = [{'kernel': jnp.diag(jnp.asarray(x))} for x in ([3.0, 1.0], [0.0, 2.0])]
        >>> print(mj.merge(mj.dc_merge(), base, experts)['kernel'].round(4))
        [[3. 0.]
         [0. 2.]]

    DC-Merge (2026, arXiv:2603.06242), the authors' form for full fine-tuning, which does not smooth
    singular values. Experts whose delta of a leaf is zero are not counted in N there; a kernel
    with more experts than min(in, out) is averaged.
    """
    return chain(by_role(kernel=core_consensus(density), otherwise=mean()), scale(scaling))
