"""The rank units of adapters: one column of `down` with its row of `up`, balanced."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mergejax.core import Array
from mergejax.lowrank.factors import Factors, folded


@jax.jit
def balanced_units(factors: Factors) -> tuple[Array, Array]:
    """The rank units of a product, both sides of one norm: [rank, in] and [rank, out].

    A column of `down` may be c times as large where its row of `up` is c times as small; of all
    such pairs this is the one that depends on their product alone, up to the sign.
    """
    down, up = folded(factors)
    ins, outs = jnp.linalg.norm(down, axis=0), jnp.linalg.norm(up, axis=1)
    there = (ins > 0) & (outs > 0)
    shift = jnp.where(there, jnp.sqrt(outs / jnp.where(there, ins, 1.0)), 0.0)[:, None]
    return down.T * shift, up * jnp.where(shift > 0, 1 / jnp.where(shift > 0, shift, 1.0), 0.0)


def stacked_units(several: Sequence[Factors]) -> tuple[Array, Array]:
    """The units of several adapters, [N, rank, in] and [N, rank, out], padded to one rank."""
    rank = max(factors.rank for factors in several)
    units = [balanced_units(factors) for factors in several]
    pad = lambda x: jnp.pad(x, ((0, rank - len(x)), (0, 0)))
    return jnp.stack([pad(a) for a, _ in units]), jnp.stack([pad(b) for _, b in units])
