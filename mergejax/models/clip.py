"""CLIP: an image encoder, a text encoder, and both with projections into one space."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax.models.parts import Block, layer_norm, visible
from mergejax.models.rules import Architecture, Config, under, words
from mergejax.models.vit_layout import images, patches


def _blocks(c: Config) -> list[Block]:
    block = functools.partial(
        Block, c.num_attention_heads, c.intermediate_size, c.hidden_act, c.layer_norm_eps
    )
    return [block(name=f"block_{i}") for i in range(c.num_hidden_layers)]


class VisionEncoder(nn.Module):
    """Images to hidden states and the normalised class token."""

    config: Config

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps [n, height, width, channels] to ([n, tokens, width], [n, width])."""
        c = self.config
        x = patches(pixel_values, c, bias=False)
        first = self.param("class_token", nn.initializers.normal(0.02), (c.hidden_size,))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, c.hidden_size)), x], axis=1)
        positions = nn.Embed(x.shape[1], c.hidden_size, name="positions")
        x = layer_norm(c.layer_norm_eps, "norm_before")(x + positions(jnp.arange(x.shape[1])[None]))
        for block in _blocks(c):
            x = block(x)
        return x, layer_norm(c.layer_norm_eps, "norm")(x[:, 0])


class TextEncoder(nn.Module):
    """Tokens to hidden states and the one at the end of each text."""

    config: Config

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """Maps [n, length] to ([n, length, width], [n, width])."""
        c, length = self.config, input_ids.shape[1]
        x = nn.Embed(c.vocab_size, c.hidden_size, name="tokens")(input_ids)
        positions = nn.Embed(c.max_position_embeddings, c.hidden_size, name="positions")
        x = x + positions(jnp.arange(length)[None])
        mask = visible(attention_mask, length, causal=True)
        for block in _blocks(c):
            x = block(x, mask)
        x = layer_norm(c.layer_norm_eps, "norm")(x)
        # Configurations of the first files say 2, where the end is the largest number instead.
        ends = input_ids if c.eos_token_id == 2 else input_ids == c.eos_token_id
        return x, jnp.take_along_axis(x, ends.argmax(1)[:, None, None], axis=1)[:, 0]


class Projected(nn.Module):
    """One of the encoders and its projection."""

    config: Config
    encoder: Any
    side: str

    @nn.compact
    def __call__(self, *inputs: Any, **named: Any) -> jax.Array:
        """Maps the encoder's inputs to features [n, projection_dim]."""
        _, pooled = self.encoder(self.config, name=self.side)(*inputs, **named)
        dense = nn.Dense(self.config.projection_dim, use_bias=False, name="projection")
        return dense(pooled)


class Clip(nn.Module):
    """Images and texts to the logits of each image for each text."""

    config: Config

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, pixel_values: jax.Array, attention_mask: Any = None
    ) -> jax.Array:
        """Maps texts [t, length] and images [n, height, width, channels] to logits [n, t]."""
        c = self.config
        project = functools.partial(nn.Dense, c.projection_dim, use_bias=False)
        _, image = VisionEncoder(c.vision_config, name="vision")(pixel_values)
        _, text = TextEncoder(c.text_config, name="text")(input_ids, attention_mask)
        image, text = (
            project(name="vision_projection")(image),
            project(name="text_projection")(text),
        )
        image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, text))
        start = nn.initializers.constant(c.logit_scale_init_value)
        return jnp.exp(self.param("logit_scale", start, ())) * (image @ text.T)


_BLOCK = {
    "encoder.layers.{}.self_attn.q_proj": "block_{}/attention/query",
    "encoder.layers.{}.self_attn.k_proj": "block_{}/attention/key",
    "encoder.layers.{}.self_attn.v_proj": "block_{}/attention/value",
    "encoder.layers.{}.self_attn.out_proj": "block_{}/attention/out",
    "encoder.layers.{}.layer_norm1": "block_{}/attention_norm",
    "encoder.layers.{}.mlp.fc1": "block_{}/mlp_in",
    "encoder.layers.{}.mlp.fc2": "block_{}/mlp_out",
    "encoder.layers.{}.layer_norm2": "block_{}/mlp_norm",
}
_VISION = _BLOCK | {
    "embeddings.class_embedding": "class_token",
    "embeddings.patch_embedding": "patches",
    "embeddings.position_embedding": "positions",
    "pre_layrnorm": "norm_before",
    "post_layernorm": "norm",
}
_TEXT = _BLOCK | {
    "embeddings.token_embedding": "tokens",
    "embeddings.position_embedding": "positions",
    "final_layer_norm": "norm",
}
_BOTH = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "projection_dim": 512,
}  # fmt: skip
_TEXT_SETTINGS = _BOTH | {
    "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407,
}  # fmt: skip
_VISION_SETTINGS = _BOTH | {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 32,
}  # fmt: skip


def _examples(c: Config) -> dict[str, Any]:
    return {**words("input_ids")(c), **images(c.vision_config)}


_vision = functools.partial(
    Architecture, settings=_VISION_SETTINGS, body="vision_model.", inputs=images
)
_text = functools.partial(Architecture, settings=_TEXT_SETTINGS, body="text_model.")
_SIDES = under("vision_model", "vision", _VISION) | under("text_model", "text", _TEXT)

ARCHITECTURES = {
    "CLIPModel": Architecture(
        Clip,
        _SIDES
        | {
            "visual_projection": "vision_projection",
            "text_projection": "text_projection",
            "logit_scale": "logit_scale",
        },
        {
            "projection_dim": 512,
            "logit_scale_init_value": 2.6592,
            "vision_config": _VISION_SETTINGS,
            "text_config": _TEXT_SETTINGS,
        },
        inputs=_examples,
    ),
    "CLIPVisionModel": _vision(VisionEncoder, _VISION),
    "CLIPTextModel": _text(TextEncoder, _TEXT),
    "CLIPVisionModelWithProjection": _vision(
        functools.partial(Projected, encoder=VisionEncoder, side="vision"),
        _SIDES | {"visual_projection": "projection"},
    ),
    "CLIPTextModelWithProjection": _text(
        functools.partial(Projected, encoder=TextEncoder, side="text"),
        _SIDES | {"text_projection": "projection"},
    ),
}
