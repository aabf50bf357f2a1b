"""The grid that the values of an output channel are rounded to: a scale and a zero."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mergejax.core import Array

Form = Literal["affine", "symmetric"]
Range = Literal["whole", "searched"]
SHRINKS, SMALLEST, NORM = 80, 0.2, 2.4  # of GPTQ's search: factors 1.00, 0.99, ... 0.21


class Grid(NamedTuple):
    """Values scale * (code - zero) for codes 0 to 2^bits - 1, of each output channel.

    Attributes:
        scale: [..., out], positive.
        zero: [..., out], the code of the value 0, a whole number.
    """

    scale: Array
    zero: Array

    def codes(self, values: Array, bits: int) -> Array:
        """The codes of the nearest values, whole numbers in float32."""
        scale, zero = (jnp.broadcast_to(x, values.shape) for x in self)
        return jnp.clip(jnp.round(values / scale) + zero, 0, 2**bits - 1)

    def values(self, codes: Array) -> Array:
        scale, zero = (jnp.broadcast_to(x, codes.shape) for x in self)
        return scale * (codes - zero)

    def rounded(self, values: Array, bits: int) -> Array:
        return self.values(self.codes(values, bits))


def grid_of(rows: Array, bits: int, form: Form = "affine", span: Range = "whole") -> Grid:
    r"""The grid over the values of each column.

    Affine: :math:`s=(\max-\min)/(2^b-1)` with :math:`\min\le0\le\max`,
    :math:`z=round(-\min/s)`. Symmetric: from :math:`-\max|w|` to :math:`\max|w|`,
    :math:`z=2^{b-1}`. A searched span is the one of 80 smaller ones with the least error,
    :math:`\sum|w-\hat w|^{2.4}`.

    Args:
        rows: [inputs, out].
        bits: of a code.
        form: 'affine' or 'symmetric'.
        span: 'whole' or 'searched'.

    Returns:
        A grid with one scale and zero for each column.

    Example:
        >>> grid = grid_of(jnp.array([[0.0], [3.0]]), bits=2)
        >>> grid.scale.tolist(), abs(grid.zero).tolist()
        ([1.0], [0.0])
    """
    low, high = jnp.minimum(rows.min(0), 0), jnp.maximum(rows.max(0), 0)
    if form == "symmetric":
        high = jnp.maximum(-low, high)
        low = -high

    def shrunk(share: Array) -> Grid:
        scale = share * (high - low) / (2**bits - 1)
        scale = jnp.where(scale > 0, scale, 1)
        middle = jnp.full_like(scale, 2 ** (bits - 1))
        return Grid(scale, middle if form == "symmetric" else jnp.round(-share * low / scale))

    if span == "whole":
        return shrunk(jnp.ones((), rows.dtype))
    shares = 1 - jnp.arange(SHRINKS, dtype=rows.dtype) / 100
    grids = jax.vmap(shrunk)(shares)

    def error(grid: Grid) -> Array:
        return (jnp.abs(grid.rounded(rows, bits) - rows) ** NORM).sum(0)

    best = jnp.argmin(jax.lax.map(error, grids), axis=0)
    return Grid(*(jnp.take_along_axis(x, best[None], axis=0)[0] for x in grids))
