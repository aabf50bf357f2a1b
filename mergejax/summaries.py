"""Whole-model numbers from quantities that add up over leaves, and exact ranks without a sort.

The order of magnitudes is the order of their bits as unsigned integers. So the k-th largest
magnitude of a whole model takes two rounds of counting: the upper 16 bits, then the lower 15 of
those that share the upper ones. Nothing is sorted and nothing concatenated.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import Array, Round
from mergejax.hyper import is_traced

UPPER, LOWER = 2**16, 2**15
_SMALL = 2**16


def magnitude_bits(x: Array) -> Array:
    """The bits of |x|, uint32 below 2^31; their order is the order of the magnitudes.

    Example:
        >>> bool(magnitude_bits(jnp.float32(-2.0)) > magnitude_bits(jnp.float32(1.5)))
        True
    """
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)


def magnitude_of(bits: Array) -> Array:
    """The float32 whose magnitude has the given bits."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32)


# A scatter under vmap falls off XLA's fast path on the CPU (14 times slower), a loop does not;
# nor does one that adds anything but a constant, so what is not to be counted has a bin of its own.
@jax.custom_batching.sequential_vmap
def _count(bins: Array) -> Array:
    zeros = jnp.zeros(UPPER + 1, jnp.int32)
    return zeros.at[bins.ravel()].add(1, mode="promise_in_bounds")[:UPPER]


def _upper(x: Array) -> Array:
    return _count((magnitude_bits(x) >> 15).astype(jnp.int32))


def _lower(x: Array, bucket: Array) -> Array:
    bits = magnitude_bits(x)
    inside = (bits >> 15) == bucket
    return _count(jnp.where(inside, (bits & (LOWER - 1)).astype(jnp.int32), UPPER))


def _locate(counts: Any, rank: Any) -> tuple[Any, Any]:
    """The bin that holds the element of a rank (1 = largest), and its rank within the bin."""
    from_top = counts[::-1].cumsum()
    place = (from_top >= rank).argmax()
    before = from_top[place] - counts[::-1][place]
    return counts.shape[0] - 1 - place, rank - before


def kth_magnitude_rounds(rank_of: Any) -> tuple[Round, Round]:
    """Measures the k-th largest magnitude of a whole model, exactly.

    Args:
        rank_of: (size) -> rank, 1 for the largest.

    Returns:
        Two rounds; what the second one solves to are the magnitude's bits, uint32.
    """

    def bucket(totals: Any, size: Any) -> tuple[Any, Any]:
        return _locate(totals[0], rank_of(size))

    def solve_upper(totals: Any, size: Any, memory: Any) -> Any:
        return bucket(totals, size)[0].astype(np.uint32)

    def solve_lower(totals: Any, size: Any, memory: Any) -> Any:
        high, rank = bucket(totals, size)
        low, _ = _locate(totals[1], rank)
        return (high * LOWER + low).astype(np.uint32)

    return (
        Round(lambda d, leaf, seen: _upper(d), solve_upper),
        Round(lambda d, leaf, seen: _lower(d, seen[0]), solve_lower),
    )


def kth_magnitude(x: Array, rank: Array) -> Array:
    """The bits of the k-th largest magnitude of one array, exactly.

    Args:
        x: [...], any shape, taken as float32.
        rank: integer in [1, x.size], 1 for the largest.

    Returns:
        uint32, the magnitude's bits; `magnitude_of` makes a float32 of them.

    Example:
        >>> float(magnitude_of(kth_magnitude(jnp.asarray([3.0, -5.0, 1.0]), 2)))
        3.0
    """
    rank = jnp.asarray(rank, jnp.int32)
    if x.size <= _SMALL:
        return _bisect(x, rank)
    high, inner = _locate(_upper(x), rank)
    low, _ = _locate(_lower(x, high.astype(jnp.uint32)), inner)
    return (high * LOWER + low).astype(jnp.uint32)


def _bisect(x: Array, rank: Array) -> Array:
    # For small arrays, where two histograms would cost more than 31 readings.
    bits = magnitude_bits(x)

    def step(i: Array, found: Array) -> Array:
        candidate = found | (jnp.uint32(1) << (30 - i).astype(jnp.uint32))
        return jnp.where((bits >= candidate).sum(dtype=jnp.int32) >= rank, candidate, found)

    return jax.lax.fori_loop(0, 31, step, jnp.uint32(0))


def kept_count(size: Any, density: Any) -> Any:
    """floor(density * size), in double precision where the density is known.

    A traced density is a float32: the product is then rounded in float32.

    Example:
        >>> kept_count(1000, 0.2)
        200
    """
    if is_traced(density) or is_traced(size):
        return jnp.floor(jnp.float32(density) * jnp.asarray(size, jnp.float32)).astype(jnp.int32)
    return math.floor(float(size) * float(density))


def squares(x: Array) -> Array:
    """The sum of squares, float32."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def bounded_rank(rank: Any, size: Any) -> Any:
    """A rank kept within [1, size]."""
    if is_traced((rank, size)):
        return jnp.clip(rank, 1, size)
    return min(max(rank, 1), size)


def ratio(above: Any, below: Any) -> Any:
    """above / below, and 0 where below is 0; of NumPy or JAX numbers alike."""
    namespace = jnp if isinstance(below, jax.Array) else np
    positive = below != 0
    return namespace.where(positive, above / namespace.where(positive, below, 1.0), 0.0)
