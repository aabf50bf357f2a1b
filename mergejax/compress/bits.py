"""Flags and small integers, packed into bytes."""

import numpy as np


def pack_flags(flags: np.ndarray) -> np.ndarray:
    """Eight flags a byte; the shape is not kept.

    Example:
        >>> pack_flags(np.array([True, False, True]))
        array([160], dtype=uint8)
    """
    return np.packbits(np.asarray(flags, bool).ravel())


def unpack_flags(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The flags of an array of the given shape.

    Example:
        >>> unpack_flags(np.array([160], np.uint8), (3,))
        array([ True, False,  True])
    """
    return np.unpackbits(packed, count=int(np.prod(shape))).astype(bool).reshape(shape)


def pack_integers(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers in [0, 2^bits), bits <= 8, side by side; the shape is not kept.

    Example:
        >>> pack_integers(np.array([3, 0, 1]), bits=2)
        array([196], dtype=uint8)
    """
    planes = np.unpackbits(values.astype(np.uint8).reshape(-1, 1), axis=1)[:, 8 - bits :]
    return np.packbits(planes.ravel())


def unpack_integers(packed: np.ndarray, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """The integers of an array of the given shape, uint8.

    Example:
        >>> unpack_integers(np.array([196], np.uint8), (3,), bits=2)
        array([3, 0, 1], dtype=uint8)
    """
    count = int(np.prod(shape))
    planes = np.unpackbits(packed, count=bits * count).reshape(count, bits)
    padded = np.pad(planes, ((0, 0), (8 - bits, 0)))
    return np.packbits(padded, axis=1).reshape(shape)
