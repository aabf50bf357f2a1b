"""The vision transformer as Hugging Face stores it; `vit.py` has our own small one."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax.models.parts import Block, activation, layer_norm
from mergejax.models.rules import Architecture, Config, under


def pair(size: Any) -> tuple[int, int]:
    """Height and width, of which configurations may give one for both."""
    return (size, size) if isinstance(size, int) else tuple(size)


def images(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """An example input, for shapes alone."""
    shape = (1, *pair(config.image_size), config.num_channels)
    return {"pixel_values": jax.ShapeDtypeStruct(shape, jnp.float32)}


def patches(pixel_values: jax.Array, config: Config, *, bias: bool) -> jax.Array:
    """Tokens [n, tokens, width] of images [n, height, width, channels]; parameters `patches`."""
    size = pair(config.patch_size)
    dense = nn.Conv(config.hidden_size, size, size, padding="VALID", use_bias=bias, name="patches")
    return dense(pixel_values).reshape(len(pixel_values), -1, config.hidden_size)


class Encoder(nn.Module):
    """Images to hidden states behind the last norm, and the pooled class token if asked for."""

    config: Config

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Maps [n, height, width, channels] to ([n, tokens, width], [n, pooled] or None)."""
        c, draw = self.config, nn.initializers.normal(0.02)
        x = patches(pixel_values, c, bias=True)
        first = self.param("class_token", draw, (1, 1, c.hidden_size))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, c.hidden_size)), x], axis=1)
        x = x + self.param("positions", draw, (1, x.shape[1], c.hidden_size))
        block = functools.partial(
            Block, c.num_attention_heads, c.intermediate_size, c.hidden_act, c.layer_norm_eps
        )
        for i in range(c.num_hidden_layers):
            x = block(bias=c.qkv_bias, name=f"block_{i}")(x)
        x = layer_norm(c.layer_norm_eps, "norm")(x)
        if not c.add_pooling_layer:
            return x, None
        pooler = nn.Dense(c.pooler_output_size or c.hidden_size, name="pooler")
        return x, activation(c.pooler_act)(pooler(x[:, 0]))


class Classifier(nn.Module):
    """An encoder and the logits of an image's labels, read from the class token."""

    config: Config

    @nn.compact
    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Maps [n, height, width, channels] to logits [n, labels]."""
        x, _ = Encoder(self.config, name="body")(pixel_values)
        return nn.Dense(self.config.num_labels, name="head")(x[:, 0])


# transformers 5 has other names in memory than in files.
_BODY = {
    "embeddings.cls_token": "class_token",
    "embeddings.patch_embeddings.projection": "patches",
    "embeddings.position_embeddings": "positions",
    "encoder.layer.{}.attention.attention.query | layers.{}.attention.q_proj":
        "block_{}/attention/query",
    "encoder.layer.{}.attention.attention.key | layers.{}.attention.k_proj":
        "block_{}/attention/key",
    "encoder.layer.{}.attention.attention.value | layers.{}.attention.v_proj":
        "block_{}/attention/value",
    "encoder.layer.{}.attention.output.dense | layers.{}.attention.o_proj":
        "block_{}/attention/out",
    "encoder.layer.{}.layernorm_before | layers.{}.layernorm_before": "block_{}/attention_norm",
    "encoder.layer.{}.intermediate.dense | layers.{}.mlp.fc1": "block_{}/mlp_in",
    "encoder.layer.{}.output.dense | layers.{}.mlp.fc2": "block_{}/mlp_out",
    "encoder.layer.{}.layernorm_after | layers.{}.layernorm_after": "block_{}/mlp_norm",
    "layernorm": "norm",
    "pooler.dense": "pooler",
}  # fmt: skip
_SETTINGS = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "image_size": 224,
    "patch_size": 16, "num_channels": 3, "qkv_bias": True, "pooler_output_size": None,
    "pooler_act": "tanh", "add_pooling_layer": False, "num_labels": 2,
}  # fmt: skip

ARCHITECTURES = {
    "ViTModel": Architecture(
        Encoder,
        _BODY,
        {**_SETTINGS, "add_pooling_layer": True},
        inputs=images,
        body="vit.",
        optional={"add_pooling_layer": "pooler.dense"},
    ),
    "ViTForImageClassification": Architecture(
        Classifier,
        under("vit", "body", _BODY) | {"classifier": "head"},
        _SETTINGS,
        inputs=images,
        body="vit.",
        optional={"add_pooling_layer": "vit.pooler.dense"},
    ),
}
