"""A small vision transformer whose parameters are easy to merge: every kernel is [in, out]."""

import string
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax import block_by_block

FIELDS = ("patch", "width", "depth", "heads", "expansion", "stem", "class_token")


def cut_patches(images: jax.Array, size: int) -> jax.Array:
    """Cuts images into square patches, row by row.

    Args:
        images: [n, height, width, channels]; height and width are multiples of `size`.
        size: Side of a patch in pixels.

    Returns:
        [n, height/size * width/size, size * size * channels], same dtype.

    Raises:
        ValueError: If a side is no multiple of `size`.

    Example:
        >>> cut_patches(jnp.zeros([5, 8, 8, 3]), 4).shape
        (5, 4, 48)
    """
    n, height, width, channels = images.shape
    if height % size or width % size:
        raise ValueError(
            f"images of {height}x{width} pixels cannot be cut into patches of {size}x{size}: "
            "choose a patch size that divides both sides"
        )
    rows, columns = height // size, width // size
    grid = images.reshape(n, rows, size, columns, size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * columns, size * size * channels)


class Attention(nn.Module):
    """Multi-head self-attention; each of its four projections is one plain [in, out] kernel."""

    heads: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps [n, tokens, width] to [n, tokens, width]."""
        n, length, width = tokens.shape

        def project(name: str) -> jax.Array:
            dense = nn.Dense(width, name=name)
            return dense(tokens).reshape(n, length, self.heads, width // self.heads)

        mixed = nn.dot_product_attention(project("query"), project("key"), project("value"))
        return nn.Dense(width, name="out")(mixed.reshape(n, length, width))


class Block(nn.Module):
    """One pre-norm transformer block: attention, then a two-layer perceptron, both residual."""

    heads: int
    expansion: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps [n, tokens, width] to [n, tokens, width]."""
        width = tokens.shape[-1]
        normed = nn.LayerNorm(name="attention_norm")(tokens)
        tokens = tokens + Attention(self.heads, name="attention")(normed)
        normed = nn.LayerNorm(name="mlp_norm")(tokens)
        hidden = nn.gelu(nn.Dense(self.expansion * width, name="mlp_in")(normed))
        return tokens + nn.Dense(width, name="mlp_out")(hidden)


def embedded(module: "VisionTransformer", images: jax.Array) -> jax.Array:
    """Tokens [n, tokens, width] of images; its parameters are those of the compact `module`."""
    images = 2 * images - 1
    for letter, width in zip(string.ascii_lowercase, module.stem, strict=False):
        n, height, breadth, _ = images.shape  # letters, because numbers stand for blocks
        squares = nn.Dense(width, name=f"stem_{letter}")(cut_patches(images, 2))
        images = nn.gelu(squares).reshape(n, height // 2, breadth // 2, width)
    tokens = nn.Dense(module.width, name="patches")(cut_patches(images, module.patch))
    if module.class_token:
        first = module.param("class_token", nn.initializers.normal(0.02), (1, 1, module.width))
        first = jnp.broadcast_to(first, (len(tokens), 1, module.width))
        tokens = jnp.concatenate([first, tokens], axis=1)
    shape = (1, tokens.shape[1], module.width)
    positions = module.param("positions", nn.initializers.normal(0.02), shape, jnp.float32)
    return tokens + positions


def pooled(tokens: jax.Array, class_token: bool) -> jax.Array:
    """The features [n, width] of tokens [n, tokens, width]: the class token, or the mean."""
    return tokens[:, 0] if class_token else tokens.mean(axis=1)


class VisionTransformer(nn.Module):
    """The body of a classifier: images in [0, 1] to one feature vector each.

    Pre-norm, learned positions, no dropout; the features are the mean over the tokens, or the class
    token. The blocks are named `block_0`,
    `block_1`, ... so that the depth of a parameter can be read from its name. A classifier is this
    body followed by one `nn.Dense` head per task (see `mergejax.train.logits`).

    Args:
        patch: Side of a patch in pixels.
        width: Features per token.
        depth: Number of blocks.
        heads: Attention heads; divides `width`.
        expansion: Hidden width of the perceptrons, as a multiple of `width`.
        stem: Widths of layers that come before the patches, each of them over squares of 2x2, so
            that k of them leave images of a 2^k-th of the side; none by default.
        class_token: Whether a learned token goes before the patches and comes out as the features.

    Example:
        >>> model = VisionTransformer(patch=4, width=16, depth=2, heads=2)
        >>> params = model.init(jax.random.key(0), jnp.zeros([1, 8, 8, 1]))['params']
        >>> sorted(params)
        ['block_0', 'block_1', 'norm', 'patches', 'positions']
        >>> model.apply({'params': params}, jnp.zeros([3, 8, 8, 1])).shape
        (3, 16)

    Source: Dosovitskiy et al. 2021, arXiv:2010.11929; the form follows Beyer et al. 2022,
    arXiv:2205.01580, with learned positions.
    """

    patch: int
    width: int
    depth: int
    heads: int
    expansion: int = 4
    stem: tuple[int, ...] = ()
    class_token: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [n, height, width, channels] to features [n, width]."""
        tokens = embedded(self, images)
        for index in range(self.depth):
            tokens = Block(self.heads, self.expansion, name=f"block_{index}")(tokens)
        return pooled(nn.LayerNorm(name="norm")(tokens), self.class_token)


class Embedding(VisionTransformer):
    """What a `VisionTransformer` of the same settings does before its first block."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [n, height, width, channels] to [n, tokens, width]."""
        return embedded(self, images)


def blocks(model: VisionTransformer, params: Mapping[str, Any]) -> list[block_by_block.Block]:
    """The model's steps for `mj.sequential`: the embedding, each block, the norm with the mean.

    The embedding and the last norm are merged without statistics: averaged by RegMean++.

    Args:
        model: the vision transformer.
        params: its parameters, for the names of its leaves.

    Example:
        >>> model = VisionTransformer(patch=4, width=16, depth=2, heads=2)
        >>> params = model.init(jax.random.key(0), jnp.zeros([1, 8, 8, 1]))['params']
        >>> [block.leaves for block in blocks(model, params)]
        [('patches', 'positions'), ('block_0',), ('block_1',), ('norm',)]
    """
    names = [f"block_{index}" for index in range(model.depth)]
    embedding = Embedding(**{f: getattr(model, f) for f in FIELDS})
    layer = Block(model.heads, model.expansion)

    def last(params: Any, tokens: jax.Array) -> jax.Array:
        normed: Any = nn.LayerNorm().apply({"params": params["norm"]}, tokens)
        return pooled(normed, model.class_token)

    def middle(name: str) -> Callable[[Any, Any], Any]:
        return lambda params, tokens: layer.apply({"params": params[name]}, tokens)

    return [
        block_by_block.Block(
            tuple(sorted(name for name in params if name not in {*names, "norm"})),
            lambda params, images: embedding.apply({"params": params}, images),
            calibrated=False,
        ),
        *(block_by_block.Block((name,), middle(name)) for name in names),
        block_by_block.Block(("norm",), last, calibrated=False),
    ]
