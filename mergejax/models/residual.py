"""A small residual network whose parameters are easy to merge: no statistics, only parameters."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, normalised before each, beside a shortcut that follows their shape."""

    width: int
    stride: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [n, height, width, channels] to [n, height/stride, width/stride, self.width]."""
        strides = (self.stride, self.stride)
        normed = nn.relu(nn.GroupNorm(self.groups, name="norm_in")(x))
        if x.shape[-1] != self.width or self.stride > 1:
            x = nn.Conv(self.width, (1, 1), strides, use_bias=False, name="shortcut")(normed)
        y = nn.Conv(self.width, (3, 3), strides, use_bias=False, name="conv_in")(normed)
        y = nn.relu(nn.GroupNorm(self.groups, name="norm_out")(y))
        return x + nn.Conv(self.width, (3, 3), use_bias=False, name="conv_out")(y)


class ResidualNetwork(nn.Module):
    """The body of a classifier: images in [0, 1] to one feature vector each, mean over positions.

    Pre-activation blocks with group normalisation, so that a model is its parameters and nothing
    else. The blocks are named `block_0`, `block_1`, ... in their order; the first one of each stage
    but the first halves the sides.

    Args:
        widths: channels of each stage, multiples of `groups`.
        blocks: number of blocks in each stage.
        groups: of the normalisation.

    Example:
        >>> model = ResidualNetwork(widths=(8, 16), blocks=1, groups=4)
        >>> params = model.init(jax.random.key(0), jnp.zeros([1, 8, 8, 3]))['params']
        >>> sorted(params), model.apply({'params': params}, jnp.zeros([3, 8, 8, 3])).shape
        (['block_0', 'block_1', 'norm', 'stem'], (3, 16))

    Source: He et al. 2016, arXiv:1603.05027; group normalisation as in Kolesnikov et al. 2020,
    arXiv:1912.11370, without their weight standardisation.
    """

    widths: Sequence[int]
    blocks: int = 2
    groups: int = 8

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [n, height, width, channels] to features [n, last width]."""
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False, name="stem")(2 * images - 1)
        for index in range(len(self.widths) * self.blocks):
            stage, place = divmod(index, self.blocks)
            stride = 2 if stage and not place else 1
            block = ResidualBlock(self.widths[stage], stride, self.groups, name=f"block_{index}")
            x = block(x)
        x = nn.relu(nn.GroupNorm(self.groups, name="norm")(x))
        return jnp.mean(x, axis=(1, 2))
