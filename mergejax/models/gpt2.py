"""GPT-2, whose projections are stored [in, out] and whose query, key and value are one kernel."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax.models.parts import Block, last_token, layer_norm, visible
from mergejax.models.rules import Architecture, Config, Names, under


class Decoder(nn.Module):
    """Tokens to the hidden states behind the last norm."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.tokens = nn.Embed(c.vocab_size, c.n_embd)
        self.positions = nn.Embed(c.n_positions, c.n_embd)
        self.block = [self._block(i) for i in range(c.n_layer)]
        self.norm = layer_norm(c.layer_norm_epsilon, None)

    def _block(self, index: int) -> Block:
        c = self.config
        scale = (c.n_embd // c.n_head) ** -0.5 if c.scale_attn_weights else 1.0
        scale /= index + 1 if c.scale_attn_by_inverse_layer_idx else 1
        hidden = c.n_inner or 4 * c.n_embd
        return Block(c.n_head, hidden, c.activation_function, c.layer_norm_epsilon, scale=scale)

    def __call__(self, input_ids: jax.Array, attention_mask: Any = None) -> jax.Array:
        """Maps [n, length] to [n, length, width]."""
        length = input_ids.shape[1]
        x = self.tokens(input_ids) + self.positions(jnp.arange(length)[None])
        mask = visible(attention_mask, length, causal=True)
        for block in self.block:
            x = block(x, mask)
        return self.norm(x)


class LanguageModel(nn.Module):
    """A decoder and the logits of the next token, by its own embedding where that is tied."""

    config: Config

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: Any = None) -> jax.Array:
        """Maps [n, length] to logits [n, length, vocabulary]."""
        body = Decoder(self.config, name="body")
        x = body(input_ids, attention_mask)
        if self.config.tie_word_embeddings:
            return body.tokens.attend(x)
        return nn.Dense(self.config.vocab_size, use_bias=False, name="head")(x)


class Classifier(nn.Module):
    """A decoder and the scores of labels at the last token."""

    config: Config

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: Any = None) -> jax.Array:
        """Maps [n, length] to logits [n, labels]."""
        x = Decoder(self.config, name="body")(input_ids, attention_mask)
        scores = nn.Dense(self.config.num_labels, use_bias=False, name="head")(x)
        return last_token(scores, input_ids, self.config.pad_token_id)


_PROJECTIONS = tuple(f"block_{{}}/attention/{name}" for name in ("query", "key", "value"))
_BODY: Names = {
    "wte": "tokens",
    "wpe": "positions",
    "h.{}.ln_1": "block_{}/attention_norm",
    "h.{}.attn.c_attn": _PROJECTIONS,
    "h.{}.attn.c_proj": "block_{}/attention/out",
    "h.{}.ln_2": "block_{}/mlp_norm",
    "h.{}.mlp.c_fc": "block_{}/mlp_in",
    "h.{}.mlp.c_proj": "block_{}/mlp_out",
    "ln_f": "norm",
}
_SETTINGS = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True, "num_labels": 2, "pad_token_id": None,
}  # fmt: skip
_make = functools.partial(
    Architecture,
    settings=_SETTINGS,
    body="transformer.",
    vocabulary="transformer.wte.weight",
    unused=(r"(^|\.)attn\.(masked_)?bias$",),
    straight=r"c_(attn|proj|fc)$",
    only={"add_cross_attention": False},
)
_LONG = under("transformer", "body", _BODY)

ARCHITECTURES = {
    "GPT2Model": _make(Decoder, _BODY, vocabulary="wte.weight"),
    "GPT2LMHeadModel": _make(
        LanguageModel,
        _LONG | {"lm_head": "head"},
        tied={"lm_head.weight": "transformer.wte.weight"},
    ),
    "GPT2ForSequenceClassification": _make(Classifier, _LONG | {"score": "head"}),
}
