"""Llama, Mistral and Qwen2: one decoder whose settings tell them apart."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax.models.parts import Attention, gated_perceptron, last_token, rotation, visible
from mergejax.models.rules import Architecture, Config, choose, under


def frequencies(size: int, rope: Mapping[str, Any]) -> jax.Array:
    r"""Radians for each position that pairs of a head's elements are turned by.

    .. math:: \omega_j = \theta^{-2j/size}

    Args:
        size: of a head.
        rope: `rope_theta`, and `rope_type`: 'default'; 'linear', all divided by `factor`; 'llama3',
            slow ones divided by it, with a passage between.

    Returns:
        [size/2] float32.

    Raises:
        MergeError: another type.

    Example:
        >>> frequencies(4, {'rope_theta': 16.0}).tolist()
        [1.0, 0.25]

    Source: Su et al. 2021, arXiv:2104.09864; for 'llama3' the configuration of Llama 3.1.
    """
    plain = 1.0 / (rope["rope_theta"] ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size))
    kind = rope.get("rope_type", rope.get("type", "default"))
    ways = {"default": lambda: plain, "linear": lambda: plain / rope["factor"]}
    return choose("rope_type", kind, ways | {"llama3": lambda: _by_wavelength(plain, rope)})()


def _by_wavelength(plain: jax.Array, rope: Mapping[str, Any]) -> jax.Array:
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * plain / rope["factor"] + kept * plain


def rope_of(config: Config) -> dict[str, Any]:
    """The settings of the rotation, which older configurations spread over two fields."""
    found = config.rope_parameters or {**(config.rope_scaling or {})}
    return {"rope_theta": config.rope_theta, **found}


class DecoderBlock(nn.Module):
    """Attention with rotated queries and keys and a gated perceptron, each behind a norm."""

    config: Config
    window: int | None

    @nn.compact
    def __call__(self, x: jax.Array, attention_mask: Any, turn: Any) -> jax.Array:
        """Maps [n, tokens, width] to the same shape."""
        c = self.config
        norm = functools.partial(nn.RMSNorm, epsilon=c.rms_norm_eps)
        attention = Attention(
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            bias=c.qkv_bias,
            out_bias=c.attention_bias,
            name="attention",
        )
        mask = visible(attention_mask, x.shape[1], causal=True, window=self.window)
        x = x + attention(norm(name="attention_norm")(x), mask, turn=turn)
        normed = norm(name="mlp_norm")(x)
        return x + gated_perceptron(normed, c.intermediate_size, c.hidden_act, bias=c.mlp_bias)


class Decoder(nn.Module):
    """Tokens to the hidden states behind the last norm."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.tokens = nn.Embed(c.vocab_size, c.hidden_size)
        windows = [self._window(i) for i in range(c.num_hidden_layers)]
        self.block = [DecoderBlock(c, window) for window in windows]
        self.norm = nn.RMSNorm(epsilon=c.rms_norm_eps)

    def _window(self, index: int) -> int | None:
        c = self.config
        kinds = c.layer_types or ["sliding_attention"] * c.num_hidden_layers
        late = index >= c.max_window_layers or bool(c.layer_types)
        slides = c.use_sliding_window and late and kinds[index] == "sliding_attention"
        return c.sliding_window if slides else None

    def __call__(self, input_ids: jax.Array, attention_mask: Any = None) -> jax.Array:
        """Maps [n, length] to [n, length, width]."""
        c = self.config
        x = self.tokens(input_ids)
        size = c.head_dim or c.hidden_size // c.num_attention_heads
        positions = jnp.arange(input_ids.shape[1])[None]
        turn = rotation(positions, frequencies(size, rope_of(c)))
        for block in self.block:
            x = block(x, attention_mask, turn)
        return self.norm(x)


class LanguageModel(nn.Module):
    """A decoder and the logits of the next token, by its own embedding where that is tied."""

    config: Config

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: Any = None) -> jax.Array:
        """Maps [n, length] to logits [n, length, vocabulary]."""
        c = self.config
        body = Decoder(c, name="body")
        x = body(input_ids, attention_mask)
        if c.tie_word_embeddings:
            return body.tokens.attend(x)
        return nn.Dense(c.vocab_size, use_bias=False, name="head")(x)


class Classifier(nn.Module):
    """A decoder and the scores of labels at the last token."""

    config: Config

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: Any = None) -> jax.Array:
        """Maps [n, length] to logits [n, labels]."""
        x = Decoder(self.config, name="body")(input_ids, attention_mask)
        scores = nn.Dense(self.config.num_labels, use_bias=False, name="head")(x)
        return last_token(scores, input_ids, self.config.pad_token_id)


_BODY = {
    "embed_tokens": "tokens",
    "layers.{}.self_attn.q_proj": "block_{}/attention/query",
    "layers.{}.self_attn.k_proj": "block_{}/attention/key",
    "layers.{}.self_attn.v_proj": "block_{}/attention/value",
    "layers.{}.self_attn.o_proj": "block_{}/attention/out",
    "layers.{}.input_layernorm": "block_{}/attention_norm",
    "layers.{}.mlp.gate_proj": "block_{}/mlp_gate",
    "layers.{}.mlp.up_proj": "block_{}/mlp_up",
    "layers.{}.mlp.down_proj": "block_{}/mlp_out",
    "layers.{}.post_attention_layernorm": "block_{}/mlp_norm",
    "norm": "norm",
}
_SETTINGS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": None,
    "tie_word_embeddings": False, "attention_bias": False, "qkv_bias": False, "mlp_bias": False,
    "sliding_window": None, "use_sliding_window": False, "max_window_layers": 0,
    "layer_types": None, "num_labels": 2, "pad_token_id": None,
}  # fmt: skip
_KINDS: Mapping[str, Mapping[str, Any]] = {
    "Llama": {},
    "Mistral": {"use_sliding_window": True, "sliding_window": 4096, "num_key_value_heads": 8,
                "intermediate_size": 14336},
    "Qwen2": {"qkv_bias": True, "sliding_window": 4096, "max_window_layers": 28,
              "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
}  # fmt: skip


def _biased(module: Any) -> Any:
    """Llama's `attention_bias` stands for all four projections."""
    return lambda c: module(Config({**c, "qkv_bias": c.qkv_bias or c.attention_bias}))


def _kind(name: str, settings: Mapping[str, Any]) -> dict[str, Architecture]:
    make = functools.partial(Architecture, settings={**_SETTINGS, **settings})
    head = functools.partial(make, body="model.", vocabulary="model.embed_tokens.weight")
    body = under("model", "body", _BODY)
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    return {
        f"{name}Model": make(
            _biased(Decoder), _BODY, body="model.", vocabulary="embed_tokens.weight"
        ),
        f"{name}ForCausalLM": head(_biased(LanguageModel), body | {"lm_head": "head"}, tied=tied),
        f"{name}ForSequenceClassification": head(_biased(Classifier), body | {"score": "head"}),
    }


ARCHITECTURES = {k: v for name, more in _KINDS.items() for k, v in _kind(name, more).items()}
