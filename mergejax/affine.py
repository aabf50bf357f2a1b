"""A layer's kernel with its bias, or a norm's scale with its shift, as one leaf of rows.

Some statistics describe a whole layer, y = [x | 1] W with the bias as the last row of W. Leaves
that have such a statistic are merged together with their bias and taken apart again.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mergejax.leaves import LeafInfo, as_matrix

STATISTICS = ("affine_gram", "drift", "norm_moments")  # those of a whole layer


@dataclasses.dataclass(frozen=True)
class Layer:
    """A leaf and the bias that belongs to it.

    Attributes:
        weight: what is known about the kernel or the scale.
        bias: what is known about the bias or the shift.
    """

    weight: LeafInfo
    bias: LeafInfo

    @property
    def info(self) -> LeafInfo:
        """The leaf of rows that stands for both, under the name of the first."""
        layers = () if self.weight.layers is None else (self.weight.layers,)
        width = self.bias.size // math.prod(layers)
        rows = (self.weight.size + self.bias.size) // math.prod(layers) // width
        return dataclasses.replace(
            self.weight,
            shape=(*layers, rows, width),
            dtype=jnp.promote_types(self.weight.dtype, self.bias.dtype),
            layout="io" if self.weight.layout else "",
        )

    @property
    def names(self) -> tuple[str, str]:
        return self.weight.name, self.bias.name

    def join(self, weight: Any, bias: Any) -> jax.Array:
        """[..., rows + 1, out] of the two arrays."""

        def rows(weight: jax.Array, bias: jax.Array) -> jax.Array:
            return jnp.concatenate([self._matrix(weight)[0], bias.reshape(1, -1)])

        return (rows if self.weight.layers is None else jax.vmap(rows))(weight, bias)

    def split(
        self, several: Sequence[jax.Array], like: Mapping[str, Any], dtype: Any
    ) -> dict[str, list[jax.Array]]:
        """The two leaves again, by name, of their types and on the devices of those of `like`."""

        def parts(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            shape = self.weight.shape if self.weight.layers is None else self.weight.shape[1:]
            restore = self._matrix(jnp.zeros(shape, rows.dtype))[1]
            return restore(rows[:-1]), rows[-1]

        apart = parts if self.weight.layers is None else jax.vmap(parts)
        found: dict[str, list[jax.Array]] = {name: [] for name in self.names}
        for rows in several:
            for x, info in zip(apart(rows), (self.weight, self.bias), strict=True):
                x = x.reshape(info.shape).astype(dtype or info.dtype)
                found[info.name].append(_placed(x, like[info.name]))
        return found

    def _matrix(self, weight: jax.Array) -> Any:
        if self.weight.layout:
            return as_matrix(jnp.asarray(weight), self.weight.layout)
        return weight.reshape(1, -1), lambda row: row.reshape(weight.shape)


def _placed(x: jax.Array, like: Any) -> jax.Array:
    if any(isinstance(one, jax.core.Tracer) for one in (x, like)) or not hasattr(like, "sharding"):
        return x
    return jax.device_put(x, like.sharding)


def layers(infos: Sequence[LeafInfo]) -> dict[str, Layer]:
    """The leaves that are merged together with their bias, by the leaf's name.

    Example:
        >>> from mergejax.leaves import describe
        >>> specs = {'a/kernel': ((3, 2), 'float32'), 'a/bias': ((2,), 'float32')}
        >>> kernel, bias = describe(specs)
        >>> kernel = dataclasses.replace(kernel, stats=('affine_gram',))
        >>> layers([kernel, bias])['a/kernel'].info.shape
        (4, 2)
    """
    by_name = {info.name: info for info in infos}
    found = {}
    for info in infos:
        bias = by_name.get(re.sub(r"(kernel|scale|weight)$", "bias", info.name))
        if set(info.stats) & set(STATISTICS) and bias not in (None, info) and _fits(info, bias):
            found[info.name] = Layer(info, bias)
    return found


def _fits(weight: LeafInfo, bias: LeafInfo) -> bool:
    axes = weight.shape if weight.layers is None else weight.shape[1:]
    if weight.layout:
        axes = tuple(n for n, axis in zip(axes, weight.layout, strict=True) if axis == "o")
    size = math.prod(axes) * (weight.layers or 1)
    return (weight.layers, size) == (bias.layers, bias.size)


def rows_of(found: Mapping[str, Layer], infos: Sequence[LeafInfo]) -> list[LeafInfo]:
    """The leaves to merge: those that are joined in place of their two."""
    biases = {layer.bias.name for layer in found.values()}
    kept = [info for info in infos if info.name not in biases]
    return [found[info.name].info if info.name in found else info for info in kept]
