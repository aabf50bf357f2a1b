"""T5: an encoder and a decoder with learned offsets for relative positions, plain or gated."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax.models.parts import Attention, gated_perceptron, perceptron, visible
from mergejax.models.rules import Architecture, Config, words


def buckets(queries: int, keys: int, count: int, farthest: int, both: bool) -> jax.Array:
    r"""Numbers of the distance from each query to each key: exact when near, logarithmic beyond.

    .. math:: b = e + \lfloor \ln(d/e) / \ln(D/e) \cdot (n - e) \rfloor,\quad e = n/2

    Args:
        queries, keys: lengths.
        count: n, halved when both directions are told apart.
        farthest: D, from which on all distances are one.
        both: whether keys behind the query have buckets of their own; they are bucket 0 otherwise.

    Returns:
        [queries, keys] int32 below `count`.

    Example:
        >>> buckets(1, 3, 4, 8, True).tolist()
        [[0, 3, 3]]

    Source: Raffel et al. 2020, arXiv:1910.10683.
    """
    ahead = jnp.arange(keys)[None, :] - jnp.arange(queries)[:, None]
    start = jnp.zeros_like(ahead)
    if both:
        count //= 2
        start = jnp.where(ahead > 0, count, 0)
    distance = jnp.abs(ahead) if both else jnp.maximum(-ahead, 0)
    exact = count // 2
    share = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    far = exact + (share / math.log(farthest / exact) * (count - exact)).astype(jnp.int32)
    return start + jnp.where(distance < exact, distance, jnp.minimum(far, count - 1))


class StackBlock(nn.Module):
    """Attention to itself, to the encoder in a decoder, and a perceptron, each behind a norm."""

    config: Config
    decoder: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: Any, offsets: jax.Array, context: Any, context_mask: Any
    ) -> jax.Array:
        """Maps [n, tokens, width] to the same shape."""
        c = self.config
        norm = functools.partial(nn.RMSNorm, epsilon=c.layer_norm_epsilon)
        attention = functools.partial(
            Attention, c.num_heads, size=c.d_kv, bias=False, out_bias=False, scale=1.0
        )
        normed = norm(name="attention_norm")(x)
        x = x + attention(name="attention")(normed, mask, offsets=offsets)
        if self.decoder:
            normed = norm(name="cross_norm")(x)
            x = x + attention(name="cross")(normed, context_mask, context=context)
        normed = norm(name="mlp_norm")(x)
        kind, _, name = c.feed_forward_proj.rpartition("-")
        if kind == "gated":
            return x + gated_perceptron(normed, c.d_ff, "gelu_new" if name == "gelu" else name)
        return x + perceptron(normed, c.d_ff, name, bias=False)


class Stack(nn.Module):
    """The encoder or the decoder: embedded tokens to hidden states."""

    config: Config
    decoder: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        attention_mask: Any = None,
        context: Any = None,
        context_mask: Any = None,
    ) -> jax.Array:
        """Maps [n, length, width] to the same shape."""
        c, length = self.config, x.shape[1]
        numbers = buckets(
            length,
            length,
            c.relative_attention_num_buckets,
            c.relative_attention_max_distance,
            not self.decoder,
        )
        table = nn.Embed(c.relative_attention_num_buckets, c.num_heads, name="relative_positions")
        offsets = table(numbers).transpose(2, 0, 1)[None]
        mask = visible(attention_mask, length, causal=self.decoder)
        if context is not None:
            context_mask = visible(context_mask, context.shape[1], causal=False)
        depth = c.num_layers if not self.decoder else c.num_decoder_layers or c.num_layers
        for i in range(depth):
            block = StackBlock(c, self.decoder, name=f"block_{i}")
            x = block(x, mask, offsets, context, context_mask)
        return nn.RMSNorm(epsilon=c.layer_norm_epsilon, name="norm")(x)


class EncoderOnly(nn.Module):
    """Tokens to the encoder's hidden states."""

    config: Config

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: Any = None) -> jax.Array:
        """Maps [n, length] to [n, length, width]."""
        tokens = nn.Embed(self.config.vocab_size, self.config.d_model, name="tokens")
        return Stack(self.config, False, name="encoder")(tokens(input_ids), attention_mask)


class EncoderDecoder(nn.Module):
    """Two sequences to the logits of the second one's next tokens."""

    config: Config

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        decoder_input_ids: jax.Array,
        attention_mask: Any = None,
        decoder_attention_mask: Any = None,
    ) -> jax.Array:
        """Maps [n, length], [n, length'] to logits [n, length', vocabulary]."""
        c = self.config
        tokens = nn.Embed(c.vocab_size, c.d_model, name="tokens")
        context = Stack(c, False, name="encoder")(tokens(input_ids), attention_mask)
        decoder = Stack(c, True, name="decoder")
        x = decoder(tokens(decoder_input_ids), decoder_attention_mask, context, attention_mask)
        # The first T5 scales what goes into the tied embedding, version 1.1 has a head of its own.
        scaled = (
            c.tie_word_embeddings if c.scale_decoder_outputs is None else c.scale_decoder_outputs
        )
        x = x * c.d_model**-0.5 if scaled else x
        if c.own_head or (c.own_head is None and not c.tie_word_embeddings):
            return nn.Dense(c.vocab_size, use_bias=False, name="head")(x)
        return tokens.attend(x)


def _attention(layer: str, block: str) -> dict[str, str]:
    names = zip("qkvo", ("query", "key", "value", "out"), strict=True)
    return {f"{layer}.{letter}": f"{block}/{name}" for letter, name in names}


def _stack(side: str, last: int) -> dict[str, str]:
    layer, block = f"{side}.block.{{}}.layer", f"{side}/block_{{}}"
    dense = f"{layer}.{last}.DenseReluDense"
    return {
        f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias":
            f"{side}/relative_positions",
        f"{layer}.0.layer_norm": f"{block}/attention_norm",
        **_attention(f"{layer}.0.SelfAttention", f"{block}/attention"),
        f"{dense}.wi": f"{block}/mlp_in",
        f"{dense}.wi_0": f"{block}/mlp_gate",
        f"{dense}.wi_1": f"{block}/mlp_up",
        f"{dense}.wo": f"{block}/mlp_out",
        f"{layer}.{last}.layer_norm": f"{block}/mlp_norm",
        f"{side}.final_layer_norm": f"{side}/norm",
    }  # fmt: skip


_ENCODER = {"shared": "tokens", **_stack("encoder", 1)}
_CROSS = {
    "decoder.block.{}.layer.1.layer_norm": "decoder/block_{}/cross_norm",
    **_attention("decoder.block.{}.layer.1.EncDecAttention", "decoder/block_{}/cross"),
}
_make = functools.partial(
    Architecture,
    settings={
        "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6,
        "num_decoder_layers": None, "num_heads": 8, "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu", "tie_word_embeddings": True, "scale_decoder_outputs": None,
        "own_head": None,
    },
    vocabulary="shared.weight",
    unused=(r"EncDecAttention\.relative_attention_bias\.weight$",),
)  # fmt: skip
_TIED = {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}

ARCHITECTURES = {
    "T5EncoderModel": _make(EncoderOnly, _ENCODER, tied=_TIED),
    "T5ForConditionalGeneration": _make(
        EncoderDecoder,
        {**_ENCODER, **_stack("decoder", 2), **_CROSS, "lm_head": "head"},
        inputs=words("input_ids", "decoder_input_ids"),
        tied={**_TIED, "lm_head.weight": "shared.weight"},
        optional={"own_head": "lm_head"},
    ),
}
