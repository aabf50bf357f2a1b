"""BERT and RoBERTa, which MiniLM and sentence encoders are, too."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax.models.parts import Attention, activation, layer_norm, perceptron, visible
from mergejax.models.rules import Architecture, Config, under


class PostNormBlock(nn.Module):
    """A transformer block that normalises behind each sum."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: Any) -> jax.Array:
        """Maps [n, tokens, width] to the same shape."""
        c = self.config
        mixed = Attention(c.num_attention_heads, name="attention")(x, mask)
        x = layer_norm(c.layer_norm_eps, "attention_norm")(x + mixed)
        mixed = perceptron(x, c.intermediate_size, c.hidden_act)
        return layer_norm(c.layer_norm_eps, "mlp_norm")(x + mixed)


def padded_positions(input_ids: jax.Array, padding: int) -> jax.Array:
    """RoBERTa's positions: they count the tokens that are no padding, and begin behind its number.

    Example:
        >>> padded_positions(jnp.array([[5, 7, 1]]), padding=1).tolist()
        [[2, 3, 1]]
    """
    real = (input_ids != padding).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + padding


class Encoder(nn.Module):
    """Tokens to hidden states, and the pooled first one where the model has a pooler."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.tokens = nn.Embed(c.vocab_size, c.hidden_size)
        self.positions = nn.Embed(c.max_position_embeddings, c.hidden_size)
        self.token_types = nn.Embed(c.type_vocab_size, c.hidden_size)
        self.embedding_norm = layer_norm(c.layer_norm_eps, None)
        self.block = [PostNormBlock(c) for _ in range(c.num_hidden_layers)]
        if c.add_pooling_layer:
            self.pooler = nn.Dense(c.hidden_size)

    def __call__(
        self, input_ids: jax.Array, attention_mask: Any = None, token_type_ids: Any = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Maps [n, length] to ([n, length, width], [n, width] or None)."""
        c, positions = self.config, jnp.arange(input_ids.shape[1])[None]
        if c.padded_positions:
            positions = padded_positions(input_ids, c.pad_token_id)
        kinds = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.tokens(input_ids) + self.token_types(kinds) + self.positions(positions)
        x = self.embedding_norm(x)
        mask = visible(attention_mask, input_ids.shape[1], causal=False)
        for block in self.block:
            x = block(x, mask)
        return x, jnp.tanh(self.pooler(x[:, 0])) if c.add_pooling_layer else None


class MaskedHead(nn.Module):
    """Hidden states to what stands before the shared embedding, and the bias behind it."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps [n, length, width] to the same shape and [vocabulary]."""
        c = self.config
        x = activation(c.head_act or c.hidden_act)(nn.Dense(c.hidden_size, name="dense")(x))
        bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,))
        return layer_norm(c.layer_norm_eps, "norm")(x), bias


class MaskedLanguageModel(nn.Module):
    """An encoder and the logits of every token; the last kernel is the embedding unless untied."""

    config: Config

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: Any = None, token_type_ids: Any = None
    ) -> jax.Array:
        """Maps [n, length] to logits [n, length, vocabulary]."""
        c, body = self.config, Encoder(self.config, name="body")
        x, pooled = body(input_ids, attention_mask, token_type_ids)
        if c.next_sentence:  # stands in the first files, though their head is not asked
            nn.Dense(2, name="next_sentence")(pooled)
        x, bias = MaskedHead(c, name="head")(x)
        if c.tie_word_embeddings:
            return body.tokens.attend(x) + bias[None, None]
        return nn.Dense(c.vocab_size, name="decoder")(x)  # with a bias of its own


class Classifier(nn.Module):
    """An encoder and the logits of a sequence's labels, from its pooled first token."""

    config: Config

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: Any = None, token_type_ids: Any = None
    ) -> jax.Array:
        """Maps [n, length] to logits [n, labels]."""
        c = self.config
        x, pooled = Encoder(c, name="body")(input_ids, attention_mask, token_type_ids)
        if c.head_pooler:  # RoBERTa's head has a layer of its own
            pooled = jnp.tanh(nn.Dense(c.hidden_size, name="head_pooler")(x[:, 0]))
        return nn.Dense(c.num_labels, name="head")(pooled)


