"""Randomness that depends on names, never on order: a counter-based hash for element masks."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import Leaf


def name_key(*names: str) -> np.ndarray:
    """A 64-bit number for a tuple of names, as uint32[2].

    Example:
        >>> name_key('expert', 'block_0/kernel').dtype
        dtype('uint32')
    """
    digest = hashlib.blake2b("\0".join(names).encode(), digest_size=8).digest()
    return np.frombuffer(digest, np.uint32).copy()


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 with good avalanche: multiply and xorshift, twice."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


@jax.jit  # traced once, not for every stage, expert and leaf
def fold_key(key: jax.Array, *words: jax.Array) -> jax.Array:
    """A new key from a key [..., 2] and any number of uint32 words."""
    low, high = key[..., 0], key[..., 1]
    for word in words:
        word = jnp.asarray(word).astype(jnp.uint32)
        low = _mix(low ^ word)
        high = _mix(high + low + jnp.uint32(0x9E3779B9))
    return jnp.stack([low, high], axis=-1)


def uniform(leaf: Leaf, shape: tuple[int, ...]) -> jax.Array:
    """One number in [0, 1) for each element, a function of the key and the element's index.

    With i the element's index in the whole leaf (two 32-bit halves) and (a, b) the key,
    u = floor(mix(mix(i_low ^ a) + b + 0x9E3779B9 * i_high) / 2^8) / 2^24.

    Args:
        leaf: gives the key, and the index of the first element.
        shape: of the block.

    Returns:
        float32 [*shape], multiples of 2^-24.
    """
    size = int(np.prod(shape, dtype=np.int64))
    if size >= 2**32:
        raise ValueError("a block of random numbers must have fewer than 2^32 elements")
    index = jax.lax.iota(jnp.uint32, size) + leaf.start[0]
    high = leaf.start[1] + (index < leaf.start[0]).astype(jnp.uint32)
    bits = _mix(_mix(index ^ leaf.key[0]) + leaf.key[1] + high * jnp.uint32(0x9E3779B9))
    return ((bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)).reshape(shape)


def keep_mask(leaf: Leaf, shape: tuple[int, ...], probability: jax.Array) -> jax.Array:
    """Keeps each element with the given probability, independently of all others.

    Args:
        leaf: gives the key and the index of the first element.
        shape: of the block.
        probability: of keeping, a number or an array that broadcasts to `shape`; 0 keeps
            nothing, 1 everything.

    Returns:
        bool [*shape].
    """
    return uniform(leaf, shape) < probability
