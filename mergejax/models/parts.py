"""What the models share: activations, masks, attention, a block, positions by rotation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax.models.rules import choose

tanh_gelu = functools.partial(nn.gelu, approximate=True)
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_fast": tanh_gelu,
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """An activation by the name that configurations of `transformers` use.

    Raises:
        MergeError: an unknown name.

    Example:
        >>> float(activation('relu')(jnp.float32(-1)))
        0.0
    """
    return choose("activation", name, ACTIVATIONS)


def layer_norm(eps: float, name: str | None) -> nn.LayerNorm:
    """Layer normalisation whose variance is taken around the mean, as PyTorch's."""
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, name=name)


def visible(attention_mask: Any, length: int, *, causal: bool, window: int | None = None) -> Any:
    """Which tokens each token may look at.

    Args:
        attention_mask: [n, length], zero for padding; or None.
        length: of the sequences.
        causal: whether only at itself and earlier ones.
        window: how many of those; all by default.

    Returns:
        [n or 1, 1, length or 1, length] booleans.

    Example:
        >>> visible(None, 2, causal=True)[0, 0].tolist()
        [[True, False], [True, True]]
    """
    seen = jnp.ones((1, 1, 1, length), bool)
    if causal:
        back = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
        seen = ((back >= 0) & (back < (window or length)))[None, None]
    if attention_mask is not None:
        seen = seen & (jnp.asarray(attention_mask) > 0)[:, None, None, :]
    return seen


class Attention(nn.Module):
    """Attention of several heads; each of its four projections is one plain [in, out] kernel.

    Attributes:
        heads: of the queries.
        groups: heads of keys and values, each for heads/groups queries; by default as many.
        size: of a head; by default width/heads.
        bias, out_bias: whether the projections to queries, keys and values, and the one behind
            them, have biases.
        scale: of the products; by default 1/sqrt(size).
    """

    heads: int
    groups: int | None = None
    size: int | None = None
    bias: bool = True
    out_bias: bool = True
    scale: float | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: Any = None,
        *,
        context: Any = None,
        offsets: Any = None,
        turn: Callable[[jax.Array], jax.Array] = lambda x: x,
    ) -> jax.Array:
        """Maps [n, queries, width] to the same shape.

        Args:
            x: the tokens that look.
            mask: booleans that broadcast to [n, heads, queries, keys].
            context: the tokens that are looked at; by default `x`.
            offsets: added to the scaled products, [1, heads, queries, keys].
            turn: what positions do to queries and keys, [n, length, heads, size].
        """
        context = x if context is None else context
        size = self.size or x.shape[-1] // self.heads
        groups = self.groups or self.heads

        def project(tokens: jax.Array, heads: int, name: str) -> jax.Array:
            dense = nn.Dense(heads * size, use_bias=self.bias, name=name)
            return dense(tokens).reshape(*tokens.shape[:2], heads, size)

        query = turn(project(x, self.heads, "query"))
        key = turn(project(context, groups, "key"))
        value = project(context, groups, "value")
        mixed = jax.nn.dot_product_attention(
            query, key, value, bias=offsets, mask=mask, scale=self.scale
        )
        out = nn.Dense(x.shape[-1], use_bias=self.out_bias, name="out")
        return out(mixed.reshape(*x.shape[:2], -1))


def perceptron(x: jax.Array, hidden: int, name: str, *, bias: bool = True) -> jax.Array:
    """Two layers with an activation between; parameters `mlp_in` and `mlp_out` of the caller."""
    between = activation(name)(nn.Dense(hidden, use_bias=bias, name="mlp_in")(x))
    return nn.Dense(x.shape[-1], use_bias=bias, name="mlp_out")(between)


def gated_perceptron(x: jax.Array, hidden: int, name: str, *, bias: bool = False) -> jax.Array:
    """Two layers, the first one times an activated gate; `mlp_gate`, `mlp_up`, `mlp_out`."""
    gate = activation(name)(nn.Dense(hidden, use_bias=bias, name="mlp_gate")(x))
    between = gate * nn.Dense(hidden, use_bias=bias, name="mlp_up")(x)
    return nn.Dense(x.shape[-1], use_bias=bias, name="mlp_out")(between)


class Block(nn.Module):
    """A transformer block with layer normalisation before attention and before the perceptron."""

    heads: int
    hidden: int
    activation: str
    eps: float
    bias: bool = True
    scale: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: Any = None) -> jax.Array:
        """Maps [n, tokens, width] to the same shape."""
        attention = Attention(self.heads, bias=self.bias, scale=self.scale, name="attention")
        x = x + attention(layer_norm(self.eps, "attention_norm")(x), mask)
        return x + perceptron(layer_norm(self.eps, "mlp_norm")(x), self.hidden, self.activation)


def rotation(positions: jax.Array, frequencies: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Turns the first half of each head against the second, by angles that grow with the position.

    This is the order of `transformers`; Meta's own files interleave the two halves.

    Args:
        positions: [n or 1, length].
        frequencies: [size/2], radians for each position.

    Returns:
        A function of [n, length, heads, size].
    """
    angles = jnp.asarray(positions, jnp.float32)[..., None] * frequencies[None, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]

    def turn(x: jax.Array) -> jax.Array:
        a, b = jnp.split(x, 2, axis=-1)
        c, s = cos.astype(x.dtype), sin.astype(x.dtype)
        return jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    return turn


def last_token(x: jax.Array, input_ids: jax.Array, padding: int | None) -> jax.Array:
    """Of each sequence [n, length, width] the last token that is no padding, [n, width]."""
    places = jnp.arange(x.shape[1])[None]
    if padding is not None:
        places = jnp.where(input_ids != padding, places, 0)
    return jnp.take_along_axis(
        x, jnp.broadcast_to(places.argmax(1), len(x))[:, None, None], axis=1
    )[:, 0]
