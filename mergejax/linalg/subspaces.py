"""Which singular directions of several experts enter a merge, side by side in one matrix."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mergejax.core import Array
from mergejax.linalg.spectral import Triplets
from mergejax.linalg.triplets import principal


def gather(several: Sequence[Triplets], kept: Sequence[Array], width: int) -> Triplets:
    """The kept triplets of several matrices side by side.

    Args:
        several: triplets of matrices of one shape.
        kept: bool [k] for each; at most `width` are true altogether.
        width: number of columns, static; the last ones are zero where fewer are kept.

    Returns:
        Triplets with `width` columns, in the order of `several`.
    """
    flags = jnp.concatenate(list(kept))
    place = jnp.argsort(~flags, stable=True)[:width]
    there = flags[place].astype(several[0].values.dtype)
    left, values, right = (
        jnp.concatenate(arrays, axis=-1)[..., place] for arrays in zip(*several, strict=True)
    )
    return Triplets(left * there[None, :], values * there, right * there[None, :])


def principals(ds: Sequence[Array], ranks: Sequence[Array]) -> list[Triplets]:
    """The leading singular triplets of each matrix.

    Args:
        ds: matrices of one shape [out, in].
        ranks: int32 for each.

    Returns:
        Triplets with k = min(out, in) columns, zero behind the rank.
    """
    size = min(ds[0].shape)

    def within(width: int) -> list[Triplets]:
        several = [principal(d, rank, width) for d, rank in zip(ds, ranks, strict=True)]
        spare = size - width
        return [
            Triplets(*(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spare)]) for x in triplets))
            for triplets in several
        ]

    share = max(size // len(ds), 1)  # what most methods give each expert: so many columns are cheap
    fits = jnp.max(jnp.stack(list(ranks))) <= share
    return jax.lax.cond(fits, lambda: within(share), lambda: within(size))


def leading(ds: Sequence[Array], ranks: Sequence[Array]) -> Triplets:
    """The leading singular triplets of each matrix side by side.

    Args:
        ds: matrices of one shape [out, in].
        ranks: int32 for each; their sum is at most k = min(out, in).

    Returns:
        Triplets with k columns, zero where there is no singular value.
    """
    size = min(ds[0].shape)
    return gather(principals(ds, ranks), [jnp.arange(size) < rank for rank in ranks], size)


def present(ds: Sequence[Array]) -> Array:
    """Which matrices have any value but zero, bool [N]."""
    return jnp.stack([jnp.any(d != 0) for d in ds])


def equal_ranks(ds: Sequence[Array]) -> Array:
    """min(shape) divided among the matrices that are not zero, int32 [N]; 0 for the others."""
    there = present(ds).astype(jnp.int32)
    return there * (min(ds[0].shape) // jnp.maximum(there.sum(dtype=jnp.int32), 1))


def ranks_by_density(ds: Sequence[Array]) -> Array:
    """min(shape) divided in proportion to the shares of values that are not zero, int32 [N]."""
    dense = jnp.stack([jnp.mean((d != 0).astype(jnp.float32)) for d in ds])
    whole = dense.sum()
    share = dense / jnp.where(whole > 0, whole, 1.0)
    # A little more, so that rounding takes no direction from equally dense matrices.
    return jnp.floor(min(ds[0].shape) * share + 1e-4).astype(jnp.int32)
