"""Whole-model numbers from quantities that add up over leaves, and exact ranks without a sort.

The order of magnitudes is the order of their bits as unsigned integers. So the k-th largest
magnitude of a whole model takes two rounds of counting: the upper half of the bits, then the lower
half of those that share the upper one. Nothing is sorted and nothing concatenated.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import Array, Round
from mergejax.hyper import is_traced

BINS = 2**16  # of a histogram; two of them, of the upper and the lower half of a key, give any rank
_SMALL = 2**16
_ROW = 2**8  # bins
_ROWS = 16  # that stay in the cache together


def magnitude_key(x: Array) -> Array:
    """A uint32 for each element whose order is the order of the magnitudes.

    Example:
        >>> bool(magnitude_key(jnp.float32(-2.0)) > magnitude_key(jnp.float32(1.5)))
        True
    """
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32) << 1


def magnitude_of(key: Array) -> Array:
    """The float32 whose magnitude has the given key."""
    return jax.lax.bitcast_convert_type(key.astype(jnp.uint32) >> 1, jnp.float32)


def value_key(x: Array) -> Array:
    """A uint32 for each element whose order is the order of the values.

    Example:
        >>> bool(value_key(jnp.float32(-2.0)) < value_key(jnp.float32(1.5)))
        True
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits = jnp.where(bits << 1 == 0, jnp.uint32(0), bits)  # both zeros are one value
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))


