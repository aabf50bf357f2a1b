"""Where the entries of an aligned leaf come from: the statistic 'permutation' of one leaf."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.tree_util.register_dataclass, data_fields=["indices"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True)
class Units:
    """A reordering of a leaf along some of its axes.

    Attributes:
        indices: by axis, in the order in which they are taken, int32 arrays that broadcast against
            the aligned leaf: the source of every position, -1 where the model has nothing.
        shape: of the aligned leaf.
    """

    indices: dict[int, Any]
    shape: tuple[int, ...]

    dtype = np.dtype("int32")


def take(x: Any, indices: Any) -> Any:
    """A leaf in aligned order, NumPy or JAX; zero where the model has nothing."""
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    for axis, index in _in_order(indices):
        index = xp.asarray(index, xp.int32)
        safe = xp.maximum(index, 0)
        if all(n == 1 for i, n in enumerate(index.shape) if i != axis):
            taken = xp.take(x, safe.ravel(), axis=axis)
        else:
            shape = [index.shape[i] if i == axis else n for i, n in enumerate(x.shape)]
            taken = xp.take_along_axis(x, xp.broadcast_to(safe, shape), axis=axis)
        x = xp.where(index < 0, xp.zeros_like(taken), taken)
    return x


def _in_order(indices: Any) -> list[tuple[int, Any]]:
    """Axes whose index depends on others come behind those."""
    return sorted(indices.items(), key=lambda item: sum(n > 1 for n in item[1].shape))


def present(units: Units, axes: Sequence[int]) -> Any:
    """1 where a model has an entry along the given axes, broadcasting against the aligned leaf."""
    found: Any = jnp.ones((1,) * len(units.shape), jnp.float32)
    for axis, index in units.indices.items():
        if axis in axes:
            found = found * (jnp.asarray(index) >= 0).astype(jnp.float32)
    return found
