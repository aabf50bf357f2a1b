"""A vision transformer whose heads, hidden units and stream may be merged at any width."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax.models.vit import cut_patches

Tree = Any


class Transformer(nn.Module):
    """Pre-norm vision transformer, its features the mean over tokens, every width free.

    Attributes:
        patch: side of a patch in pixels.
        width: of the residual stream.
        size: of a head.
        heads: in each block.
        hidden: units of the perceptron in each block.
        classes: number of logits.
        apart: units of the stream that each of two experts has for itself: the last ones, those of
            the second behind those of the first. Every norm takes mean and variance of each
            expert's units, and the mean of both results where these are shared.

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929; mean over tokens as Beyer et al. 2022,
    arXiv:2205.01580.
    """

    patch: int
    width: int
    size: int
    heads: Sequence[int]
    hidden: Sequence[int]
    classes: int
    apart: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [n, height, width, channels] to logits [n, classes]."""

        def dense(x: jax.Array, width: int, name: str) -> jax.Array:
            return nn.Dense(width, name=name)(x)

        def norm(x: jax.Array, name: str) -> jax.Array:
            return Norm(self.apart, name=name)(x)

        x = dense(cut_patches(2 * x - 1, self.patch), self.width, "patches")
        shape = (1, x.shape[1], self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), shape, jnp.float32)
        for i, (heads, hidden) in enumerate(zip(self.heads, self.hidden, strict=True)):
            y = norm(x, f"block_{i}_attention_norm")
            q, k, v = (
                dense(y, heads * self.size, f"block_{i}_{n}").reshape(*y.shape[:2], heads, -1)
                for n in ("query", "key", "value")
            )
            y = nn.dot_product_attention(q, k, v).reshape(*y.shape[:2], -1)
            x = x + dense(y, self.width, f"block_{i}_out")
            y = norm(x, f"block_{i}_mlp_norm")
            y = nn.gelu(dense(y, hidden, f"block_{i}_mlp_in"))
            x = x + dense(y, self.width, f"block_{i}_mlp_out")
        return dense(norm(x, "norm").mean(1), self.classes, "head")


class Norm(nn.Module):
    """LayerNorm of a stream of which two experts have `apart` units each for themselves."""

    apart: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., width] to [..., width]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        blocks = [x.shape[-1] - 2 * self.apart, self.apart, self.apart]
        own = np.repeat(np.array([[1, 1, 0], [1, 0, 1]], np.float32), blocks, axis=1)
        own = own.reshape(*[1] * (x.ndim - 1), *own.shape)  # [..., experts, width]
        count = own.sum(-1, keepdims=True)
        each = x[..., None, :]
        mean = (each * own).sum(-1, keepdims=True) / count
        centred = (each - mean) * own
        variance = (centred**2).sum(-1, keepdims=True) / count
        normed = (centred * jax.lax.rsqrt(variance + 1e-6)).sum(-2) / own.sum(-2)
        scale, bias = (y.reshape(*own.shape[:-2], -1) for y in (scale, bias))
        return normed * scale + bias


def rebuilt(model: Transformer, variables: Tree) -> Transformer:
    """The module of a merged network, whose widths are those of its leaves.

    Example:
        >>> narrow = Transformer(4, 8, 2, (2,), (6,), 3)
        >>> wide = Transformer(4, 10, 2, (3,), (9,), 3, apart=2)
        >>> variables = wide.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
        >>> rebuilt(narrow, variables) == wide
        True
    """

    def widths(layer: str) -> tuple[int, ...]:
        names = [f"block_{i}_{layer}" for i in range(len(model.heads))]
        return tuple(int(variables["params"][n]["kernel"].shape[-1]) for n in names)

    width = int(variables["params"]["norm"]["scale"].shape[-1])
    heads = tuple(n // model.size for n in widths("query"))
    return model.clone(
        width=width,
        heads=heads,
        hidden=widths("mlp_in"),
        apart=model.apart + max(width - model.width, 0),
    )


def branch_weights(model: Transformer, variables: Tree, images: np.ndarray) -> list[float]:
    """What the branch has of the mean absolute value in every sum of the stream and a branch.

    Source: Imfeld et al. 2024, arXiv:2310.05719, the weighted residual policy.
    """
    kept = model.apply(variables, images, capture_intermediates=True)[1]["intermediates"]
    stream = kept["patches"]["__call__"][0] + variables["params"]["positions"]
    found = []
    for i in range(len(model.heads)):
        for layer in ("out", "mlp_out"):
            branch = kept[f"block_{i}_{layer}"]["__call__"][0]
            sizes = [float(jnp.abs(x).mean()) for x in (stream, branch)]
            found.append(sizes[1] / sum(sizes))
            stream = stream + branch
    return found