def value_of(key: Array) -> Array:
    """The float32 that has the given key.

    Example:
        >>> float(value_of(value_key(jnp.float32(-2.5))))
        -2.5
    """
    bits = jnp.where(key >> 31 == 1, key ^ jnp.uint32(2**31), ~key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


# A scatter under vmap falls off XLA's fast path on the CPU (14 times slower), a loop does not;
# nor does one that adds anything but a constant, so what is not to be counted has a bin of its own.
@jax.custom_batching.sequential_vmap
def _count(bins: Array) -> Array:
    zeros = jnp.zeros(BINS + 1, jnp.int32)
    return zeros.at[bins.ravel()].add(1, mode="promise_in_bounds")[:BINS]


def _upper(keys: Array) -> Array:
    return _count((keys >> 16).astype(jnp.int32))


def _lower(keys: Array, bucket: Array) -> Array:
    low = (keys & jnp.uint32(BINS - 1)).astype(jnp.int32)
    return _count(jnp.where((keys >> 16) == bucket, low, BINS))


def _locate(counts: Any, rank: Any) -> tuple[Any, Any]:
    """The bin that holds the element of a rank (1 = largest), and its rank within the bin.

    First among rows of bins, then within one: XLA's running sum of all bins takes five times as
    long on the CPU.
    """
    rows = counts.reshape(_ROW, -1)[::-1, ::-1]
    row, rank = _first_to_reach(rows.sum(1, dtype=counts.dtype), rank)
    place, rank = _first_to_reach(rows[row], rank)
    return counts.shape[0] - 1 - (row * rows.shape[1] + place), rank


def _first_to_reach(counts: Any, rank: Any) -> tuple[Any, Any]:
    """The first place at which the running sum reaches a rank, and what of the rank is left."""
    running = counts.cumsum()
    place = (running >= rank).argmax()
    return place, rank - (running[place] - counts[place])


def rank_rounds(keys_of: Any, ranks_of: Any, first: int = 0) -> tuple[Round, Round]:
    """Finds elements of a whole model by their ranks, exactly.

    Args:
        keys_of: (x, leaf, seen) -> a list of uint32 arrays, one for each population that is
            ranked; x is what the stage's `apply` gets first.
        ranks_of: (size) -> a list of ranks, 1 for the largest, the same for every population.
        first: index of the first of these rounds among the stage's.

    Returns:
        Two rounds; the second one solves to the keys, uint32, for each population a list.
    """

    def buckets(totals: Any, size: Any) -> list[list[tuple[Any, Any]]]:
        ranks = ranks_of(size)
        return [[_locate(counts, rank) for rank in ranks] for counts in totals[first]]

    def solve_upper(totals: Any, size: Any, memory: Any) -> Any:
        return [[high.astype(np.uint32) for high, _ in each] for each in buckets(totals, size)]

    def solve_lower(totals: Any, size: Any, memory: Any) -> Any:
        pairs = zip(buckets(totals, size), totals[first + 1], strict=True)
        return [
            [
                (high * BINS + _locate(counts, rank)[0]).astype(np.uint32)
                for (high, rank), counts in zip(each, several, strict=True)
            ]
            for each, several in pairs
        ]

    def measure_lower(x: Any, leaf: Any, seen: Any) -> Any:
        populations = zip(keys_of(x, leaf, seen), seen[first], strict=True)
        return [[_lower(keys, high) for high in several] for keys, several in populations]

    return (
        Round(lambda x, leaf, seen: [_upper(k) for k in keys_of(x, leaf, seen)], solve_upper),
        Round(measure_lower, solve_lower),
    )


def kth_key(keys: Array, rank: Array) -> Array:
    """The k-th largest of an array of keys, exactly.

    Args:
        keys: uint32 [...], any shape.
        rank: integer in [1, keys.size], 1 for the largest.

    Returns:
        uint32.

    Example:
        >>> float(magnitude_of(kth_key(magnitude_key(jnp.asarray([3.0, -5.0, 1.0])), 2)))
        3.0
    """
    rank = jnp.asarray(rank, jnp.int32)
    if keys.size <= _SMALL:
        return kth_key_by_row(keys.reshape(1, -1), rank)[0]
    high, inner = _locate(_upper(keys), rank)
    low, _ = _locate(_lower(keys, high.astype(jnp.uint32)), inner)
    return (high * BINS + low).astype(jnp.uint32)


def kth_key_by_row(keys: Array, rank: Array) -> Array:
    """The k-th largest key of every row, exactly, by reading the rows 32 times.

    Args:
        keys: uint32 [rows, n].
        rank: integer in [1, n], 1 for the largest; one for all rows or [rows].

    Returns:
        uint32 [rows].
    """

    def together(keys: Array, ranks: Array) -> Array:
        def step(i: Array, found: Array) -> Array:
            candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
            enough = (keys >= candidate[:, None]).sum(-1, dtype=jnp.int32) >= ranks
            return jnp.where(enough, candidate, found)

        return jax.lax.fori_loop(0, 32, step, jnp.zeros(keys.shape[0], jnp.uint32))

    def in_cache(keys: Array, ranks: Array) -> Array:
        own = lambda row: together(row[0][None], row[1][None])[0]
        return jax.lax.map(own, (keys, ranks), batch_size=_ROWS)

    ranks = jnp.broadcast_to(jnp.asarray(rank, jnp.int32), keys.shape[:1])
    # Rows that stay in a processor's cache are read in half the time.
    return jax.lax.platform_dependent(keys, ranks, cpu=in_cache, default=together)


def first_largest(keys: Array, rank: Array) -> Array:
    """Marks exactly the k largest of every row, of equal ones the first.

    Args:
        keys: uint32 [rows, n].
        rank: integer, k; at most n are marked, none for 0.

    Returns:
        bool [rows, n].

    Example:
        >>> first_largest(jnp.asarray([[1, 3, 3, 3]], jnp.uint32), 2).tolist()
        [[False, True, True, False]]
    """
    rank, count = jnp.asarray(rank, jnp.int32), keys.shape[1]

    def find(keys: Array, ranks: Array) -> Array:
        if keys.shape[0] == 1:  # where histograms may be quicker
            return kth_key(keys, ranks[0])[None]
        return kth_key_by_row(keys, ranks)

    bounded = jnp.broadcast_to(jnp.clip(rank, 1, count), keys.shape[:1])
    threshold = find(keys, bounded)[:, None]
    above, equal = keys > threshold, keys == threshold
    missing = bounded - above.sum(-1, dtype=jnp.int32)
    # Places count backwards: of equal keys those are kept whose place is large enough.
    place = jnp.uint32(count) - jax.lax.broadcasted_iota(jnp.uint32, keys.shape, 1)
    bound = jax.lax.cond(
        (equal.sum(-1, dtype=jnp.int32) == missing).all(),
        lambda: jnp.zeros(keys.shape[0], jnp.uint32),
        lambda: find(jnp.where(equal, place, jnp.uint32(0)), missing),
    )
    return (above | (equal & (place >= bound[:, None]))) & (rank > 0)


def ranks_by_row(keys: Array) -> Array:
    """The place of every key in the ascending order of its row, of equal ones the first first.

    XLA sorts one array of words on the CPU ten times as fast as it sorts words with their places.
    So the halves of the keys are sorted with their places in the lower half of the word, first by
    the lower half of the keys, then by the upper one; a third such sort inverts the permutation.

    Args:
        keys: uint32 [rows, n].

    Returns:
        uint32 [rows, n], 0 for the smallest.

    Example:
        >>> ranks_by_row(jnp.asarray([[5, 1, 5, 0]], jnp.uint32)).tolist()
        [[2, 1, 3, 0]]
    """
    if keys.shape[-1] > BINS:  # a place does not fit into half a word
        order = jnp.argsort(keys, axis=-1, stable=True)
        return jnp.argsort(order, axis=-1).astype(jnp.uint32)
    place, lower = jax.lax.broadcasted_iota(jnp.uint32, keys.shape, 1), jnp.uint32(BINS - 1)
    sort = lambda half: jnp.sort(half << 16 | place, axis=-1) & lower
    by_lower = sort(keys)
    by_upper = sort(jnp.take_along_axis(keys >> 16, by_lower, axis=-1))
    return sort(jnp.take_along_axis(by_lower, by_upper, axis=-1))


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