class TokenClassifier(nn.Module):
    """An encoder and the logits of every token's labels."""

    config: Config

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: Any = None, token_type_ids: Any = None
    ) -> jax.Array:
        """Maps [n, length] to logits [n, length, labels]."""
        body = Encoder(self.config, name="body")
        x, _ = body(input_ids, attention_mask, token_type_ids)
        return nn.Dense(self.config.num_labels, name="head")(x)


_BODY = {
    "embeddings.word_embeddings": "tokens",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "embedding_norm",
    "encoder.layer.{}.attention.self.query": "block_{}/attention/query",
    "encoder.layer.{}.attention.self.key": "block_{}/attention/key",
    "encoder.layer.{}.attention.self.value": "block_{}/attention/value",
    "encoder.layer.{}.attention.output.dense": "block_{}/attention/out",
    "encoder.layer.{}.attention.output.LayerNorm": "block_{}/attention_norm",
    "encoder.layer.{}.intermediate.dense": "block_{}/mlp_in",
    "encoder.layer.{}.output.dense": "block_{}/mlp_out",
    "encoder.layer.{}.output.LayerNorm": "block_{}/mlp_norm",
    "pooler.dense": "pooler",
}
_WORDS = "embeddings.word_embeddings.weight"
_SETTINGS = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "max_position_embeddings": 512,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0, "num_labels": 2,
    "tie_word_embeddings": True, "add_pooling_layer": False, "next_sentence": False,
    "padded_positions": False, "head_act": None, "head_pooler": False,
}  # fmt: skip
_ONLY = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}


_ROBERTA = {"vocab_size": 50265, "pad_token_id": 1, "padded_positions": True}


def _bare(prefix: str, settings: Mapping[str, Any]) -> Architecture:
    return Architecture(
        Encoder,
        _BODY,
        {**_SETTINGS, "add_pooling_layer": True, **settings},
        body=prefix,
        vocabulary=_WORDS,
        only=_ONLY,
        optional={"add_pooling_layer": "pooler.dense"},
    )


def _headed(
    prefix: str, module: Any, head: Mapping[str, str], settings: Mapping[str, Any], **more: Any
) -> Architecture:
    return Architecture(
        module,
        {**under(prefix.rstrip("."), "body", _BODY), **head},
        {**_SETTINGS, **settings},
        body=prefix,
        vocabulary=prefix + _WORDS,
        only=_ONLY,
        optional={"add_pooling_layer": f"{prefix}pooler.dense", **more.pop("optional", {})},
        **more,
    )


_bert, _roberta = functools.partial(_headed, "bert."), functools.partial(_headed, "roberta.")
_masked_bert = _bert(
    MaskedLanguageModel,
    {
        "cls.predictions.transform.dense": "head/dense",
        "cls.predictions.transform.LayerNorm": "head/norm",
        "cls.predictions.bias": "head/bias",
        "cls.predictions.decoder": "decoder",
        "cls.seq_relationship": "next_sentence",
    },
    {},
    tied={
        "cls.predictions.decoder.weight": f"bert.{_WORDS}",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    optional={"next_sentence": "cls.seq_relationship"},
)

ARCHITECTURES = {
    "BertModel": _bare("bert.", {}),
    "BertForMaskedLM": _masked_bert,
    "BertForPreTraining": _masked_bert,
    "BertForSequenceClassification": _bert(
        Classifier, {"classifier": "head"}, {"add_pooling_layer": True}
    ),
    "BertForTokenClassification": _bert(TokenClassifier, {"classifier": "head"}, {}),
    "RobertaModel": _bare("roberta.", _ROBERTA),
    "RobertaForMaskedLM": _roberta(
        MaskedLanguageModel,
        {
            "lm_head.dense": "head/dense",
            "lm_head.layer_norm": "head/norm",
            "lm_head.bias": "head/bias",
            "lm_head.decoder": "decoder",
        },
        {**_ROBERTA, "head_act": "gelu"},
        tied={
            "lm_head.decoder.weight": f"roberta.{_WORDS}",
            "lm_head.decoder.bias": "lm_head.bias",
        },
    ),
    "RobertaForSequenceClassification": _roberta(
        Classifier,
        {"classifier.dense": "head_pooler", "classifier.out_proj": "head"},
        {**_ROBERTA, "head_pooler": True},
    ),
    "RobertaForTokenClassification": _roberta(TokenClassifier, {"classifier": "head"}, _ROBERTA),
}
